"""How far a student's likelihood of a chunk is from the teacher's, and the derivative, in closed form.

With t, s ≤ 0 the teacher's and the student's log-likelihood of a chunk, τ the temperature, ε = 1e-6,
u = t/τ − ε, v = s/τ − ε (u = t − ε, v = s − ε where marked *), p = e^u, q = e^v, r = (t − s)/τ:

    kind                    d(t, s)                                   ∂d/∂s
    abs                     |t − s|                                   sign(s − t)
    binary_ce               −(p v + (1 − p) log(1 − q))               (q − p) / (1 − q) / τ
    reverse_binary_kl       q (v − u) + (1 − q) x                     q (v − u − x) / τ
                            x = log((1 − q) / (1 − p))
    binary_kl_temp_limit *  u − v + u log(−v) − u log(−u)             u / v − 1
    abs_exp                 |p − q|                                   sign(q − p) q / τ
    renyi *                 log(A + B) / (α − 1),  A = p^α q^(1−α),   (B q / (1 − q) − A) / (A + B)
                            B = (1 − p)^α (1 − q)^(1−α); as logarithms, because A = e^(−s) and more for α > 1
    joschu_k2               r² / 2                                    −r / τ
    joschu_k3               e^r − 1 − r                               (1 − e^r) / τ

Computed in float64: it is one number a chunk, and 1 − q is as small as ε.

Sources: ALM, arXiv:2503.20083; k2 and k3, John Schulman, "Approximating KL Divergence", 2020.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tokenkit.kernels.kinds import DIFFERENCES
from tokenkit.kernels.language import tl, triton
from tokenkit.kernels.launch import on_device, refuse_forward_mode, runs_triton

EPS = 1e-6
BLOCK_C = 256  # chunks of one program


@triton.jit
def _difference_kernel(
    teacher_ptr, student_ptr, value_ptr, slope_ptr,
    C,
    KIND: tl.constexpr, TEMPERATURE: tl.constexpr, ALPHA: tl.constexpr, EPSILON: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK_C chunks: the difference and its derivative in the student."""
    offs_c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = offs_c < C
    t = tl.load(teacher_ptr + offs_c, mask=mask, other=0.0).to(tl.float64)
    s = tl.load(student_ptr + offs_c, mask=mask, other=0.0).to(tl.float64)
    if KIND == "binary_kl_temp_limit" or KIND == "renyi":
        u = t - EPSILON
        v = s - EPSILON
    else:
        u = t / TEMPERATURE - EPSILON
        v = s / TEMPERATURE - EPSILON
    p = tl.exp(u)
    q = tl.exp(v)
    r = (t - s) / TEMPERATURE
    if KIND == "abs":
        d = tl.abs(t - s)
        slope = tl.where(s > t, 1.0, tl.where(s < t, -1.0, 0.0))
    elif KIND == "binary_ce":
        d = -(p * v + (1.0 - p) * tl.log(1.0 - q))
        slope = (q - p) / (1.0 - q) / TEMPERATURE
    elif KIND == "reverse_binary_kl":
        rest = tl.log(1.0 - q) - tl.log(1.0 - p)
        d = q * (v - u) + (1.0 - q) * rest
        slope = q * (v - u - rest) / TEMPERATURE
    elif KIND == "binary_kl_temp_limit":
        d = u - v + u * tl.log(-v) - u * tl.log(-u)
        slope = u / v - 1.0
    elif KIND == "abs_exp":
        d = tl.abs(p - q)
        slope = tl.where(q > p, q, tl.where(q < p, -q, 0.0)) / TEMPERATURE
    elif KIND == "renyi":
        log_a = ALPHA * u + (1.0 - ALPHA) * v
        log_b = ALPHA * tl.log(1.0 - p) + (1.0 - ALPHA) * tl.log(1.0 - q)
        smaller = tl.exp(-tl.abs(log_a - log_b))
        d = (tl.maximum(log_a, log_b) + tl.log(1.0 + smaller)) / (ALPHA - 1.0)
        part = tl.where(log_a > log_b, 1.0, smaller) / (1.0 + smaller)  # A / (A + B)
        slope = tl.where(log_a > log_b, smaller, 1.0) / (1.0 + smaller) * (q / (1.0 - q)) - part
    elif KIND == "joschu_k2":
        d = r * r * 0.5
        slope = -r / TEMPERATURE
    else:
        tl.static_assert(KIND == "joschu_k3")
        d = tl.exp(r) - 1.0 - r
        slope = (1.0 - tl.exp(r)) / TEMPERATURE
    tl.store(value_ptr + offs_c, d.to(value_ptr.dtype.element_ty), mask=mask)
    tl.store(slope_ptr + offs_c, slope.to(slope_ptr.dtype.element_ty), mask=mask)


