"""Cross-entropy and divergences straight from hidden states, under the names that people search for.

    loss = linear_cross_entropy(hidden_BTD, lm_head.weight, ids_BT, shift=True)

What the field calls fused linear cross-entropy, fused linear JSD and so on: the head's product and the loss
in one operation, forward and backward, a tile of the vocabulary at a time. No logits are ever stored.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tokenkit.kernels.linear_divergence import linear_divergence
from tokenkit.kernels.linear_logprob import DEFAULT_WORKSPACE_BYTES, linear_logprob
from tokenkit.structs import NO_LABEL, Head

Reduction = Literal["mean", "sum", "none"]


def linear_cross_entropy(
    hidden: Tensor,
    weight_VD: Tensor | Head,
    targets: Tensor,
    *,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    ignore_index: int = NO_LABEL,
    shift: bool = False,
    reduction: Reduction = "mean",
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
) -> Tensor:
    """Return `cross_entropy(softcap(scale (hidden @ weight.T + bias)) / temperature, targets)`.

    Differentiable in `hidden`, weight and bias.

    Args:
        hidden: [..., D] hidden states; bfloat16, float16, float32 or float64.
        weight_VD: the head's matrix, of that dtype and device; or a `Head`, which holds the next four too.
        targets: int64, of the shape of `hidden` without D; `ignore_index`: not counted.
        bias_V: of the head.
        softcap: c in c tanh(z / c), on the logits (Gemma 2).
        scale: multiplies the logits before the softcap (Cohere, Granite).
        vocab_size: ids from here on are padding rows of the head.
        temperature: divides the logits, after the softcap.
        ignore_index: target that is passed over, as -100 always is.
        shift: position t is scored on the target of position t + 1 of the dimension before D, as causal
            language models are: give hidden states and ids as they are.
        reduction: "mean" over what is counted (0 where nothing is), "sum", or "none".
        workspace_bytes: bound on what is allocated beside results, bytes; see `linear_logprob`.

    Returns:
        float32 (float64 for float64), nats: a scalar, or for "none" the shape of the targets that were
        scored, 0 where they are passed over.

    Raises:
        ValueError: shapes, dtypes or ids that do not fit together, or an unknown reduction.
        TypeError: targets that are no int64 tensor.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none': got {reduction!r}")
    head = _head(weight_VD, bias_V, softcap, scale, vocab_size)
    _check_targets(targets)
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"targets must have the shape of hidden without its last dimension, {tuple(hidden.shape[:-1])}: "
            f"got {tuple(targets.shape)}"
        )
    if shift:
        if hidden.ndim < 2:
            raise ValueError(f"shift needs hidden states [..., T, D]: got {tuple(hidden.shape)}")
        hidden, targets = hidden[..., :-1, :], targets[..., 1:]
    is_counted = (targets != ignore_index) & (targets != NO_LABEL)  # which the operation never scores
    target_N = targets.where(is_counted, NO_LABEL).reshape(-1)
    found = linear_logprob(
        hidden.reshape(-1, hidden.shape[-1]),
        head,
        target_N,
        temperature=temperature,
        workspace_bytes=workspace_bytes,
    )
    if reduction == "none":
        return -found.logp_N.reshape(targets.shape)
    total = -found.logp_N.sum()
    return total if reduction == "sum" else total / is_counted.sum().clamp_min(1)


fused_linear_cross_entropy = linear_cross_entropy


def fused_linear_kl_div(
    student_hidden: Tensor,
    student_weight_VD: Tensor | Head,
    teacher_hidden: Tensor,
    teacher_weight_VD: Tensor | Head,
    targets: Tensor | None = None,
    *,
    reverse: bool = False,
    temperature: float = 1.0,
    ignore_index: int = NO_LABEL,
    reduction: Reduction = "mean",
) -> Tensor:
    """Return KL(teacher ‖ student) of two heads over one vocabulary, position by position.

    Args:
        student_hidden: [..., D]; bfloat16, float16, float32 or float64.
        student_weight_VD: the student's head, [V, D] of that dtype, or a `Head` with bias, scale, softcap.
        teacher_hidden: [..., E], of the same leading shape.
        teacher_weight_VD: the teacher's head [V, E], or a `Head`; frozen.
        targets: int64 of the leading shape; positions with `ignore_index` are passed over. None: all count.
        reverse: KL(student ‖ teacher).
        temperature: divides both models' logits.
        ignore_index: target that is passed over.
        reduction: "mean" over the positions that count, "sum", or "none".

    Returns:
        float32 (float64), nats: a scalar, or the leading shape for "none".

    Raises:
        ValueError: shapes, dtypes or sizes of vocabularies that do not fit together.
    """
    kind = "rkl" if reverse else "kl"
    sides = (student_hidden, student_weight_VD), (teacher_hidden, teacher_weight_VD)
    return _divergence(kind, *sides, targets, ignore_index, temperature, reduction)


def fused_linear_jsd(
    student_hidden: Tensor,
    student_weight_VD: Tensor | Head,
    teacher_hidden: Tensor,
    teacher_weight_VD: Tensor | Head,
    targets: Tensor | None = None,
    *,
    temperature: float = 1.0,
    ignore_index: int = NO_LABEL,
    reduction: Reduction = "mean",
) -> Tensor:
    """Return the Jensen-Shannon divergence of two heads; arguments as for `fused_linear_kl_div`."""
    sides = (student_hidden, student_weight_VD), (teacher_hidden, teacher_weight_VD)
    return _divergence("js", *sides, targets, ignore_index, temperature, reduction)


def _head(
    weight: Tensor | Head,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    vocab_size: int | None = None,
) -> Head:
    if not isinstance(weight, Head):
        return Head(weight, bias_V, softcap, scale, vocab_size)
    if bias_V is not None or softcap is not None or scale != 1 or vocab_size is not None:
        raise ValueError("a Head holds its own bias, softcap, scale and vocab_size: do not give them twice")
    return weight


def _check_targets(targets: object) -> None:
    if not isinstance(targets, Tensor) or targets.dtype != torch.int64:
        came = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
        raise TypeError(f"targets must be an int64 tensor of ids: got {came}")


def _divergence(
    kind: str,
    student: tuple[Tensor, Tensor | Head],
    teacher: tuple[Tensor, Tensor | Head],
    targets: Tensor | None,
    ignore_index: int,
    temperature: float,
    reduction: Reduction,
) -> Tensor:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none': got {reduction!r}")
    shape = student[0].shape[:-1]
    for name, found in (
        ("teacher_hidden", teacher[0].shape[:-1]),
        ("targets", getattr(targets, "shape", shape)),
    ):
        if found != shape:
            raise ValueError(
                f"{name} must have the student's leading shape {tuple(shape)}: got {tuple(found)}"
            )
    weight_N = torch.ones(shape, dtype=torch.bool, device=student[0].device)
    if targets is not None:
        _check_targets(targets)
        weight_N = targets != ignore_index
    value = linear_divergence(
        student[0].reshape(-1, student[0].shape[-1]),
        _head(student[1]),
        teacher[0].reshape(-1, teacher[0].shape[-1]),
        _head(teacher[1]),
        kind,
        temperature=temperature,
        row_weight_N=None if reduction == "none" else weight_N.reshape(-1).float(),
    )
    if reduction == "none":
        return value.reshape(shape).where(weight_N, 0.0)
    return value if reduction == "sum" else value / weight_N.sum().clamp_min(1)
