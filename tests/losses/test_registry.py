"""Losses by name: aliases, a user's own, and what an unknown name says."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.losses.example import make_batch, make_states
from tokenkit.losses import LOSSES, AlmOptions, resolve
from tokenkit.structs import LossTerm


def squared_norm(student, teacher, batch):
    """A user's loss: of the hidden states at scored tokens."""
    return LossTerm(student.hidden_BTD[batch.student.trained_BT].square().sum(), torch.tensor(3))


squared_norm.count = lambda teacher, batch: torch.tensor(3)


def uncounted(student, teacher, batch):
    return LossTerm(student.hidden_BTD.sum(), torch.tensor(12))


@pytest.mark.parametrize(("alias", "name"), [("sft", "clm"), ("alm_greedy", "alm_unconstrained")])
def test_an_alias_is_the_loss(alias, name):
    assert resolve(alias) is LOSSES[name] is resolve(name)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_prepares_counts_and_trains(name):
    loss = resolve(name)
    options = loss.options() if loss.chunks is None else AlmOptions(chunks=loss.chunks)
    batch = make_batch()
    student, teacher = make_states(batch)
    prepared = loss.prepare(teacher if loss.needs_teacher else None, batch, options)
    term = loss.function(student, prepared, batch, options)
    assert term.count == prepared.count > 0
    term.total.backward()
    assert student.hidden_BTD.grad.any()
    assert teacher.hidden_BTD.grad is None


def test_a_users_loss_is_imported_and_its_count_asked_first():
    loss = resolve("tests.losses.test_registry:squared_norm")
    batch = make_batch()
    student, teacher = make_states(batch)
    prepared = loss.prepare(teacher, batch, loss.options(anything=1))
    assert prepared.count == 3
    assert loss.function(student, prepared, batch, None).total.requires_grad


def test_a_users_loss_without_a_count_counts_scored_student_tokens():
    loss = resolve("tests.losses.test_registry:uncounted")
    batch = make_batch()
    assert loss.prepare(make_states(batch)[1], batch, None).count == 12


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("alm_unconstraind", "expected one of clm, sft, alm_unconstrained.*did you mean 'alm_unconstrained'"),
        ("no_such_module:loss", "no module 'no_such_module'"),
        ("tests.losses.example:nothing", "has no function 'nothing'"),
    ],
)
def test_an_unknown_loss_is_named(name, message):
    with pytest.raises(ValueError, match=message):
        resolve(name)


def test_other_trainers_import_torch_and_triton_alone():
    code = (
        "import sys, tokenkit.losses; sys.exit(any(x in sys.modules for x in ('transformers', 'tokenizers')))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode
        == 0
    )
