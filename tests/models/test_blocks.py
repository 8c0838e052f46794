"""How layers are computed changes no number, and is refused by name where it cannot be had.

Faults tried, each caught here: Liger's changes left in the architecture's module; its rotary embedding left
out; checkpointed layers compiled with their checkpoint inside.
"""

import copy
import sys

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from transformers import AutoConfig, AutoModelForCausalLM
from triton.runtime import interpreter

from tests.bf16_shim import install
from tokenkit.errors import ConfigError
from tokenkit.models import blocks

CPU = torch.device("cpu")


def tiny(kind, **more):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, vocab_size=64, pad_token_id=0, **more,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def gradients(model, ids):
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@triton.jit
def _rsqrt(x):
    return tl.rsqrt(x)


@triton.jit
def _tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@pytest.fixture
def interpreted(monkeypatch):
    """What Triton's interpreter lacks and Liger uses: methods of a float argument, functions of libdevice."""
    from liger_kernel.ops import geglu, rms_norm

    install()
    monkeypatch.setattr(rms_norm, "rsqrt", _rsqrt)
    monkeypatch.setattr(geglu, "tanh", _tanh)
    before = interpreter._implicit_cvt

    def convert(value):
        if isinstance(value, float):
            return tl.tensor(interpreter.TensorHandle(np.array([value], np.float32), tl.float32), tl.float32)
        return before(value)

    monkeypatch.setattr(interpreter, "_implicit_cvt", convert)


@pytest.mark.parametrize("kind", ["qwen3", "gemma2"])
def test_ligers_kernels_give_the_same_loss_and_leave_other_models_alone(kind, interpreted):
    model, ids = tiny(kind), torch.arange(1, 9).view(2, 4)
    expected, other = gradients(model, ids), copy.deepcopy(model)
    home = dict(vars(sys.modules[type(model).__module__]))
    blocks.apply_liger(model)
    assert vars(sys.modules[type(model).__module__]) == home
    names = {type(m).__name__ for m in other.modules() if "forward" in vars(m)}
    assert not names
    changed = {type(m).__name__ for m in model.modules() if "forward" in vars(m)}
    assert len(changed) == 3, "norm, gated layer and attention"
    for got, want in zip(gradients(model, ids), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-6)


def test_liger_is_refused_by_name_where_it_cannot_be_had(monkeypatch):
    with pytest.raises(ConfigError, match=r"use_liger_kernel needs a GPU.*on a CPU; set it to false"):
        blocks.use_liger(None, CPU)
    with pytest.raises(ConfigError, match="liger-kernel has nothing for gpt_neox"):
        blocks.apply_liger(tiny("gpt_neox"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", None)
    with pytest.raises(ConfigError, match=r"needs liger-kernel, which is not installed.*pip install"):
        blocks.apply_liger(tiny("llama"))
