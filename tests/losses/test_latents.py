"""Hidden states against each other: layers that face each other, projections, normalisers.

Faults tried, each caught here or by the reference values: the norm instead of its square; normalised by the
student; the mean over channels left out; layers paired from the bottom; a projection of the wrong layer; the
mean over layers left out.
"""

import dataclasses

import pytest
import torch

from tests.losses.example import make_batch, make_states
from tokenkit.losses import latents_loss
from tokenkit.losses.latents import Latents, facing_layer
from tokenkit.losses.options import LatentsOptions
from tokenkit.losses.score import chunk_ends
from tokenkit.structs import Chunks, Widths


def with_layers(batch, student_layers=2, teacher_layers=4, width=6):
    student, teacher = make_states(batch)
    torch.manual_seed(5)
    found = []
    for states, layers, wide in ((student, student_layers, 6), (teacher, teacher_layers, width)):
        shape = (*states.hidden_BTD.shape[:2], wide)
        latents = [torch.randn(shape).double().requires_grad_() for _ in range(3 * layers)]
        qkv = tuple(tuple(latents[3 * i : 3 * i + 3]) for i in range(layers))
        found.append(dataclasses.replace(states, layers_BTD=tuple(latents[:layers]), qkv=qkv))
    return found


@pytest.mark.parametrize(
    ("student_layers", "teacher_layers", "facing"),
    [
        (2, 2, [0, 1]),
        (2, 4, [1, 3]),
        (4, 2, [0, 0, 1, 1]),
        (3, 4, [1, 2, 3]),
        (2, 3, [1, 2]),
        (1, 5, [4]),
    ],
)
def test_layers_face_the_same_relative_depth(student_layers, teacher_layers, facing):
    assert [facing_layer(i, student_layers, teacher_layers) for i in range(student_layers)] == facing


def test_every_layer_counts_alike():
    batch = make_batch()
    student, teacher = with_layers(batch)
    whole = latents_loss(student, teacher, batch, align="all_hidden_states")
    alone = [
        latents_loss(
            dataclasses.replace(student, hidden_BTD=student.layers_BTD[i]),
            dataclasses.replace(teacher, hidden_BTD=teacher.layers_BTD[j]),
            batch,
        )
        for i, j in ((0, 1), (1, 3))
    ]
    assert whole.count == alone[0].count == len(chunk_ends(batch, "unconstrained").student_N)
    torch.testing.assert_close(whole.total, (alone[0].total + alone[1].total) / 2)
    whole.total.backward()
    assert all(layer.grad.any() for layer in student.layers_BTD)
    assert all(layer.grad is None for layer in teacher.layers_BTD)


def test_queries_face_queries_and_keys_keys():
    batch = make_batch()
    student, teacher = with_layers(batch, 1, 1)
    same = dataclasses.replace(teacher, qkv=(tuple(part.detach() for part in student.qkv[0]),) * 1)
    chunks = batch.chunks["unconstrained"]
    mirrored = dataclasses.replace(
        batch,
        teacher=batch.student,
        chunks={"unconstrained": dataclasses.replace(chunks, teacher_BS=chunks.student_BT)},
    )
    assert latents_loss(student, same, mirrored, align="qkv").total == 0
    turned = dataclasses.replace(same, qkv=(same.qkv[0][::-1],))
    assert latents_loss(student, turned, mirrored, align="qkv").total > 0


