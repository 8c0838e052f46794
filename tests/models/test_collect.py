"""What a model computes on the way, against Hugging Face's own hidden states and the projections' outputs."""

import pytest
import torch

from tests.tiny import ARCHITECTURES, tiny_model
from tokenkit.models.causal_lm import CausalLM
from tokenkit.models.collect import projections, qkv_widths
from tokenkit.models.lora import add_lora, as_teacher
from tokenkit.models.options import LoraOptions

IDS = torch.randint(300, (2, 11), generator=torch.Generator().manual_seed(1))
ALL = frozenset({"embedded", "layers", "qkv"})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layers_are_hugging_faces_hidden_states(architecture):
    model = tiny_model(
        architecture, num_hidden_layers=3, **({"n_layer": 3} if architecture == "gpt2" else {})
    )
    states = CausalLM(model, 300)(IDS, collect=ALL)
    theirs = model(IDS, output_hidden_states=True).hidden_states[1:]
    assert len(states.layers_BTD) == len(theirs) == 3
    for ours, true in zip(states.layers_BTD, theirs, strict=True):
        torch.testing.assert_close(ours, true)
    torch.testing.assert_close(states.embedded_BTD, model.get_input_embeddings()(IDS))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_queries_keys_and_values_are_those_of_the_projections(architecture):
    model = CausalLM(tiny_model(architecture), 300)
    states = model(IDS, collect=ALL)
    widths = model.widths()
    assert widths.qkv == qkv_widths(model.layers, model.config)
    assert [len(states.qkv), widths.layers, widths.hidden, widths.embedding] == [2, 2, 32, 32]
    for layer, parts in zip(model.layers, states.qkv, strict=True):
        assert tuple(part.shape[-1] for part in parts) == widths.qkv
        weights = [p.weight.T if type(p).__name__ == "Conv1D" else p.weight for p in projections(layer)]
        assert sum(part.shape[-1] for part in parts) == sum(weight.shape[0] for weight in weights)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3"])
def test_gradients_flow_through_what_was_collected_also_under_checkpointing(architecture):
    gradients = []
    for checkpointing in (False, True):
        model = CausalLM(tiny_model(architecture), 300).train()
        if checkpointing:
            model.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
        states = model(IDS, collect=ALL)
        total = sum(part.square().mean() for parts in states.qkv for part in parts)
        (total + sum(layer.square().mean() for layer in states.layers_BTD)).backward()
        gradients.append([p.grad for p in model.layers.parameters()])
    assert all(g is not None for g in gradients[0][:3])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_adapters_are_in_what_is_collected_and_out_of_the_teachers():
    model = CausalLM(tiny_model(), 300)
    before = model(IDS, collect=ALL).qkv[0][0]
    add_lora(model, LoraOptions(rank=2))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    assert not torch.allclose(model(IDS, collect=ALL).qkv[0][0], before)
    with as_teacher(model):
        torch.testing.assert_close(model(IDS, collect=ALL).qkv[0][0], before)


def test_nothing_is_collected_unless_it_is_asked_for():
    model = CausalLM(tiny_model(), 300)
    states = model(IDS)
    assert (states.embedded_BTD, states.layers_BTD, states.qkv) == (None, (), ())
    model(IDS, collect=ALL)
    assert not any(module._forward_hooks for module in model.layers.modules())


def test_an_architecture_whose_projections_are_not_known_is_named():
    model = CausalLM(tiny_model(), 300)
    for layer in model.layers:
        layer.self_attn.queries = layer.self_attn.q_proj
        del layer.self_attn.q_proj
    assert model.widths().qkv is None
    with pytest.raises(ValueError, match="from LlamaDecoderLayer: expected modules q_proj, k_proj, v_proj"):
        model(IDS, collect=frozenset({"qkv"}))