def _difference_torch(
    teacher_C: Tensor, student_C: Tensor, kind: str, temperature: float, alpha: float
) -> tuple[Tensor, Tensor]:
    """`_difference_kernel` in torch."""
    t, s = teacher_C.double(), student_C.double()
    r = (t - s) / temperature
    if kind in ("binary_kl_temp_limit", "renyi"):
        temperature = 1.0
    u, v = t / temperature - EPS, s / temperature - EPS
    p, q = u.exp(), v.exp()
    if kind == "abs":
        return (t - s).abs(), (s - t).sign()
    if kind == "binary_ce":
        return -(p * v + (1 - p) * (1 - q).log()), (q - p) / (1 - q) / temperature
    if kind == "reverse_binary_kl":
        rest = (1 - q).log() - (1 - p).log()
        return q * (v - u) + (1 - q) * rest, q * (v - u - rest) / temperature
    if kind == "binary_kl_temp_limit":
        return u - v + u * (-v).log() - u * (-u).log(), u / v - 1
    if kind == "abs_exp":
        return (p - q).abs(), (q - p).sign() * q / temperature
    if kind == "renyi":
        log_a = alpha * u + (1 - alpha) * v
        log_b = alpha * (1 - p).log() + (1 - alpha) * (1 - q).log()
        part = (log_a - log_b).sigmoid()  # A / (A + B)
        slope = (log_b - log_a).sigmoid() * (q / (1 - q)) - part
        return torch.logaddexp(log_a, log_b) / (alpha - 1), slope
    if kind == "joschu_k2":
        return r.square() / 2, -r / temperature
    assert kind == "joschu_k3"
    return r.exp() - 1 - r, (1 - r.exp()) / temperature


@torch.library.custom_op("tokenkit::alm_difference", mutates_args=())
def _difference(
    student: Tensor, teacher: Tensor, kind: str, temperature: float, alpha: float
) -> tuple[Tensor, Tensor]:
    """Return the differences and their derivatives in the student."""
    if runs_triton(student) and student.numel():
        student, teacher = student.contiguous(), teacher.contiguous()
        value, slope = torch.empty_like(student), torch.empty_like(student)
        with on_device(student):
            _difference_kernel[(triton.cdiv(student.numel(), BLOCK_C),)](
                teacher, student, value, slope,
                student.numel(),
                KIND=kind, TEMPERATURE=temperature, ALPHA=alpha, EPSILON=EPS, BLOCK_C=BLOCK_C,
            )  # fmt: skip
        return value, slope
    value, slope = _difference_torch(teacher, student, kind, temperature, alpha)
    return value.to(student.dtype), slope.to(student.dtype)


@_difference.register_fake
def _(student: Tensor, teacher: Tensor, kind: str, temperature: float, alpha: float) -> tuple[Tensor, Tensor]:
    return student.new_empty(student.shape), student.new_empty(student.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


@once_differentiable
def _differentiate(ctx: Any, dvalue: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None]:
    (slope,) = ctx.saved_tensors
    return dvalue * slope, None, None, None, None


_difference.register_autograd(_differentiate, setup_context=_save)


def alm_difference(
    teacher: Tensor,
    student: Tensor,
    kind: str = "binary_ce",
    *,
    temperature: float = 100.0,
    renyi_alpha: float = 0.5,
) -> Tensor:
    """Return the difference of each pair of chunk log-likelihoods. Differentiable in the student alone.

    Args:
        teacher: log-likelihoods, nats, at most 0, float32 or float64, any shape.
        student: the same shape and dtype.
        kind: one of `DIFFERENCES`.
        temperature: τ; the kinds marked * above do not use it.
        renyi_alpha: α of `renyi`, positive and not 1.

    Raises:
        ValueError: an unknown kind, a parameter outside its range, shapes, dtypes or devices that do not fit.
    """
    check_difference(kind, temperature, renyi_alpha)
    refuse_forward_mode(student)
    if teacher.shape != student.shape or teacher.dtype != student.dtype:
        raise ValueError(
            "teacher and student must be of one shape and dtype: got "
            f"{tuple(teacher.shape)} {teacher.dtype} and {tuple(student.shape)} {student.dtype}"
        )
    if student.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"teacher and student must be float32 or float64: got {student.dtype}")
    if teacher.device != student.device:
        raise ValueError(
            f"teacher and student must be on one device: got {teacher.device} and {student.device}"
        )
    value, _ = _difference(student, teacher.detach(), kind, float(temperature), float(renyi_alpha))
    return value


def check_difference(kind: str, temperature: float, renyi_alpha: float) -> None:
    """Raise ValueError if `alm_difference` would refuse these."""
    if kind not in DIFFERENCES:
        raise ValueError(f"unknown difference {kind!r}: expected one of {', '.join(DIFFERENCES)}")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"the temperature (binarization_temp) must be positive: got {temperature}")
    if not 0 < renyi_alpha < math.inf or renyi_alpha == 1:
        raise ValueError(f"renyi_alpha must be positive, finite and not 1: got {renyi_alpha}")
