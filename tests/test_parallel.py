"""Ranks agree on losses and gradients, and say so where they cannot."""

import os
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from tests.faults.registry import fault
from tests.ranks import run_ranks, start_ranks, wait_ranks
from tokenkit import parallel

VOCAB, WIDTH, IGNORE = 37, 16, -100


class Tiny(nn.Module):
    """Embedding, two residual layers, tied or untied head; its forward returns the summed loss."""

    def __init__(self, tied=False):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(2)])
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids, targets):
        hidden = self.embedding(ids)
        for layer in self.layers:
            hidden = hidden + torch.tanh(layer(hidden))
        logits = (hidden @ self.head.weight.T).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")


def make(tied=False, seed=3):
    torch.manual_seed(seed)
    return Tiny(tied)


def ragged_batch(step, rows=8, length=12):
    """Rows of very different lengths: a mean of means would be far off."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(VOCAB, (rows, length + 1), generator=generator)
    targets = ids[:, 1:].clone()
    for row in range(rows):
        targets[row, 1 + (row * 5) % length :] = IGNORE
    return ids[:, :-1], targets


def train(world, steps=3, accumulation=1, mean_of_means=False, tied=False, param_dtype=None):
    """Return [(loss, gradient norm)] of the tiny model on this world's share of fixed batches."""
    model = make(tied)
    parallel.shard(model, model.layers, world, param_dtype=param_dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    curve = []
    for step in range(steps):
        mine = [tensor.chunk(world.world_size)[world.rank] for tensor in ragged_batch(step)]
        micro = list(zip(*(tensor.chunk(accumulation) for tensor in mine), strict=True))
        count = sum((targets != IGNORE).sum() for _, targets in micro)
        counts = world.all_reduce({"tokens": count}, step)
        divisor = counts["tokens"].float()
        if mean_of_means:
            divisor = count.float() * world.world_size
        total = torch.zeros(())
        for index, (ids, targets) in enumerate(micro):
            parallel.set_gradient_sync(model, index == len(micro) - 1)
            loss = model(ids, targets) / divisor
            loss.backward()
            total += loss.detach()
        norm = parallel.clip_grad_norm(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        loss = world.all_reduce({"loss": total}, step)["loss"]
        curve.append((loss.item(), norm.item()))
    return curve


def disagreement(curve, reference):
    """Largest relative difference of losses and of gradient norms."""
    difference = (torch.tensor(curve) - torch.tensor(reference)).abs() / torch.tensor(reference).abs()
    return difference.max(0).values


@pytest.fixture(scope="module")
def reference():
    return train(parallel.World(0, 1, torch.device("cpu"), None))


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 4), (2, 1), (2, 2), (4, 1)])
def test_ranks_and_micro_batches_agree_with_one_process(world_size, accumulation, reference):
    curves = run_ranks(train, world_size, 3, accumulation)
    assert all(curve == curves[0] for curve in curves)
    assert disagreement(curves[0], reference).max() < 1e-6


def reduced_after_each_backward(world):
    model = make()
    parallel.shard(model, model.layers, world, param_dtype=None)
    reduced = []
    for is_last in (False, True):
        parallel.set_gradient_sync(model, is_last)
        model(*ragged_batch(0)).backward()
        reduced.append(all(p.grad is not None for p in model.parameters()))
    return reduced


def test_gradients_travel_once_per_step():
    assert run_ranks(reduced_after_each_backward, 2) == [[False, True]] * 2


def test_a_mean_of_means_would_be_noticed(reference):
    curve = run_ranks(train, 2, 3, 1, True)[0]
    assert disagreement(curve, reference)[1] > 1e-2


def test_tied_weights_agree_with_one_process():
    alone = train(parallel.World(0, 1, torch.device("cpu"), None), tied=True)
    curve = run_ranks(train, 2, 3, 1, False, True)[0]
    assert disagreement(curve, alone).max() < 1e-6


def test_bfloat16_compute_keeps_float32_gradients_close(reference):
    curve = run_ranks(train, 2, 3, 1, False, False, torch.bfloat16)[0]
    assert 0 < disagreement(curve, reference).max() < 3e-2


def mixed_norm(world):
    """Clip a model that has plain parameters, and DTensors of two meshes; one has no gradient."""
    pairs = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(6, 5, generator=generator) for _ in range(3)]
    grads = [torch.randn(6, 5, generator=generator) for _ in range(3)]

    def place(tensor, index):
        if index == 0:
            return tensor.clone()
        mesh = world.mesh if index == 1 else pairs
        return distribute_tensor(tensor, mesh, [Shard(0)] * mesh.ndim)

    parameters = [nn.Parameter(place(value, index)) for index, value in enumerate(values)]
    for index, parameter in enumerate(parameters):
        parameter.grad = place(grads[index], index)
    parameters.append(nn.Parameter(torch.ones(3)))
    norm = parallel.clip_grad_norm(parameters, 1.0)
    whole = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in parameters[:3]]
    return norm, torch.stack(whole), torch.stack(grads)


def test_clipping_spans_plain_tensors_and_two_meshes():
    for norm, clipped, grads in run_ranks(mixed_norm, 4):
        torch.testing.assert_close(norm, grads.norm(), rtol=1e-6, atol=0)
        torch.testing.assert_close(clipped, grads / grads.norm(), rtol=1e-5, atol=1e-7)


