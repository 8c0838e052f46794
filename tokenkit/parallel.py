"""Processes, sharding, sums over ranks and gradient clipping. One process runs with no process group at all.

    loss of the run = Σ over ranks and micro-batches of total / Σ over ranks and micro-batches of count

Gradients are therefore added over ranks, never averaged: the divisor already counts every rank.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from tokenkit.errors import OtherRankError
from tokenkit.kernels import deferred
from tokenkit.kernels.launch import upload

Backend = Literal["nccl", "gloo"]


ON_EVERY_RANK = "is_on_every_rank"  # `tokenkit.cli` reads it, without importing torch


@dataclass(frozen=True, slots=True)
class World:
    """The processes of this run, as one of them sees them."""

    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh | None
    """One dimension, "data"; None: a single process that shards nothing and talks to nobody."""
    group: dist.ProcessGroup | None = None
    """Over which JSON travels. None: that of all, which one thread alone may use."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run's files."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """Print a line on standard error, from the rank that writes."""
        if self.is_main:
            print(text, file=sys.stderr, flush=True)

    def all_reduce(self, counts: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
        """Add each number over all ranks, and stop where ranks are not at the same step.

        A rank that skips a batch would otherwise pair its collectives with the wrong ones of the others
        for the rest of the run, silently. Flags travel here too: a sum above 0 means some rank raised it.

        Args:
            counts: tensors by name, any dtype; the same names and shapes on every rank.
            step: the step that this rank is in; below 2**26.

        Returns:
            float64 tensors on this world's device, of the shapes given.

        Raises:
            RuntimeError: ranks at different steps, on every rank; on a GPU, where nothing here waits, when
                the flags of `kernels/deferred.py` are read next.
        """
        names = sorted(counts)
        moments = (torch.full((1,), x, dtype=torch.float64, device=self.device) for x in (step, step * step))
        given = (upload(counts[name].detach(), self.device).double().flatten() for name in names)
        packed = torch.cat([*given, *moments])
        if self.mesh is not None:
            dist.all_reduce(packed, group=self.mesh.get_group())
            steps, squares = packed[-2], packed[-1]
            # the variance of integers, exact in float64: 0 only if all ranks hold the same step
            agree = self.world_size * squares == steps * steps
            message = f"step desync: rank {self.rank} is at step {step} and another rank is not"
            if packed.is_cuda:
                # the same words at every step: each message has a flag of its own
                words = "step desync: the ranks were not at the same step; look for data that one skipped"
                deferred.require(agree, words, RuntimeError)
            elif not agree:
                raise RuntimeError(
                    f"{message} (the mean is {steps.item() / self.world_size:g}): "
                    "every rank must take as many batches as the others; look for data that one rank skipped"
                )
        parts = packed[:-2].split([counts[name].numel() for name in names])
        return {name: part.reshape(counts[name].shape) for name, part in zip(names, parts, strict=True)}

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.gather(None)

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's `value` on every rank; what the others pass is ignored. Plain JSON values only."""
        return self.gather(value if self.is_main else None)[0]

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's `value`, by rank. Bytes of JSON travel: nothing is unpickled."""
        if self.mesh is None:
            return [json.loads(json.dumps(value))]
        payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([payload.numel()]), group=self.group)
        longest = int(max(sizes))
        buffers = [torch.zeros(longest, dtype=torch.uint8) for _ in sizes]
        padded = nn.functional.pad(payload, (0, longest - payload.numel()))
        dist.all_gather(buffers, padded, group=self.group)
        return [json.loads(bytes(b[: int(n)].tolist())) for b, n in zip(buffers, sizes, strict=True)]

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Run a block on every rank; where it fails on one, all ranks raise when it ends.

        The failing rank raises its own error, the others `OtherRankError` with its words. An error that every
        rank has, word for word, gets the attribute `ON_EVERY_RANK`: one of them need say it. The block must
        hold no collective: the failing rank would not take part in it.
        """
        error: OSError | ValueError | TypeError | RuntimeError | None = None
        try:
            yield
        except (OSError, ValueError, TypeError, RuntimeError) as caught:
            error = caught
        words = self.gather(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            setattr(error, ON_EVERY_RANK, len(set(words)) == 1)
            raise error
        for rank, word in enumerate(words):
            if word is not None:
                raise OtherRankError(f"rank {rank} failed to {what}: {word}", rank)


def start(
    *,
    backend: Backend | None = None,
    n_data_parallel: int | None = None,
    n_model_parallel: int = 1,
    timeout: float = 600.0,
    always_shard: bool = False,
) -> World:
    """Join the processes that torchrun started, or be the only one.

    Args:
        backend: "nccl" or "gloo"; gloo computes on CPUs. None: nccl where a GPU is, else gloo.
        n_data_parallel: ranks that share the batch; None: as many as there are processes.
        n_model_parallel: 1.
        timeout: seconds that a collective may take. Ranks arrive minutes apart while they load models.
        always_shard: build a group and a mesh for a single process too, so that FSDP2 keeps float32
            weights beside the bfloat16 ones there as well.

    Raises:
        ValueError: sizes whose product is not the number of processes, an unusable backend.
    """
    world_size, rank = (int(os.environ.get(name, default)) for name, default in _TORCHRUN_SIZES)
    if world_size > 1 and "MASTER_ADDR" not in os.environ:
        raise ValueError(f"WORLD_SIZE is {world_size} but MASTER_ADDR is not set: start with torchrun")
    _check_sizes(n_data_parallel, n_model_parallel, world_size)
    device = _device(backend)
    if world_size == 1 and not always_shard:
        return World(0, 1, device, None)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # JSON and checkpoint plans travel as CPU tensors, over gloo, whatever moves the gradients.
    backends = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    limit = timedelta(seconds=timeout)
    if "MASTER_ADDR" in os.environ:
        store = _store_of_this_start(limit)
        dist.init_process_group(backends, timeout=limit, store=store, rank=rank, world_size=world_size)
    else:
        dist.init_process_group(backends, timeout=limit, store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh(device.type, (world_size,), mesh_dim_names=("data",))
    return World(rank, world_size, device, mesh)


def _store_of_this_start(limit: timedelta) -> dist.Store:
    """Return the store where ranks find each other.

    torchrun keeps one over its restarts (`--max-restarts`), and gloo would find there the addresses of the
    processes that are gone. So each start has keys of its own; on several nodes it has not, since each
    node's torchrun counts its restarts by itself.
    """
    store, _, size = next(rendezvous("env://", timeout=limit))
    if os.environ.get("LOCAL_WORLD_SIZE") != str(size):
        return store
    return dist.PrefixStore(f"tokenkit/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


_TORCHRUN_SIZES = (("WORLD_SIZE", "1"), ("RANK", "0"))


def _check_sizes(n_data_parallel: int | None, n_model_parallel: int, world_size: int) -> None:
    if n_model_parallel > 1:
        raise ValueError(
            f"n_model_parallel must be 1, got {n_model_parallel}: "
            "larger values come with the vocabulary-parallel heads; use n_data_parallel"
        )
    data = world_size if n_data_parallel is None else n_data_parallel
    if data * n_model_parallel != world_size:
        raise ValueError(
            f"n_data_parallel ({data}) x n_model_parallel ({n_model_parallel}) must equal the number of "
            f"processes, got {world_size}: start with `torchrun --nproc-per-node {data * n_model_parallel}` "
            "or leave both out"
        )


def _device(backend: Backend | None) -> torch.device:
    if backend not in (None, "nccl", "gloo"):
        raise ValueError(f"distributed_backend must be 'nccl' or 'gloo', got {backend!r}")
    if backend == "nccl" and not torch.cuda.is_available():
        raise ValueError("distributed_backend 'nccl' needs a CUDA device and there is none: use 'gloo'")
    if backend == "gloo" or not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"local rank {local_rank} has no GPU of its own: this machine shows "
            f"{torch.cuda.device_count()}, start at most so many processes on it"
        )
    return torch.device("cuda", local_rank)


def apart(world: World, timeout: float) -> World:
    """Return the same processes as another thread speaks to them, over a group of its own.

    Every rank calls it. Its `gather`, and what is made of that, may be used beside those of `world`;
    its `all_reduce` may not.

    Args:
        world: the processes.
        timeout: seconds that the thread of another rank may keep this one's waiting.
    """
    if world.mesh is None:
        return world
    return replace(world, group=dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout)))


def stop(world: World) -> None:
    """Leave the process group, if there is one. Every rank calls it, also where an error ends the run.

    Ranks leave together: where one was gone first, another aborted at its exit in 7 of 27 runs (gloo,
    two ranks), and torchrun then fails a run that succeeded. A rank that leaves with an error waits for
    nobody.
    """
    if world.mesh is not None and dist.is_initialized():
        if sys.exception() is None:
            world.barrier()
        dist.destroy_process_group()
        # a mesh keeps its groups alive, with gloo's threads, in which 4 of 46 runs aborted at their exit
        getattr(world.mesh, "_pg_registry", {}).clear()


@contextmanager
def joined(**options: Any) -> Iterator[World]:
    """Be one of the run's processes within the block; `options` are those of `start`."""
    world = start(**options)
    try:
        yield world
    finally:
        stop(world)


