"""The gradient of one optimizer step: which passes it takes, and in which order.

    weights stand          forward, backward for each micro-batch
    weights need losses    one micro-batch: forward, sum over ranks, backward;
                           several: a pass without gradients over all of them first
    last layer             one micro-batch in one process: forward, one backward per loss that ends at the
                           last layer, one backward through everything;
                           otherwise a pass whose graph begins at the last layer comes first
    gradients              forward, one backward per loss; each loss' gradient is held until all are there

Losses, norms and inner products are always those of the whole step: all ranks, all micro-batches.

Dimensions: J losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tokenkit.objective.aggregation import norms
from tokenkit.objective.weights import Needs, Objective
from tokenkit.parallel import World, set_gradient_sync
from tokenkit.structs import Batch
from tokenkit.training.requests import StudentHalf, ask

LONGEST_DOT = 2**30  # elements; BLAS counts in 32 bits

Gradient = list[Tensor | None]
"""One tensor per parameter, this rank's shard; None where nothing arrived."""


@dataclass(frozen=True, kw_only=True)
class Passes:
    """What the passes of one step read."""

    model: nn.Module
    """`Distillation`."""
    objective: Objective
    world: World
    step: int
    scale: float
    """Multiplies every loss that is differentiated: the loss scale of float16."""
    batches: Sequence[Batch]
    """This rank's micro-batches, on its device."""
    prepared: Sequence[dict[str, Any]]
    """What the teacher's half returned for each of them."""
    counts: dict[str, Tensor]
    """By loss, of the whole step."""
    layers: Sequence[nn.Module] | None = None
    """Those that a prefix stage runs; None: all."""

    def means(self, index: int, *, from_last_layer: bool = False, is_last: bool = True) -> list[Tensor]:
        """Return the share of each loss that micro-batch `index` holds, differentiable.

        Args:
            index: of the micro-batch.
            from_last_layer: the graph begins there.
            is_last: gradients are added over ranks in the backward that follows.
        """
        batch, is_prefix = self.batches[index], self.layers is not None
        set_gradient_sync(self.model, is_last, layers=self.layers)
        terms = ask(self.model, StudentHalf(batch, self.prepared[index], is_prefix, from_last_layer))
        self._check_counts(terms, self.prepared[index])
        return self.objective.means(terms, self.counts)

    def _check_counts(self, terms: dict[str, Any], prepared: dict[str, Any]) -> None:
        """Compare counts of users' own losses; ours agree by construction, and a look would make us wait."""
        for name in (name for name in self.objective.names if ":" in name):
            got, expected = (torch.as_tensor(x[name].count).tolist() for x in (terms, prepared))
            if got != expected:
                raise ValueError(
                    f"loss {name!r} sums over {got} things, but {expected} were announced before the student "
                    "ran: give the function an attribute `count(teacher, batch)` that returns its count"
                )


@dataclass(frozen=True, slots=True)
class Sums:
    """What the passes found besides the gradients, which lie in `.grad`, times the loss scale."""

    mean_J: Tensor
    """This rank's share of each loss, nats."""
    weight_J: Tensor
    """float64, what multiplied the gradient of each loss; the same on every rank."""
    norm_J: Tensor
    """float64, norms of the gradients that were compared, before weights; 0 where none were."""
    shares: dict[str, float] = field(default_factory=dict)
    """Each loss's part in the sum of the norms of the gradients, weights included; where asked for."""


def accumulate(passes: Passes, *, with_shares: bool = False) -> Sums:
    """Leave the gradient of the whole step in `.grad`, and return what was found on the way.

    Args:
        passes: of the step; no parameter has a gradient.
        with_shares: compare the losses' gradients first, where the run does not itself see to the balance.

    Raises:
        ValueError: no trained parameter in the last layer, or a loss that does not reach it, where
            gradients are compared there.
    """
    needs = passes.objective.needs()
    with_shares = with_shares and len(passes.objective.names) > 1 and needs in ("nothing", "losses")
    shares = _shares(passes) if with_shares else {}
    return replace(_accumulate(passes, needs), shares=shares)


def _accumulate(passes: Passes, needs: Needs) -> Sums:
    if needs == "gradients":
        return _one_by_one(passes)
    alone = len(passes.batches) == 1
    if needs == "last_layer":
        if alone and passes.world.mesh is None:
            return _last_layer_within(passes)
        gram_JJ = _last_layer_before(passes)
        loss_J = gram_JJ.new_zeros(len(gram_JJ))
        weight_J = passes.objective.join(passes.objective.weigh(passes.step, loss_J), gram_JJ, passes.step)
        return Sums(_weighted(passes, weight_J), weight_J, norms(gram_JJ))
    if needs == "losses" and alone:
        return _losses_within(passes)
    J = len(passes.objective.names)
    loss_J = torch.zeros(J, device=passes.world.device)
    if needs == "losses":
        loss_J = _losses_before(passes)
    weight_J = passes.objective.weigh(passes.step, loss_J)
    return Sums(_weighted(passes, weight_J), weight_J, torch.zeros_like(weight_J))


