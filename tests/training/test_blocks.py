"""Compiled layers and other attentions in a run: the same losses, and refusals by name."""

import pytest
import torch

from tests.ranks import run_ranks
from tests.training.test_ranks_agree import SINGLE, assert_close, steps
from tokenkit.errors import ConfigError
from tokenkit.models import blocks
from tokenkit.training.build import build


@pytest.fixture
def quick(monkeypatch):
    """A compiler that takes no minutes; counted."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(blocks, "BACKEND", backend)
    with blocks.functorch.patch(donated_buffer=True):  # and as it was, afterwards
        yield graphs
    torch.compiler.reset()


@pytest.mark.parametrize("ranks", [0, 2])
def test_compiled_layers_give_the_same_losses(make_config, quick, ranks):
    """And checkpointed ones: a graph holds no checkpoint."""
    changes = {"train_model_mode": "full", "dtype": "bfloat16", "gradient_checkpointing": "true"}
    plain, compiled = make_config(**changes), make_config(**changes, compile="true")
    if ranks:
        for got, expected in zip(*(run_ranks(steps, ranks, c, 2) for c in (compiled, plain)), strict=True):
            assert_close(got, expected, rtol=1e-3)
        return
    assert_close(steps(SINGLE, compiled, 2), steps(SINGLE, plain, 2), rtol=1e-3)
    assert quick
    assert not any("checkpoint" in str(node.target) for graph in quick for node in graph.graph.nodes)


def test_eager_attention_gives_the_losses_of_sdpa(make_config):
    eager, sdpa = (steps(SINGLE, make_config(attn_implementation=a), 2) for a in ("eager", "sdpa"))
    assert_close(eager, sdpa)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attn_implementation": "flash_attention_2", "dtype": "bfloat16"}, "flash_attention_2"),
        ({"attn_implementation": "flex_attention"}, "flex_attention needs a GPU.*set it to sdpa or eager"),
        ({"attn_implementation": "flash_attention_2"}, "computes in 16 bits, and dtype is float32"),
        ({"attn_implementation": "kernels-community/flash-attn2", "dtype": "bfloat16"}, "trust_remote_code"),
        (
            {"use_liger_kernel": "true"},
            "use_liger_kernel needs a GPU",
        ),
        (
            {"compile": "true", "losses": ["alm_latents"], "latents_to_align": "qkv"},
            "compile hides what lies inside a layer",
        ),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(make_config, changes, words):
    with pytest.raises((ConfigError, ValueError), match=words):
        build(make_config(**changes), SINGLE)


def test_compile_needs_a_compiler(make_config, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match=r"compile needs a compiler of C\+\+ on a CPU"):
        build(make_config(compile="true"), SINGLE)