def shard(
    module: nn.Module,
    layers: Iterable[nn.Module],
    world: World,
    *,
    param_dtype: torch.dtype | None = torch.bfloat16,
    reduce_dtype: torch.dtype | None = torch.float32,
    reshard_after_forward: bool = True,
    kept: Collection[nn.Parameter] = (),
    groups: Iterable[nn.Module] = (),
) -> nn.Module:
    """Shard `module` in place with FSDP2, each of `layers` gathered on its own; return it.

    Everything that `module`'s forward touches outside `layers` (embeddings, heads) is gathered while
    that forward runs, so read a head's weight inside it and nowhere else. Gradients come out added
    over ranks. Without a mesh the module stays as it is, in its own dtype.

    Args:
        module: the root; no parameter may be a scalar, FSDP2 cannot cut it.
        layers: submodules of `module`, the decoder layers of student and teacher.
        world: from `start`.
        param_dtype: dtype of compute and of the gathered weights; None: the parameters' own.
        reduce_dtype: dtype in which gradients are added over ranks; None: `param_dtype`.
        reshard_after_forward: free a layer's gathered weights between forward and backward.
        kept: parameters that stay as they are: cut over ranks in another way, or whole on each.
        groups: children of `module` whose own weights, those of no layer, are not gathered by its forward,
            but by their own or by `gather`, and stay so until `release` or the end of a backward.
    """
    if world.mesh is None:
        return module
    # The layers cast what comes in. The root does not: float32 weights in a batch stay float32.
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype)
    root_policy = MixedPrecisionPolicy(
        param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False
    )
    how: dict[str, Any] = {"mesh": world.mesh, "ignored_params": set(kept)}
    layers = list(layers)
    for layer in layers:
        fully_shard(layer, mp_policy=policy, reshard_after_forward=reshard_after_forward, **how)
    for group in groups:
        fully_shard(group, mp_policy=root_policy, reshard_after_forward=False, **how)
        first = next((part for part in group.modules() if part in layers), None)
        if isinstance(first, FSDPModule):
            # its backward would fetch what ran before the group did: another model's vocabulary
            first.set_modules_to_backward_prefetch([cast(FSDPModule, group)])
    fully_shard(module, mp_policy=root_policy, **how)
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            # gloo has no pre-multiplied sum, which a factor alone would ask for
            part.set_force_sum_reduction_for_comms(True)
    return module


