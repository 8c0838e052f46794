"""Tables cut by columns over ranks, against one rank that has all: values and every gradient.

Faults tried, each caught here: a sum of one rank's columns taken for the whole; gates of another rank's
tokens; columns that come back in another order of ranks; gradients of the tables over one rank's tokens.
"""

import pytest
import torch

from tests.kernels.test_peer_experts import case, value_and_gradients
from tests.ranks import run_ranks
from tokenkit.kernels.peer_experts import peer_experts
from tokenkit.kernels.peer_experts_columns import peer_experts_columns

N, P, E, M, D = 11, 6, 30, 2, 48


def whole(dtype=torch.float32):
    torch.manual_seed(5)
    return case((N, P, E, M, D), dtype), torch.randn(N, D)


def tokens_of(world):
    """Ranks have different numbers of tokens, and the last of three has none."""
    cuts = {1: [N], 2: [4, 7], 3: [8, 3, 0]}[world.world_size]
    begin = sum(cuts[: world.rank])
    return slice(begin, begin + cuts[world.rank])


def part(world, activation, dtype):
    (hidden, down, up, expert, gate), upstream = whole(dtype)
    mine, width = tokens_of(world), D // world.world_size
    columns = slice(world.rank * width, (world.rank + 1) * width)
    inputs = [hidden[mine], down[..., columns], up[..., columns], expert[mine], gate[mine]]
    group = world.mesh.get_group()

    def over_ranks(h, d, u, e, g, kind):
        return peer_experts_columns(h, d, u, e, g, kind, group=group)

    return value_and_gradients(over_ranks, inputs, activation, upstream[mine])


@pytest.mark.parametrize(
    ("ranks", "activation", "dtype"),
    [
        (1, "gelu", torch.float32),
        (2, "relu", torch.float32),
        (3, "silu", torch.float32),
        (2, "gelu", torch.bfloat16),
    ],
    ids=str,
)
def test_columns_over_ranks_give_what_whole_tables_give(ranks, activation, dtype):
    inputs, upstream = whole(dtype)
    truth = value_and_gradients(peer_experts, inputs, activation, upstream)
    parts = run_ranks(part, ranks, activation, dtype)
    joined = [torch.cat(found, 2 if found[0].ndim == 3 else 0) for found in zip(*parts, strict=True)]
    for got, expected in zip(joined, truth, strict=True):
        assert got.dtype == expected.dtype
        error = (got.float() - expected.float()).norm() / expected.float().norm()
        assert error < (1e-6 if dtype is torch.float32 else 1e-2)


def bad(world):
    (hidden, down, up, expert, gate), _ = whole()
    group = world.mesh.get_group()
    for arguments, words in (
        ((hidden, down[..., :-1], up, expert, gate), r"two tables \[E, M, 48 / 1\]"),
        ((hidden, down, up, expert[:3], gate), r"both be \[11, P\]"),
        ((hidden, down, up, expert, gate.half()), "gates must be torch.float32"),
        ((hidden, down, up, expert, gate, "tanh"), "expected one of gelu, relu, silu"),
    ):
        with pytest.raises(ValueError, match=words):
            peer_experts_columns(*arguments, group=group)
    return True


def test_bad_input_is_named():
    assert run_ranks(bad, 1) == [True]