def test_gradients_below_the_limit_are_left_alone():
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    assert parallel.clip_grad_norm([parameter], 10.0) == 5.0
    assert parameter.grad.tolist() == [3.0, 4.0]


def test_no_limit_measures_only():
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    assert parallel.clip_grad_norm([parameter], None) == 5.0
    assert parallel.clip_grad_norm([parameter], 0.0) == 5.0
    assert parameter.grad.tolist() == [3.0, 4.0]


def test_a_model_without_gradients_has_norm_zero():
    assert parallel.clip_grad_norm([nn.Parameter(torch.ones(2))], 1.0) == 0


def desynchronised(world):
    steps = [7, 9, 8, 8][world.rank]  # ranks 2 and 3 stand exactly at the mean
    with pytest.raises(RuntimeError, match=f"rank {world.rank} is at step {steps} and another rank is not"):
        world.all_reduce({"tokens": torch.tensor(5)}, steps)
    return True


@fault(
    "A rank skips a batch, or takes one more",
    "every rank stops at that step",
    code=1,
    kept="the last checkpoint",
)
def test_a_rank_at_another_step_stops_every_rank():
    assert all(run_ranks(desynchronised, 4))


def exchange(world):
    counts = world.all_reduce(
        {"tokens": torch.tensor(world.rank), "big": torch.tensor(2**53 - 8 if world.rank == 0 else 1)}, 2**25
    )
    everyone = world.gather({"rank": world.rank, "text": "é" * world.rank})
    told = world.broadcast({"from": world.rank})
    world.barrier()
    return {name: int(count) for name, count in counts.items()}, everyone, told


@pytest.mark.parametrize("world_size", [1, 3])
def test_counts_are_exact_and_json_reaches_everyone(world_size):
    for counts, everyone, told in run_ranks(exchange, world_size):
        assert counts == {"tokens": sum(range(world_size)), "big": 2**53 - 8 + world_size - 1}
        assert everyone == [{"rank": rank, "text": "é" * rank} for rank in range(world_size)]
        assert told == {"from": 0}


def fail_on_rank_1(world):
    with world.together("save"):
        if world.rank == 1:
            raise OSError("disk is full")


def one_fails(world):
    kind, words = (
        (OSError, "disk is full") if world.rank == 1 else (parallel.OtherRankError, "rank 1 failed to save")
    )
    with pytest.raises(kind, match=words):
        fail_on_rank_1(world)
    with world.together("go on"):
        pass
    return True


def test_where_one_rank_fails_all_raise_and_can_go_on():
    assert all(run_ranks(one_fails, 2))


def fail(world, words):
    with pytest.raises(ValueError, match="missing") as caught, world.together("read"):
        raise ValueError(words[world.rank])
    return getattr(caught.value, parallel.ON_EVERY_RANK)


@pytest.mark.parametrize(
    ("words", "is_on_every_rank"), [(["missing x"] * 2, True), (["missing x", "missing y"], False)]
)
def test_an_error_that_all_ranks_have_word_for_word_is_marked(words, is_on_every_rank):
    assert run_ranks(fail, 2, words) == [is_on_every_rank] * 2


def waits_for_a_rank_that_hangs(world):
    if world.rank == 1:
        time.sleep(3)
        raise SystemExit(0)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?i)tim(ed|e) ?out"):
        world.barrier()
    raise SystemExit(0 if 0.5 < time.monotonic() - start < 2.8 else 3)


def test_a_rank_that_hangs_is_noticed_after_the_timeout():
    assert wait_ranks(start_ranks(waits_for_a_rank_that_hangs, 2, collective_timeout=1.0)) == [0, 0]


def leaves_with_an_error(world):
    if world.rank == 0:
        time.sleep(3)  # another rank at work
        return 0.0
    start = time.monotonic()
    try:
        raise ValueError("this rank failed")
    except ValueError:
        parallel.stop(world)
    return time.monotonic() - start


def test_a_rank_that_leaves_with_an_error_waits_for_nobody():
    ranks = start_ranks(leaves_with_an_error, 2)
    while not (ranks.folder / "1.pt").exists():
        assert os.waitpid(ranks.pids[0], os.WNOHANG)[0] == 0, "rank 1 waited for rank 0"
        time.sleep(0.01)
    wait_ranks(ranks)


def shards_alone(world):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    alone = parallel.start(backend="gloo", always_shard=True)
    curve = train(alone)
    model = parallel.shard(make(), [], alone, param_dtype=torch.bfloat16)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    parallel.stop(alone)
    return curve


def test_a_single_process_may_shard_with_itself_and_needs_no_address(reference):
    assert disagreement(run_ranks(shards_alone, 1, always_shard=False)[0], reference).max() < 1e-6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"n_data_parallel": 3},
            r"n_data_parallel \(3\) x n_model_parallel \(1\).*got 2.*--nproc-per-node 3",
        ),
        ({"n_model_parallel": 2}, "vocabulary-parallel heads"),
        ({"backend": "mpi"}, "'nccl' or 'gloo', got 'mpi'"),
        pytest.param(
            {"backend": "nccl"},
            "needs a CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_sizes_and_backends_that_cannot_work_are_refused(arguments, message, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(ValueError, match=message):
        parallel.start(**arguments)


def test_many_processes_without_an_address_are_told_to_use_torchrun(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ValueError, match="torchrun"):
        parallel.start(backend="gloo")
