"""A head whose rows are divided over 2 and 4 processes against the same head in one, in every mode.

The pieces are ragged; of four processes one holds no row, one holds padding alone beside its last rows.
Faults tried, each caught: the maximum not exchanged; sums added without rescaling; the frozen mean not
rescaled to the maximum of all; dX not added up; the subset counted from a piece's first row; a target of
another process taken for an ignored one; the target's row of another process read as one's own.
"""

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks
from tokenkit.kernels import launch
from tokenkit.kernels.linear_logprob import IGNORE, linear_logprob, plan
from tokenkit.structs import Head, Shard

N, V, D, PADDED = 9, 53, 8, 56
CUTS = {2: (0, 20, PADDED), 4: (0, 7, 7, 50, PADDED)}
MODES = {
    "statistics": 1 << 20,
    "recompute": 1 << 12,
    "cached": 1 << 30,
    "frozen": 1 << 20,
    "recompute without workspace": 0,
    "frozen without workspace": 0,
}
NAMES = ("logp", "subset_logp", "is_top1", "lse", "dhidden", "dweight", "dbias")


def inputs(dtype, subset):
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(N, D, generator=generator)
    weight = 3 * torch.randn(PADDED, D, generator=generator)
    bias = torch.randn(PADDED, generator=generator)
    target = torch.randint(V, (N,), generator=generator)
    target[:3] = torch.tensor([IGNORE, 52, 0])
    masks = {
        "none": None,
        "some": torch.rand(V, generator=generator) < 0.3,
        "few": torch.arange(V - 10) == 21,  # shorter than the head, and of one process alone
        "all": torch.ones(V, dtype=torch.bool),
    }
    upstream = torch.rand(3, N, generator=generator)
    return (hidden.to(dtype), weight.to(dtype), bias.to(dtype), target, masks[subset], upstream.to(dtype))


def call(mode, dtype, subset, shard=None, rows=slice(None)):
    """Return results and gradients of one process, those of the rows alone that it holds."""
    hidden, weight, bias, target, mask, upstream = inputs(dtype, subset)
    launch.INTERPRET = MODES[mode] == 0 and not torch.cuda.is_available()  # else there is no interpreter
    trains = not mode.startswith(("statistics", "frozen"))
    hidden.requires_grad_(mode != "statistics")
    weight, bias = (x[rows].clone().requires_grad_(trains) for x in (weight, bias))
    head = Head(weight, bias, 6.0 if mode.startswith("recompute") else None, 1.3, V, shard)
    plan.COLUMNS = (8, 8)
    result = linear_logprob(hidden, head, target, subset_V=mask, temperature=0.8, workspace_bytes=MODES[mode])
    if mode != "statistics":
        terms = (result.logp_N, result.subset_logp_N, result.lse_N)
        sum((u * x).sum() for u, x in zip(upstream, terms, strict=True) if x is not None).backward()
    values = [*result, hidden.grad, weight.grad, bias.grad]
    return {name: x.detach() for name, x in zip(NAMES, values, strict=True) if x is not None}


CASES = [
    (mode, str(dtype).split(".")[1], subset)
    for mode in MODES
    for dtype in (torch.float32, torch.float64)
    for subset in ("none", "some", "few", "all")
    if MODES[mode] or dtype == torch.float32  # float64 has the loop alone
]


def every_case(world):
    """One set of processes for all cases: starting them costs more than they do."""
    cuts = CUTS[world.world_size]
    start, end = cuts[world.rank : world.rank + 2]
    shard = Shard(dist.group.WORLD, start)
    found = [
        call(mode, getattr(torch, dtype), subset, shard, slice(start, end)) for mode, dtype, subset in CASES
    ]
    return found, refusals(start, end), compiled(start, end)


def compiled(start, end):
    """Differences of a graph from eager, in the value and in two gradients."""
    launch.INTERPRET = False
    hidden, weight, _, target, mask, _ = inputs(torch.float32, "some")
    hidden.requires_grad_()
    weight = weight[start:end].clone().requires_grad_()
    head = Head(weight, vocab_size=V, shard=Shard(dist.group.WORLD, start))

    def loss(hidden, head):
        result = linear_logprob(hidden, head, target, subset_V=mask)
        return (result.logp_N + result.subset_logp_N).sum()

    found = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        value = function(hidden, head)
        found.append([value, *torch.autograd.grad(value, (hidden, weight))])
    return [(one - other).abs().sum().item() for one, other in zip(*found, strict=True)]


def refusals(start, end):
    """What a piece of a head is refused for, in words."""
    words = []
    weight, target = torch.ones(end - start, D), torch.zeros(N, dtype=torch.long)
    for vocab_size, first in ((None, start), (V + 5, start), (V, -1)):
        try:
            head = Head(weight, vocab_size=vocab_size, shard=Shard(dist.group.WORLD, first))
            linear_logprob(torch.ones(N, D), head, target)
        except ValueError as error:
            words.append(str(error))
    return words


@pytest.fixture(scope="module", params=CUTS)
def ranks(request):
    return run_ranks(every_case, request.param)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_pieces_are_the_whole(ranks, case, monkeypatch):
    monkeypatch.setattr(plan, "COLUMNS", plan.COLUMNS)  # put back what `call` sets
    monkeypatch.setattr(launch, "INTERPRET", launch.INTERPRET)
    mode, dtype, subset = case
    whole = call(mode, getattr(torch, dtype), subset)
    pieces = [found[CASES.index(case)] for found, *_ in ranks]
    tolerance = {"rtol": 2e-5, "atol": 2e-6} if dtype == "float32" else {"rtol": 1e-12, "atol": 1e-12}
    for name, value in whole.items():
        if name in ("dweight", "dbias"):
            torch.testing.assert_close(torch.cat([piece[name] for piece in pieces]), value, **tolerance)
            assert not value[V:].any()
        else:
            for piece in pieces:
                assert torch.equal(piece[name], pieces[0][name]), f"processes differ in {name}"
                torch.testing.assert_close(piece[name], value, msg=name, **tolerance)


def test_a_shard_that_does_not_fit_is_refused_everywhere(ranks):
    for _, words, _ in ranks:
        assert "vocab_size must be the number of ids of the whole head" in words[0]
        assert f"must hold each of the {V + 5} ids once: got {PADDED} rows" in words[1]
        assert "start must be an id of at least 0: got -1" in words[2]


def test_a_graph_of_pieces_equals_eager(ranks):
    for *_, differences in ranks:
        assert max(differences) < 1e-5
