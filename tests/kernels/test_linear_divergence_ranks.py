"""A vocabulary divided over 2 and 4 processes gives what one process gives."""

import pytest
import torch

from tests.kernels.divergence_cases import index_set, make
from tests.ranks import run_ranks
from tokenkit.kernels.linear_divergence import KINDS, linear_divergence
from tokenkit.structs import Head, Shard

N, V, W = 5, 41, 47
CUTS = {2: [0, 17, 46], 4: [0, 1, 20, 42, 46]}
"""Ragged shards of V + 5 rows; the last of four holds padding alone."""


def cases():
    """Yield (kind, index set, mode), and whether the teacher's head is divided too."""
    for kind in KINDS:
        yield kind, "identity", "recompute", True
        yield kind, "rest", "rows" if kind in ("kl", "akl") else "weighted", False
    yield "kl", "identity", "weighted", False
    yield "js", "map", "recompute", False
    yield "skl", "pairs", "recompute", False
    yield "akl", "ties", "recompute", True


def one(case, shard=None, rows=slice(None)):
    """Return value and gradients of a case; `rows`: which rows of the head are here."""
    kind, outcomes, mode, divided = case
    torch.manual_seed(3)
    size = V if outcomes in ("identity", "ties") else W
    inputs = make(N, V, size, padding=5)
    student, weight, bias, teacher, teacher_weight, teacher_bias, upstream = (x.double() for x in inputs)
    if outcomes == "ties":  # every teacher token is as likely as the others
        teacher_weight, teacher_bias = 0 * teacher_weight, 0 * teacher_bias
    options = index_set(outcomes if outcomes != "ties" else "identity", V, size)
    weight, bias = weight[rows].clone(), bias[rows].clone()
    if divided:
        teacher_weight, teacher_bias = teacher_weight[rows], teacher_bias[rows]
    trained = [student, teacher] if mode == "rows" else [student, teacher, weight, bias]
    for x in trained:
        x.requires_grad_()
    if mode == "weighted":
        options["row_weight_N"] = upstream
    student_head = Head(weight, bias, softcap=3.0, vocab_size=V, shard=shard)
    teacher_head = Head(
        teacher_weight, teacher_bias, softcap=4.0, vocab_size=size, shard=shard if divided else None
    )
    value = linear_divergence(
        student, student_head, teacher, teacher_head, kind, temperature=1.5, workspace_bytes=2000, **options
    )
    total = value if mode == "weighted" else (value * upstream).sum()
    return value.detach(), *torch.autograd.grad(total, trained)


def divided(world):
    cuts = CUTS[world.world_size]
    shard = Shard(torch.distributed.group.WORLD, cuts[world.rank])
    rows = slice(cuts[world.rank], cuts[world.rank + 1])
    results = [one(case, shard, rows) for case in cases()]
    failures = []
    heads = [Head(torch.zeros(4, 2), vocab_size=8, shard=Shard(shard.group, 4 * r)) for r in (0, 1)]
    mine, other = heads[world.rank % 2], heads[1 - world.rank % 2]
    if world.world_size == 2:
        for index, teacher_head in (({}, other), ({"teacher_index": torch.arange(8)}, mine)):
            try:
                linear_divergence(torch.zeros(3, 2), mine, torch.zeros(3, 2), teacher_head, **index)
            except ValueError as error:
                failures.append(str(error))
    return {"results": results, "failures": failures}


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_divided_vocabulary_gives_what_one_process_gives(ranks):
    found = run_ranks(divided, ranks)
    for i, case in enumerate(cases()):
        value, dstudent, dteacher, *dhead = one(case)
        for rank in found:
            torch.testing.assert_close(rank["results"][i][0], value, msg=f"{case} value")
            torch.testing.assert_close(rank["results"][i][1], dstudent, msg=f"{case} dstudent")
            torch.testing.assert_close(rank["results"][i][2], dteacher, msg=f"{case} dteacher")
        for k, gradient in enumerate(dhead):
            joined = torch.cat([rank["results"][i][3 + k] for rank in found])
            torch.testing.assert_close(joined, gradient, msg=f"{case} head {k}")
    if ranks == 2:
        for rank in found:
            assert "hold the same ids" in rank["failures"][0]
            assert "teacher_head.shard must be None where teacher_index is given" in rank["failures"][1]
