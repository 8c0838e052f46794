import pytest
import torch

from tests.tiny import tiny_model
from tokenkit.models.causal_lm import CausalLM, effective_weight
from tokenkit.models.lora import add_lora, as_teacher, parse_layers
from tokenkit.models.options import LoraOptions

IDS = torch.randint(300, (2, 11), generator=torch.Generator().manual_seed(1))


def student_with(architecture: str = "llama", **options) -> CausalLM:
    student = CausalLM(tiny_model(architecture), 300)
    add_lora(student, LoraOptions(**{"rank": 4, **options}))
    with torch.no_grad():  # adapters start at zero: give them something to do
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return student


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3"])
def test_as_teacher_is_the_model_before_the_adapters(architecture):
    plain = CausalLM(tiny_model(architecture), 300)(IDS).hidden_BTD
    student = student_with(architecture)
    assert (student(IDS).hidden_BTD - plain).abs().max() > 1e-3
    with as_teacher(student):
        torch.testing.assert_close(student(IDS).hidden_BTD, plain)
    assert (student(IDS).hidden_BTD - plain).abs().max() > 1e-3


def test_as_teacher_leaves_what_is_trained_alone():
    student = student_with(dropout=0.5).train()
    trained = [name for name, parameter in student.named_parameters() if parameter.requires_grad]
    with as_teacher(student):
        assert [name for name, p in student.named_parameters() if p.requires_grad] == trained
        assert not student.training
        torch.testing.assert_close(student(IDS).hidden_BTD, student(IDS).hidden_BTD)
    assert student.training


def test_modules_saved_whole_are_switched_off_too():
    student = student_with(modules_to_save=("lm_head",))
    original = effective_weight(student.output).detach().clone()
    with torch.no_grad():
        effective_weight(student.output).add_(1)
    with as_teacher(student):
        torch.testing.assert_close(effective_weight(student.output), original)
    torch.testing.assert_close(effective_weight(student.output), original + 1)


def test_an_adapter_on_the_head_is_part_of_the_head():
    student = student_with(targets=("lm_head",))
    ids = IDS[:1]
    logits = student.causal_lm(input_ids=ids).logits
    states = student(ids)
    torch.testing.assert_close(states.hidden_BTD @ states.head.weight_VD.T, logits)
    states.head.weight_VD.sum().backward()
    assert any("lora_A" in name and p.grad is not None for name, p in student.named_parameters())


def test_adapters_go_only_into_the_layers_named():
    student = student_with(layers="1")
    adapted = {name.split("layers.")[1][0] for name, _ in student.named_parameters() if "lora_A" in name}
    assert adapted == {"1"}


@pytest.mark.parametrize(("text", "layers"), [("0-2", [0, 1, 2]), ("3", [3]), ("0-1, 3", [0, 1, 3])])
def test_layer_ranges(text, layers):
    assert parse_layers(text, 4) == layers


@pytest.mark.parametrize("text", ["4", "0-4", "a", "2-1", ""])
def test_a_layer_range_that_the_model_lacks_is_refused(text):
    with pytest.raises(ValueError, match="model_lora_layers"):
        parse_layers(text, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ("nothing",)}, "model_lora_targets"),
        ({"target_regex": "("}, r"target_regex '\(' is no regular expression"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\)"),
    ],
)
def test_adapters_that_cannot_be_placed_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        student_with(**options)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_on_one_use_of_a_tied_matrix_is_refused(target):
    student = CausalLM(tiny_model(tie_word_embeddings=True), 300)
    with pytest.raises(ValueError, match=f"{target}, but input and output embedding are one matrix"):
        add_lora(student, LoraOptions(rank=4, targets=("q_proj", target)))


def test_a_module_to_save_that_the_model_lacks_is_refused():
    with pytest.raises(ValueError, match="model_lora_modules_to_save: this model has no module 'head'"):
        add_lora(CausalLM(tiny_model(), 300), LoraOptions(modules_to_save=("lm_head", "head")))
