"""Losses by name: aliases, a user's own, and what an unknown name says."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.losses.example import make, make_batch, make_context, make_states, run_loss
from tokenkit.losses import LOSSES, make_loss
from tokenkit.losses.options import CROSS_TOKENIZER, find, needs_teacher
from tokenkit.structs import Context, LossTerm, Shard


def squared_norm(student, teacher, batch):
    """A user's loss: of the hidden states at scored tokens."""
    return LossTerm(student.hidden_BTD[batch.student.trained_BT].square().sum(), torch.tensor(3))


squared_norm.count = lambda teacher, batch: torch.tensor(3)


def uncounted(student, teacher, batch):
    return LossTerm(student.hidden_BTD.sum(), torch.tensor(12))


def bare(student, teacher, batch):
    return student.hidden_BTD.sum()


def without_a_tensor(student, teacher, batch):
    return LossTerm(1.0, torch.tensor(3))


def without_a_return(student, teacher, batch):
    student.hidden_BTD.sum()


def of_the_teachers_head(student, teacher, batch):
    return LossTerm(teacher.head.weight_VD.abs().sum(), torch.tensor(12))


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("sft", "clm"),
        ("alm_greedy", "alm_unconstrained"),
        ("alm", "alm_unbiased"),
        ("baseline_minED", "baseline_mined"),
    ],
)
def test_an_alias_is_the_loss(alias, name):
    assert find(alias) is LOSSES[name] is find(name)


@pytest.mark.parametrize("name", CROSS_TOKENIZER)
def test_every_loss_prepares_counts_and_trains_the_student_alone(name):
    loss, batch = make(name), make_batch()
    assert loss.needs_teacher == LOSSES[name].needs_teacher
    student, teacher = make_states(batch)
    context = make_context(loss, student, teacher)
    prepared = loss.prepare(teacher if loss.needs_teacher else None, batch, context)
    term = loss.loss(student, prepared, batch, context)
    assert torch.equal(term.count, prepared.count)
    assert term.count.sum() > 0
    term.total.sum().backward()
    assert student.hidden_BTD.grad.any()
    for tensor in (teacher.hidden_BTD, teacher.head.weight_VD, teacher.embedded_BTD):
        assert tensor.grad is None
    if context.modules is not None:
        assert all(p.grad.any() and p.ndim for p in context.modules.parameters())


@pytest.mark.parametrize("name", [name for name in CROSS_TOKENIZER if needs_teacher(name)])
def test_a_loss_without_its_teacher_says_so(name):
    with pytest.raises(ValueError, match="compares with a teacher: got none"):
        make(name).prepare(None, make_batch())


@pytest.mark.parametrize("name", CROSS_TOKENIZER)
def test_every_loss_is_zero_and_pulls_nothing_where_there_is_nothing_to_compare(name):
    batch = make_batch(trained=torch.zeros(2, 8, dtype=torch.bool))
    teacher = dataclasses.replace(batch.teacher, trained_BT=torch.zeros(2, 9, dtype=torch.bool))
    batch = dataclasses.replace(batch, teacher=teacher)
    student, teacher = make_states(batch)
    term, _ = run_loss(name, batch, student, teacher)
    assert not term.count.any()
    assert not term.total.any()
    term.total.sum().backward()
    assert not student.hidden_BTD.grad.any()


@pytest.mark.parametrize("name", CROSS_TOKENIZER)
def test_swapped_models_are_named(name):
    batch = make_batch()
    student, teacher = make_states(batch)
    with pytest.raises((ValueError, RuntimeError), match=r"swapped|size|shape|of the other model"):
        run_loss(name, batch, teacher, student)


def test_a_users_loss_is_imported_and_its_count_asked_first():
    loss = make_loss("tests.losses.test_registry:squared_norm")
    batch = make_batch()
    student, teacher = make_states(batch)
    prepared = loss.prepare(teacher, batch)
    assert prepared.count == 3
    assert loss.loss(student, prepared, batch).total.requires_grad


def test_a_users_loss_reads_the_teachers_head_as_it_is_in_the_second_half():
    loss = make_loss("tests.losses.test_registry:of_the_teachers_head")
    batch = make_batch()
    student, teacher = make_states(batch)
    prepared = loss.prepare(teacher, batch)
    now = Context(teacher_head=dataclasses.replace(teacher.head, weight_VD=torch.zeros(50, 6)))
    assert loss.loss(student, prepared, batch, now).total == 0


def test_a_users_loss_without_a_count_counts_scored_student_tokens():
    loss = make_loss("tests.losses.test_registry:uncounted")
    batch = make_batch()
    assert loss.prepare(make_states(batch)[1], batch).count == 12


@pytest.mark.parametrize(
    ("name", "kind"), [("bare", "Tensor"), ("without_a_tensor", "LossTerm"), ("without_a_return", "NoneType")]
)
def test_what_a_users_loss_returns_is_a_loss_term(name, kind):
    loss, batch = make_loss(f"tests.losses.test_registry:{name}"), make_batch()
    student, teacher = make_states(batch)
    prepared = loss.prepare(teacher, batch)
    with pytest.raises(ValueError, match=rf"{name}' must return LossTerm\(total, count\).*got {kind}$"):
        loss.loss(student, prepared, batch)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("alm_unconstraind", "did you mean alm_unconstrained.*expected one of clm, sft, alm_unconstrained"),
        ("no_such_module:loss", "no module 'no_such_module'"),
        ("tests.losses.example:nothing", "has no function 'nothing'"),
        ("tests.losses.example:__name__", "has no function '__name__'"),
        ("tests.no_such:loss", "no module 'tests.no_such'; it must be importable"),
    ],
)
def test_an_unknown_loss_is_named(name, message):
    with pytest.raises(ValueError, match=message):
        make_loss(name)
    with pytest.raises(ValueError, match="takes no options, and got temperature"):
        make_loss("tests.losses.example:make_states", temperature=2.0)


def test_other_trainers_import_torch_and_triton_alone():
    code = (
        "import sys, tokenkit.losses; sys.exit(any(x in sys.modules for x in ('transformers', 'tokenizers')))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode
        == 0
    )


@pytest.mark.parametrize("name", sorted(CROSS_TOKENIZER))
def test_heads_of_32_bits_are_cast_to_hidden_states_of_16(name):
    """What a trainer hands over under autocast."""
    batch = make_batch()
    student, teacher = make_states(batch, dtype=torch.bfloat16, head_dtype=torch.float32)
    teacher.head.weight_VD.requires_grad_(False)
    term, _ = run_loss(name, batch, student, teacher)
    term.total.sum().backward()
    assert term.total.isfinite().all()
    assert student.hidden_BTD.grad.any()


@pytest.mark.parametrize("name", ["baseline_gold", "baseline_gold_js"])
@pytest.mark.parametrize("which", ["student", "teacher"])
def test_gold_refuses_a_divided_head(which, name):
    batch = make_batch()
    states = dict(zip(("student", "teacher"), make_states(batch), strict=True))
    head = dataclasses.replace(states[which].head, shard=Shard(None, 0), vocab_size=99)
    states[which] = dataclasses.replace(states[which], head=head)
    with pytest.raises(ValueError, match=f"the {which}'s head is divided over processes: {name} "):
        run_loss(name, batch, states["student"], states["teacher"])
