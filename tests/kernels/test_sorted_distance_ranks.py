"""A vocabulary divided over 2 and 4 processes gives the distance and the gradients of one process."""

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks
from tokenkit.kernels.sorted_distance import rows as sorted_rows
from tokenkit.kernels.sorted_distance import sorted_distance
from tokenkit.structs import Head, Shard

N, D, V, W, PADDED = 7, 6, 53, 41, 56
CUTS = {2: (0, 20, PADDED), 4: (0, 7, 7, 53, PADDED)}
"""Ragged pieces of the student's rows; of four, one holds none and one padding alone."""
TEACHER_CUTS = {2: (0, 40, PADDED), 4: (0, 1, 30, 40, PADDED)}
CASES = [
    ("values", "float32", "both"),
    ("values", "float64", "teacher"),
    ("formed", "float64", "both"),
    ("formed", "float32", "student"),
    ("formed", "float64", "teacher"),
    ("tables", "float32", "both"),
    ("tables", "float64", "student"),
    ("frozen", "float64", "both"),
]


def call(case, cuts=None, teacher_cuts=None, rank=0):
    """Return value and gradients of a case: of one process, or of the rows that `rank` holds."""
    mode, dtype, divided = case
    generator = torch.Generator().manual_seed(3)

    def states(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(getattr(torch, dtype))

    hidden, weight, bias = states(N, D), states(PADDED, D), states(PADDED)
    teacher, teacher_weight, teacher_bias, upstream = (
        states(N, D),
        states(PADDED, D),
        states(PADDED),
        states(N),
    )
    shard = other = None
    if cuts is not None and divided != "teacher":
        shard = Shard(dist.group.WORLD, cuts[rank])
        weight, bias = (x[cuts[rank] : cuts[rank + 1]].clone() for x in (weight, bias))
    if teacher_cuts is not None and divided != "student":
        other = Shard(dist.group.WORLD, teacher_cuts[rank])
        rows = slice(teacher_cuts[rank], teacher_cuts[rank + 1])
        teacher_weight, teacher_bias = teacher_weight[rows], teacher_bias[rows]
    if mode != "values":
        hidden.requires_grad_()
    for x in (weight, bias):
        x.requires_grad_(mode in ("formed", "tables"))
    value = sorted_distance(
        hidden,
        Head(weight, bias, 4.0, 1.3, V, shard),
        teacher,
        Head(teacher_weight, teacher_bias, 5.0, 0.8, W, other),
        temperature=0.9,
        exact=False,  # as ranks do
        workspace_bytes=3 * sorted_rows.HISTOGRAM_BYTES + 2000,  # several chunks
        row_weight_N=upstream if mode == "formed" else None,
    )
    if mode != "values":
        (value * (2 if mode == "formed" else upstream)).sum().backward()
    return [x if x is None else x.detach() for x in (value, hidden.grad, weight.grad, bias.grad)]


def divided(world):
    cuts, teacher_cuts = CUTS[world.world_size], TEACHER_CUTS[world.world_size]
    results = [call(case, cuts, teacher_cuts, world.rank) for case in CASES]
    messages = []
    shard = Shard(dist.group.WORLD, 4 * world.rank)
    whole, piece = Head(torch.ones(8, 2)), Head(torch.ones(4, 2), vocab_size=8, shard=shard)
    gap = Head(torch.ones(4, 2), vocab_size=4 * world.world_size + 1, shard=shard)
    for heads, exact in (((piece, whole), True), ((whole, piece), True), ((gap, whole), False)):
        try:
            sorted_distance(torch.ones(3, 2), heads[0], torch.ones(3, 2), heads[1], exact=exact)
        except ValueError as error:
            messages.append(str(error))
    return {"results": results, "messages": messages}


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_divided_vocabulary_equals_the_whole(ranks):
    expected = [call(case) for case in CASES]
    outcomes = run_ranks(divided, ranks)
    cuts = CUTS[ranks]
    for rank, outcome in enumerate(outcomes):
        assert ["gather it" in message for message in outcome["messages"]] == [True, True, False]
        assert "each of the" in outcome["messages"][2]
        for case, found, truth in zip(CASES, outcome["results"], expected, strict=True):
            rows = slice(0, PADDED) if case[2] == "teacher" else slice(cuts[rank], cuts[rank + 1])
            tolerance = 1e-12 if case[1] == "float64" else 2e-6
            for i, (one, other) in enumerate(zip(found, truth, strict=True)):
                assert (one is None) == (other is None)
                if other is None:
                    continue
                other = other[rows] if i >= 2 else other
                torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, msg=f"{case} {i}")
