"""Operations that give a weighted sum and form its gradients with it: their frame.

    operation(tensors, ..., constants, numbers, words) -> [total, the gradient by each tensor]

Row weights are known, so the backward only multiplies. A gradient that nobody wants is empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def formed_shapes(tensors: Sequence[Tensor | None], needs: str, letters: str) -> list[Tensor]:
    """Return what an operation on tensors of no content returns.

    Args:
        tensors: that it is differentiated by, the hidden states first.
        needs: letters of those whose gradient is wanted.
        letters: one for each tensor.
    """
    first = tensors[0]
    assert first is not None
    dtype = torch.promote_types(first.dtype, torch.float32)
    shapes = [
        x.shape if x is not None and letter in needs else (0,)
        for x, letter in zip(tensors, letters, strict=True)
    ]
    return [first.new_empty(shape, dtype=dtype) for shape in ((), *shapes)]


def register_formed(operation: Any, name: str, count: int) -> None:
    """Give an operation its gradient.

    Args:
        operation: of `torch.library.custom_op`.
        name: what a user calls it.
        count: how many tensors come before what `pack` made.
    """

    def keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
        ctx.set_materialize_grads(False)
        ctx.like = [None if x is None else (x.shape, x.dtype) for x in inputs[:count]]
        ctx.lists = len(inputs[count])
        ctx.save_for_backward(*output[1:])

    def gradients(ctx: Any, upstreams: list[Tensor | None]) -> tuple[Any, ...]:
        upstream, rest = upstreams[0], ([None] * ctx.lists, None, None)
        if upstream is None:
            return *[None] * count, *rest
        if torch.is_grad_enabled():
            raise RuntimeError(f"{name} has no second derivative: call backward without create_graph")
        owed = (
            None if like is None or found.shape != like[0] else (found * upstream).to(like[1])
            for found, like in zip(ctx.saved_tensors, ctx.like, strict=True)
        )
        return *owed, *rest

    operation.register_autograd(gradients, setup_context=keep)