def _shares(passes: Passes) -> dict[str, float]:
    """Compare gradients on the first micro-batch: one forward, one backward per loss; nothing stays."""
    names, device = passes.objective.names, passes.world.device
    squares = []
    with _same_random(device):
        means = passes.means(0)
        weight_J = passes.objective.weigh(passes.step, _over_ranks(_detached(means), passes))
        for j, mean in enumerate(means):
            _backward(mean, passes.scale, keeps_graph=j < len(means) - 1)
            parts = [torch.zeros((), dtype=torch.float64, device=device)]
            for parameter in trained_parameters(passes.model):
                grad, parameter.grad = parameter.grad, None
                parts += [] if grad is None else [_dot(grad, grad, passes.world)]
            squares.append(torch.stack(parts).sum())
    norm_J = _over_ranks(torch.stack(squares), passes).sqrt() * weight_J.to(device)
    total = float(norm_J.sum())
    return {
        name: norm / total for name, norm in zip(names, norm_J.tolist(), strict=True) if 0 < total < math.inf
    }


def _weighted(passes: Passes, weight_J: Tensor) -> Tensor:
    """Forward and backward of every micro-batch, with weights that stand; return this rank's losses."""
    total_J = torch.zeros(len(weight_J), device=passes.world.device)
    for index in range(len(passes.batches)):
        means = passes.means(index, is_last=index == len(passes.batches) - 1)
        _backward(_weighed(means, weight_J), passes.scale)
        total_J += _detached(means)
    return total_J


def _weighed(means: list[Tensor], weight_J: Tensor) -> Tensor:
    mean_J = torch.stack(means)
    return (mean_J * weight_J.to(mean_J.dtype)).sum()


def _backward(loss: Tensor, scale: float, *, keeps_graph: bool = False) -> None:
    (loss * scale).backward(retain_graph=keeps_graph)


def _detached(means: list[Tensor]) -> Tensor:
    return torch.stack([mean.detach() for mean in means])


def _losses_within(passes: Passes) -> Sums:
    """Between forward and backward of the only micro-batch, sum its losses over ranks."""
    means = passes.means(0)
    weight_J = passes.objective.weigh(passes.step, _over_ranks(_detached(means), passes))
    _backward(_weighed(means, weight_J), passes.scale)
    return Sums(_detached(means), weight_J, torch.zeros_like(weight_J))


def _losses_before(passes: Passes) -> Tensor:
    """Run all micro-batches once without gradients; the same dropout masks come again afterwards."""
    with torch.no_grad(), _same_random(passes.world.device):
        total_J = sum(_detached(passes.means(index)) for index in range(len(passes.batches)))
    assert isinstance(total_J, Tensor)
    return _over_ranks(total_J, passes)


def _over_ranks(loss_J: Tensor, passes: Passes) -> Tensor:
    local = {name: loss_J[j] for j, name in enumerate(passes.objective.names)}
    sums = passes.world.all_reduce(local, passes.step)
    return torch.stack([sums[name] for name in passes.objective.names])


def _same_random(device: torch.device) -> Any:
    """Put the generators back afterwards: a pass that is repeated draws the same numbers again."""
    return torch.random.fork_rng([device.index or 0] if device.type == "cuda" else [])


def _one_by_one(passes: Passes) -> Sums:
    """Hold the gradient of each loss over the whole step, then join them."""
    held: list[Gradient] = [[] for _ in passes.objective.names]
    total_J = torch.zeros(len(held), device=passes.world.device)
    for index in range(len(passes.batches)):
        means = passes.means(index)
        _collect(passes, means, partial(trained_parameters, passes.model), held)
        total_J += _detached(means)
    gram_JJ = _gram(held, passes)
    weight_J = passes.objective.weigh(passes.step, _over_ranks(total_J, passes))
    weight_J = passes.objective.join(weight_J, gram_JJ, passes.step)
    for i, parameter in enumerate(trained_parameters(passes.model)):
        parameter.grad = _combine([gradient[i] for gradient in held], weight_J)
    return Sums(total_J, weight_J, norms(gram_JJ))


