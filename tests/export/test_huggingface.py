import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import ARCHITECTURES, byte_level_bpe, sentencepiece_bpe, tiny_model
from tokenkit.embeddings.transfer import transfer_vocabulary
from tokenkit.errors import ExportError
from tokenkit.export.huggingface import ExportRequest, export_huggingface
from tokenkit.models.causal_lm import CausalLM
from tokenkit.models.lora import add_lora
from tokenkit.models.options import LoraOptions
from tokenkit.tokenization.tokenizer import load_tokenizer

TEXT = "The cats sat on the mat — naïve."


@pytest.fixture(scope="module")
def old_and_new(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    return (
        load_tokenizer(str(byte_level_bpe(folder / "old", 300))),
        load_tokenizer(str(sentencepiece_bpe(folder / "new", 400))),
    )


def transferred(architecture, old_and_new, **changes) -> CausalLM:
    student = CausalLM(tiny_model(architecture, **changes), 300)
    transfer_vocabulary(student, *old_and_new, pad_to_multiple_of=64)
    return student


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_reload_gives_the_same_logits_and_ids(architecture, old_and_new, tmp_path):
    student, new = transferred(architecture, old_and_new), old_and_new[1]
    folder = export_huggingface(student, None, new, ExportRequest(folder=tmp_path / "out"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(TEXT, add_special_tokens=False, return_tensors="pt").input_ids
    assert ids[0].tolist() == new.encode(TEXT).ids.tolist()
    assert tokenizer.decode(ids[0]) == TEXT
    with torch.no_grad():
        expected = student.causal_lm.eval()(ids).logits
        torch.testing.assert_close(model(ids).logits[..., : new.vocab_size], expected[..., : new.vocab_size])
    assert model.generation_config.eos_token_id == new.eos_id
    assert (folder / "README.md").read_text().startswith("---")
    assert list(folder.glob("*.safetensors"))
    assert not list(folder.glob("*.bin"))


@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_adapters_are_merged(architecture, old_and_new, tmp_path):
    student = transferred(architecture, old_and_new)
    add_lora(student, LoraOptions(rank=4))
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    folder = export_huggingface(student, None, old_and_new[1], ExportRequest(folder=tmp_path / "out"))
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert not any("lora" in name for name in file.keys())  # noqa: SIM118
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        got = AutoModelForCausalLM.from_pretrained(folder)(ids).logits[..., :400]
        expected = student.model.eval()(ids).logits[..., :400]
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tie", [True, False])
def test_padding_rows_are_never_generated(old_and_new, tmp_path, tie):
    student = transferred("llama", old_and_new, tie_word_embeddings=tie)
    vocab_size, rows = old_and_new[1].vocab_size, len(student.output.weight)
    assert rows > vocab_size
    with torch.no_grad():
        student.output.weight[vocab_size:] *= 100  # what training leaves there is nobody's business
    folder = export_huggingface(student, None, old_and_new[1], ExportRequest(folder=tmp_path / "out"))
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder)(torch.arange(3, 60)[None]).logits[0]
    assert (logits.argmax(-1) < vocab_size).all()
    assert (logits.softmax(-1)[:, vocab_size:].sum(-1) < (rows - vocab_size) / rows).all()


def test_it_is_written_in_the_type_asked_for(old_and_new, tmp_path):
    student = transferred("llama", old_and_new)
    request = ExportRequest(folder=tmp_path / "out", dtype=torch.bfloat16)
    folder = export_huggingface(student, None, old_and_new[1], request)
    assert AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype == torch.bfloat16
    assert next(student.parameters()).dtype == torch.float32


def test_generation_stops_at_the_end_of_a_turn_too(old_and_new, tmp_path):
    new = load_tokenizer("byte:target=Qwen2")
    student = CausalLM(tiny_model(), 300)
    transfer_vocabulary(student, old_and_new[0], new)
    folder = export_huggingface(student, None, new, ExportRequest(folder=tmp_path / "out"))
    ends = AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id
    assert ends == sorted([new.eos_id, new.special_ids["end_turn"]])
    assert AutoTokenizer.from_pretrained(folder).chat_template


def test_a_folder_that_holds_something_is_left_alone(old_and_new, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(FileExistsError, match="move it away"):
        export_huggingface(
            transferred("llama", old_and_new), None, old_and_new[1], ExportRequest(folder=tmp_path / "out")
        )
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "mine").read_text() == "precious"


def test_it_samples_as_the_student_did(old_and_new, tmp_path):
    student = transferred("llama", old_and_new)
    config = student.causal_lm.generation_config
    config.do_sample, config.temperature, config.suppress_tokens = True, 0.6, [299]
    folder = export_huggingface(student, None, old_and_new[1], ExportRequest(folder=tmp_path / "out"))
    written = AutoModelForCausalLM.from_pretrained(folder).generation_config
    assert (written.do_sample, written.temperature) == (True, 0.6)
    assert written.suppress_tokens is None, "an id of the old tokenizer"
    assert written.eos_token_id == old_and_new[1].eos_id


def test_settings_that_cannot_be_written_do_not_spoil_the_export(old_and_new, tmp_path):
    student = transferred("llama", old_and_new)
    config = student.causal_lm.generation_config
    config.do_sample, config.temperature = False, 0.6
    folder = export_huggingface(student, None, old_and_new[1], ExportRequest(folder=tmp_path / "out"))
    assert AutoModelForCausalLM.from_pretrained(folder).generation_config.temperature != 0.6


def test_a_merge_that_changes_the_model_is_noticed(old_and_new, tmp_path):
    student = transferred("llama", old_and_new, tie_word_embeddings=True)
    student.config.tie_word_embeddings = False  # so that the adapter is placed
    student.output.weight = torch.nn.Parameter(student.output.weight.detach().clone())
    add_lora(student, LoraOptions(rank=4, targets=("lm_head",)))
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    student.config.tie_word_embeddings = True
    with pytest.raises(ExportError, match="adapters merged, is off by"):
        export_huggingface(student, None, old_and_new[1], ExportRequest(folder=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