def test_projections_bridge_widths_that_differ():
    batch = make_batch()
    student, teacher = with_layers(batch, width=9)
    widths = Widths(6, 6, 2, (6, 6, 6)), Widths(9, 9, 4, (9, 6, 9))
    options = LatentsOptions(align="all_hidden_states", project=True)
    projections = Latents(options).modules(*widths).double()
    assert {name: tuple(p.weight.shape) for name, p in projections.items()} == {"0": (9, 6), "1": (9, 6)}
    term = latents_loss(student, teacher, batch, modules=projections, align="all_hidden_states")
    term.total.backward()
    assert all(p.grad.any() for p in projections.parameters())

    qkv = Latents(dataclasses.replace(options, align="qkv")).modules(*widths)
    assert sorted(qkv) == ["0", "2", "3", "5"]  # keys are as wide on both sides
    with pytest.raises(ValueError, match="6 wide and the teacher's 9: set latents_do_project"):
        Latents(LatentsOptions(align="all_hidden_states")).modules(*widths)
    with pytest.raises(ValueError, match="6 wide and the teacher's 9"):
        latents_loss(student, teacher, batch, align="all_hidden_states")
    assert Latents(LatentsOptions(project=True)).modules(widths[0], Widths(6, 6, 9)) is None


def test_what_was_not_collected_is_named():
    batch = make_batch()
    student, teacher = make_states(batch)
    with pytest.raises(ValueError, match=r"the teacher's HiddenStates hold none.*\['layers'\]"):
        latents_loss(student, teacher, batch, align="all_hidden_states")
    with pytest.raises(ValueError, match="not known"):
        Latents(LatentsOptions(align="qkv")).modules(Widths(6, 6, 2), Widths(6, 6, 2))
    assert Latents(LatentsOptions(align="qkv")).states == {"qkv"}


@pytest.mark.parametrize("normalization", ["l1", "l2", "l1_channelwise", "l2_channelwise"])
def test_the_scale_of_both_models_does_not_matter(normalization):
    batch = make_batch()
    student, teacher = make_states(batch)
    scaled = [dataclasses.replace(x, hidden_BTD=x.hidden_BTD.detach() * 7) for x in (student, teacher)]
    before = latents_loss(student, teacher, batch, normalization=normalization)
    after = latents_loss(*scaled, batch, normalization=normalization)
    torch.testing.assert_close(before.total.detach(), after.total)


def test_a_channel_that_is_always_zero_divides_by_nothing():
    batch = make_batch()
    student, teacher = make_states(batch)
    with torch.no_grad():
        teacher.hidden_BTD[..., 2] = 0
    assert latents_loss(student, teacher, batch).total.isfinite()


@pytest.mark.parametrize("normalization", ["l1", "l2", "l1_channelwise", "l2_channelwise"])
def test_parts_of_a_step_divide_by_the_scale_of_the_whole(normalization):
    batch = make_batch()
    student, teacher = make_states(batch)
    loss = Latents(LatentsOptions(normalization=normalization))
    whole = latents_loss(student, teacher, batch, normalization=normalization)
    measured, total = [], 0
    for row in range(2):
        states = [dataclasses.replace(x, hidden_BTD=x.hidden_BTD[[row]]) for x in (student, teacher)]
        sides = {}
        for name in ("student", "teacher"):
            side = getattr(batch, name)
            cut = {field: getattr(side, field)[[row]] for field in ("ids_BT", "length_B", "trained_BT")}
            sides[name] = dataclasses.replace(side, **cut)
        chunks = batch.chunks["unconstrained"]
        part = dataclasses.replace(
            batch,
            **sides,
            chunks={"unconstrained": Chunks(chunks.student_BT[[row]], chunks.teacher_BS[[row]])},
        )
        measured.append((states[0], part, loss.measure(states[1], part)))
    sums = measured[0][2].sum_K + measured[1][2].sum_K
    for states, part, one in measured:
        prepared = loss.settle(one, sums, part)
        total = total + loss.loss(states, prepared, part).total
    torch.testing.assert_close(total, whole.total)
    assert sums[0] == whole.count


def test_latents_that_are_not_finite_are_named():
    for side in ("student", "teacher"):
        batch = make_batch()
        states = dict(zip(("student", "teacher"), make_states(batch), strict=True))
        with torch.no_grad():
            states[side].hidden_BTD[..., 1] = torch.inf
        with pytest.raises(
            ValueError, match=f"the {side}'s latents at the ends of chunks must be finite: row 0"
        ):
            latents_loss(*states.values(), batch)
