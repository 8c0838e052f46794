"""Faults that the gates of `test_parallel.py` must see: each is put in, and the agreement must break.

The gate is 1e-6, relative, of losses and gradient norms against one process; a twin that stays under 1e-4
would be a gate that sees nothing. All in one start of two ranks.
"""

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from tests import test_parallel as gates
from tests.ranks import run_ranks
from tokenkit import parallel

ALONE = parallel.World(0, 1, torch.device("cpu"), None)


def mean_over_ranks(patch):
    """FSDP2's own averaging: gradients are divided by the number of ranks once more."""
    shard = parallel.shard

    def shard_and_average(module, layers, world, **options):
        shard(module, layers, world, **options)
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.set_gradient_divide_factor(float(world.world_size))

    patch(parallel, "shard", shard_and_average)


def norm_of_own_shards(patch):
    """Each rank clips by the norm of what it holds."""
    total = parallel.get_total_norm
    patch(parallel, "get_total_norm", lambda grads: total([grad.to_local() for grad in grads]))


def shifted_targets(patch):
    """Every token is trained to be the one behind the next."""
    batch = gates.ragged_batch

    def shifted(step):
        ids, targets = batch(step)
        return ids, targets.roll(-1, dims=1)

    patch(gates, "ragged_batch", shifted)


def own_count(patch):
    """Each rank divides by the tokens of its own rows, times the ranks: a mean of means."""
    train = gates.train
    patch(gates, "train", lambda world, **options: train(world, mean_of_means=True, **options))


def untied(patch):
    """The head is a copy of the embedding."""
    make = gates.make

    def make_and_untie(tied=False, seed=3):
        model = make(tied, seed)
        model.head.weight = torch.nn.Parameter(model.head.weight.detach().clone())
        return model

    patch(gates, "make", make_and_untie)


TWINS = (mean_over_ranks, norm_of_own_shards, shifted_targets, own_count, untied)


def curves(world):
    """Return the curve of two tied steps without a fault, and with each."""
    found = [gates.train(world, steps=2, tied=True)]
    for twin in TWINS:
        with pytest.MonkeyPatch.context() as patch:
            twin(patch.setattr)
            found.append(gates.train(world, steps=2, tied=True))
    return found


def test_every_twin_turns_the_gate_red():
    alone = gates.train(ALONE, steps=2, tied=True)
    sound, *broken = run_ranks(curves, 2)[0]
    assert gates.disagreement(sound, alone).max() < 1e-6
    found = {
        twin.__name__: float(gates.disagreement(curve, alone).max())
        for twin, curve in zip(TWINS, broken, strict=True)
    }
    assert all(difference > 1e-4 for difference in found.values()), found
