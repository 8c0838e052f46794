"""The drop-in losses by their signatures, and what they say to the wrong thing."""

import dataclasses
import inspect
import typing

import pytest
import torch

from tests.losses.example import make_batch, make_states
from tokenkit import losses
from tokenkit.losses import LOSSES, alm_loss, clm_loss, uld_loss
from tokenkit.structs import Head, HiddenStates

DROP_IN = {
    name: getattr(losses, name) for name in losses.__all__ if name.endswith("_loss") and name != "make_loss"
}


@pytest.mark.parametrize("name", DROP_IN)
def test_every_option_is_a_keyword_with_its_type_and_default(name):
    """A type checker refuses `nonsense=3`, and an editor completes the rest."""
    function = DROP_IN[name]
    module = function.__module__.rpartition(".")[2]
    (options,) = {entry.options for entry in LOSSES.values() if entry.place.partition(":")[0] == module}
    hints, kinds = typing.get_type_hints(function), typing.get_type_hints(options)
    found = {
        parameter.name: (hints[parameter.name], parameter.default)
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.name != "modules"
    }
    assert found == {
        field.name: (kinds[field.name], field.default)
        for field in dataclasses.fields(options)
        if not field.metadata.get("of_pair")
    }


def test_an_unknown_option_is_refused():
    batch = make_batch()
    student, teacher = make_states(batch)
    with pytest.raises(TypeError, match="nonsense"):
        alm_loss(student, teacher, batch, nonsense=3)


def test_logits_are_refused():
    batch = make_batch()
    student, teacher = make_states(batch)
    logits_BTV = torch.randn(2, 8, 40)
    for call in (
        lambda: clm_loss(logits_BTV, batch),
        lambda: alm_loss(logits_BTV, teacher, batch),
        lambda: alm_loss(student, logits_BTV, batch),
        lambda: uld_loss(logits_BTV, teacher, batch),
    ):
        with pytest.raises(TypeError, match=r"must be HiddenStates.*got Tensor; logits are never formed"):
            call()
    with pytest.raises(ValueError, match=r"as wide as its head.*are these logits"):
        clm_loss(HiddenStates(logits_BTV, Head(torch.randn(40, 6))), batch)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_short_mask_of_whitespace_is_refused(side):
    batch = make_batch()
    short = dataclasses.replace(getattr(batch, side), space_V=getattr(batch, side).space_V[:-3])
    batch = dataclasses.replace(batch, **{side: short})
    states = dict(zip(("student", "teacher"), make_states(make_batch()), strict=True))
    with pytest.raises(ValueError, match=r"space_V covers \d+ ids but the head has \d+"):
        alm_loss(states["student"], states["teacher"], batch)
    padded = dataclasses.replace(states[side].head, vocab_size=len(short.space_V))
    batch.student.ids_BT.clamp_(max=30), batch.teacher.ids_BT.clamp_(max=30)
    states[side] = dataclasses.replace(states[side], head=padded)
    assert alm_loss(states["student"], states["teacher"], batch).total.isfinite()
