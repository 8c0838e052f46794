"""Linear layers in float8, through torchao itself, which `tests/quantised.sh` has.

On a CPU it calculates the same products: conversion, forward and backward are its own, the GPU is pretended.
"""

import pytest
import torch

from tests.models.test_peer_mla import tiny_peer
from tokenkit.models.causal_lm import CausalLM
from tokenkit.models.float8 import CAPABILITY, use_float8

pytest.importorskip("torchao.float8")
SIXTEENS = {
    "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "qk_nope_head_dim": 16,
}  # fmt: skip


def loss_and_gradients(recipe, ids):
    model = tiny_peer(vocab_size=304, mla_config=SIXTEENS).to(torch.bfloat16).train()
    if recipe is not None:
        number = use_float8(CausalLM(model, 304), recipe)
        kinds = {name: type(module).__name__ for name, module in model.named_modules()}
        converted = {name.rpartition(".")[2] for name, kind in kinds.items() if kind == "Float8Linear"}
        assert number == sum(kind == "Float8Linear" for kind in kinds.values())
        assert {"q_b_proj", "kv_b_proj", "o_proj", "up_proj"} <= converted
        assert not {"lm_head", "query_proj"} & converted, "small errors there choose other experts"
    loss = model(ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {name: p.grad.float() for name, p in model.named_parameters()}


@pytest.mark.parametrize("recipe", CAPABILITY)
def test_each_recipe_converts_and_trains_near_bfloat16(recipe, monkeypatch):
    ids = torch.randint(300, (2, 16), generator=torch.Generator().manual_seed(1))
    expected, slopes = loss_and_gradients(None, ids)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a new one")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    loss, found = loss_and_gradients(recipe, ids)
    assert loss != expected
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=0)
    assert found.keys() == slopes.keys()
    assert all(slope.isfinite().all() and slope.any() for slope in found.values())