def _collect(
    passes: Passes, means: list[Tensor], parameters: Callable[[], list[Tensor]], held: list[Gradient]
) -> None:
    """Add the gradient of each loss to what is held of it; one graph, one backward per loss.

    Each backward adds over ranks: what stays unreduced from one to the next would mix the losses. The
    parameters are asked for after it: before, FSDP2's root still shows its whole weights.
    """
    for j, mean in enumerate(means):
        _backward(mean, passes.scale, keeps_graph=j < len(means) - 1)
        for i, parameter in enumerate(parameters()):
            if i == len(held[j]):
                held[j].append(None)
            grad, parameter.grad = parameter.grad, None
            if grad is not None:
                before = held[j][i]
                held[j][i] = grad if before is None else before.add_(grad)


def _combine(gradients: list[Tensor | None], weight_J: Tensor) -> Tensor | None:
    """Return Σ_j weight_j gradient_j, in the memory of the first one."""
    total = None
    for gradient, weight in zip(gradients, weight_J, strict=True):
        if gradient is None:
            continue
        local = _local(gradient)
        local.mul_(weight.to(local.dtype))
        if total is None:
            total = gradient
        else:
            _local(total).add_(local)
    return total


def _last_layer_within(passes: Passes) -> Sums:
    """One process, one micro-batch: backward passes that stop at the last layer, then the whole one."""
    parameters = last_layer_parameters(passes.model)
    means = passes.means(0)
    held: list[Gradient] = [
        list(torch.autograd.grad(mean * passes.scale, parameters, retain_graph=True, allow_unused=True))
        for mean in means
    ]
    gram_JJ = _gram(held, passes)
    weight_J = passes.objective.weigh(passes.step, _detached(means))
    weight_J = passes.objective.join(weight_J, gram_JJ, passes.step)
    _backward(_weighed(means, weight_J), passes.scale)
    return Sums(_detached(means), weight_J, norms(gram_JJ))


def _last_layer_before(passes: Passes) -> Tensor:
    """Return the inner products at the last layer, from a pass whose graph begins there."""
    held: list[Gradient] = [[] for _ in passes.objective.names]
    parameters = partial(last_layer_parameters, passes.model)
    with _same_random(passes.world.device):
        for index in range(len(passes.batches)):
            _collect(passes, passes.means(index, from_last_layer=True), parameters, held)
    passes.model.zero_grad(set_to_none=True)  # of the final norm
    return _gram(held, passes)


def trained_parameters(module: nn.Module) -> list[Tensor]:
    """Return the parameters that are trained; under FSDP2 this rank's shards, once a backward has ended."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def last_layer_parameters(model: nn.Module) -> list[Tensor]:
    """Return the trained parameters of the student's last transformer layer.

    Raises:
        ValueError: there are none.
    """
    layer = getattr(model, "last_layer", None)
    parameters = [] if layer is None else trained_parameters(layer)
    if not parameters:
        raise ValueError(
            "multitask_aggregation_fn compares gradients in the last transformer layer, and nothing in it is "
            "trained: train it (train_model_mode, model_lora_layers), or use gradmag, gradclip:MAX or pcgrad"
        )
    return parameters


def _gram(held: Sequence[Gradient], passes: Passes) -> Tensor:
    """Return the inner products of the losses' gradients over all shards, float64, without the loss scale.

    Raises:
        ValueError: a loss reaches none of the parameters.
    """
    J = len(held)
    for name, gradient in zip(passes.objective.names, held, strict=True):
        if all(grad is None for grad in gradient):
            raise ValueError(
                f"loss {name} sends no gradient to the student's layers: losses cannot be compared there, "
                "use gradmag, gradclip:MAX or pcgrad as multitask_aggregation_fn"
            )
    products = {}
    for i in range(J):
        for j in range(i, J):
            pairs = [(a, b) for a, b in zip(held[i], held[j], strict=True) if a is not None and b is not None]
            parts = [_dot(a, b, passes.world) for a, b in pairs]
            products[f"{i},{j}"] = torch.stack(parts).sum() if parts else torch.zeros(())
    sums = passes.world.all_reduce(products, passes.step)
    rows = [[sums[f"{min(i, j)},{max(i, j)}"] for j in range(J)] for i in range(J)]
    return torch.stack([torch.stack(row) for row in rows]) / passes.scale**2


def _dot(left: Tensor, right: Tensor, world: World) -> Tensor:
    """Return this rank's part of an inner product; ranks that hold the same piece share it."""
    copies = world.world_size
    if isinstance(left, DTensor):
        for size, placement in zip(left.device_mesh.shape, left.placements, strict=True):
            copies //= size if placement.is_shard() else 1
    pieces = zip(*(_local(t).flatten().float().split(LONGEST_DOT) for t in (left, right)), strict=True)
    return torch.stack([torch.dot(a, b).double() for a, b in pieces]).sum() / copies


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