def gather(group: nn.Module | None) -> None:
    """Show the whole weights of one of `shard`'s groups; nothing where it is none, or shows them."""
    if isinstance(group, FSDPModule):
        group.unshard()


def release(group: nn.Module | None) -> None:
    """Free what `gather` gathered."""
    if isinstance(group, FSDPModule):
        group.reshard()


def set_gradient_sync(module: nn.Module, is_last: bool, *, layers: Iterable[nn.Module] | None = None) -> None:
    """Add gradients over ranks in the next backward only if it is the step's last.

    Args:
        module: the root that `shard` returned.
        is_last: whether the next backward is the step's last.
        layers: those that this backward reaches, where it does not reach all: what was never gathered has no
            gradient to hold back, and FSDP2 fails where it is told to.
    """
    children = list(module.children())
    for part in module.modules() if layers is None else [module, *children, *layers]:
        if isinstance(part, FSDPModule) and any(p.requires_grad for p in part.parameters()):
            part.set_requires_gradient_sync(is_last, recurse=False)
            if part in children:  # one of `groups`: the next micro-batch reads the same weights
                part.set_reshard_after_backward(is_last, recurse=False)


def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float | None) -> Tensor:
    """Scale all gradients down to `max_norm` together; return their norm before that, float32.

    Plain tensors and DTensors may be mixed, over any number of meshes; parameters without a gradient
    are left out. Nothing waits for the device. None or 0 as `max_norm` measures only.
    """
    groups: dict[DeviceMesh | None, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            grad = parameter.grad
            groups.setdefault(grad.device_mesh if isinstance(grad, DTensor) else None, []).append(parameter)
    if not groups:
        return torch.zeros(())
    # stacking norms of different meshes is an error in torch, so each is gathered first
    norms = [
        _whole(get_total_norm([p.grad for p in group if p.grad is not None])) for group in groups.values()
    ]
    total = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device).float() for norm in norms]))
    if max_norm:
        for group in groups.values():
            clip_grads_with_norm_(group, max_norm, total)
    return total


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
