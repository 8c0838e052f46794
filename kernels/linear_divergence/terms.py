"""One outcome's part of a divergence, and of its gradient: the same formulas for Triton and for torch.

    p student, q teacher, d = log q − log p, λ skew, each Σ over outcomes

    kind      D                        κ           e
    kl        Σ q log q/p              −1          p − q
    rkl       Σ p log p/q              1           −p d
    skl       Σ q log q/m              λ − 1       (1 − λ)² p (p − q)/m           m = λ q + (1 − λ) p
    srkl      Σ p log p/m              1 − λ       p (log p/m − λ (1 − λ) (p − q)/m)   m = λ p + (1 − λ) q
    js        (Σ q log q/m + Σ p log p/m)/2   0    p/2 log p/m                    m = (p + q)/2
    akl       w kl + (1 − w) rkl       1 − 2w      w (p − q) − (1 − w) p d
    abs       Σ |p − q|                0           p sign(p − q)
    log_abs   Σ |d|                    0           −sign(d)

e is ∂D/∂log p less κ p, so that dz = e − p Σ e wherever Σ p = 1, and near p = q nothing of it is the
difference of nearly equal numbers. Of a value Σ a log(a/b) each outcome adds a φ(log b/a), φ(x) =
e^x − 1 − x, never negative and of second order: Σ (b − a) is 0, or `κ (Σ p − Σ q)` is added where it is not.
A rounding error of a log-sum-exp hence moves a value of 1e-6 by 1e-13, not by 1e-6.

skl has a second form, κ = 0 and e = −(1 − λ) p q/m, for rows where p and q are far apart: there the first is
the difference of nearly equal numbers. A row takes it, as weight 0, where Σ p q/m < 1/2.

`logs` gives `d` beside log p and log q, whose difference is rounded at their size. `p − q` and `(p − q)/m`
come from w = e^−|d| − 1; with c = 1 − λ where d ≥ 0 else λ, and U = 1 + c w,
m/max(p, q) = U for m = λ q + (1 − λ) p.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenkit.kernels.kinds import MIXED
from tokenkit.kernels.language import tl, triton

LOWEST = tl.constexpr(-1e36)  # log of a probability of 0: finite, so that 0 · log 0 is 0
SMALL = tl.constexpr(0.5)  # |x| below which φ is a polynomial: to x⁹, 2e-8 of it


def logs(
    z: Tensor, other: Tensor, lse: tuple[Tensor, Tensor], other_lse: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log p, log q and d, of logits and each row's maximum and log Σ exp(z − maximum).

    The maximum goes first, because a log-sum-exp of the logits is rounded at their size.
    """
    log_p = (z - lse[0]).clamp_min_(LOWEST.value)
    log_q = (other - other_lse[0]).clamp_min_(LOWEST.value)
    d = (log_q - log_p).sub_(other_lse[1] - lse[1])
    return log_p.sub_(lse[1]), log_q.sub_(other_lse[1]), d


def kappa(kind: str, skew: float, weight: Tensor | float) -> Tensor | float:
    """Return κ of the table; `weight` is w of akl and the form of skl, of each row."""
    table = {"kl": -1.0, "rkl": 1.0, "skl": (skew - 1) * weight, "srkl": 1 - skew}
    return 1 - 2 * weight if kind == "akl" else table.get(kind, 0.0)


def terms(
    log_p: Tensor, log_q: Tensor, d: Tensor, kind: str, skew: float, weight: Tensor | float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return each outcome's addend of D, e, and p q/m of skl and srkl, else p.

    Shapes broadcast; log 0 may be any number below -1e3. `d` is log q − log p.
    """
    p = log_p.exp()
    if kind == "log_abs":
        return d.abs(), -d.sign(), p
    q = log_q.exp()
    if kind in MIXED:
        return _mixed_terms(d, p, q, kind, skew, weight)
    if kind == "js":
        # r = (p − q)/(p + q), and p = m (1 + r); a probability below 1e-7 of the other is lost in m anyway
        limit = 1 - torch.finfo(d.dtype).eps
        r = (d * -0.5).tanh_().clamp_(-limit, limit)
        e = torch.log1p(r).mul_(p).mul_(0.5)
        return r.neg_().log1p_().mul_(q).mul_(0.5).add_(e), e, p
    if kind == "abs":
        gap = torch.where(d >= 0, q, p) * torch.expm1(-d.abs())
        return gap.abs(), p * -d.sign(), p
    gap = p - q  # read where d is large, and as e
    if kind == "kl":
        return _forward_term(d, q, gap), gap, p
    if kind == "rkl":
        return _forward_term(-d, p, -gap), -p * d, p
    value = weight * _forward_term(d, q, gap) + (1 - weight) * _forward_term(-d, p, -gap)
    return value, weight * gap - (1 - weight) * p * d, p


def gradients(
    log_p: Tensor, log_q: Tensor, d: Tensor, kind: str, skew: float, weight: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Return e and p."""
    p = log_p.exp()
    if kind == "kl":
        return p - log_q.exp(), p
    if kind == "rkl":
        return (p * d).neg_(), p
    if kind == "log_abs":
        return d.sign().neg_(), p
    if kind == "abs":
        return d.sign().neg_().mul_(p), p
    if kind == "akl":
        return weight * (p - log_q.exp()) - (1 - weight) * p * d, p
    if kind == "skl":
        return _skl_gradient(d, p, *_mixture(d, kind, skew), skew, weight)[0], p
    if kind == "srkl":
        rise, _, u = _mixture(d, kind, skew)
        return _srkl_gradient(d, p, rise, u, skew)[0], p
    return terms(log_p, log_q, d, kind, skew, weight)[1], p


def _forward_term(x: Tensor, a: Tensor, difference: Tensor) -> Tensor:
    """Return a φ(−x), x = log a/b, where difference = b − a, as φ(−x) = expm1(−x) + x near 0."""
    near = x.clamp(-SMALL.value, SMALL.value)
    is_near = near == x
    return torch.where(is_near, (-near).expm1_().add_(near).mul_(a), (a * x).add_(difference))


def _mixture(d: Tensor, kind: str, skew: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return e^−|d| less 1, e^−|d|, and U."""
    fall = d.abs().neg_()
    rise, smaller = fall.expm1(), fall.exp_()
    u = torch.where(_ahead(d, kind), smaller * (1 - skew) + skew, smaller * skew + (1 - skew))
    return rise, smaller, u.clamp_min_(torch.finfo(d.dtype).tiny)


def _ahead(d: Tensor, kind: str) -> Tensor:
    """Return where the distribution that m is measured from is the larger."""
    return d >= 0 if kind != "srkl" else d <= 0


def _skl_gradient(
    d: Tensor, p: Tensor, rise: Tensor, smaller: Tensor, u: Tensor, skew: float, weight: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Return e of skl and p q/m."""
    ratio = torch.where(d >= 0, rise, -rise)  # times max(p, q): p − q
    other = torch.where(d >= 0, 1, smaller)  # likewise: q
    over = p / u
    e = ratio.mul_(weight * (1 - skew) ** 2).add_(other * ((1 - weight) * (skew - 1))).mul_(over)
    return e, other.mul_(over)


def _srkl_gradient(d: Tensor, p: Tensor, rise: Tensor, u: Tensor, skew: float) -> tuple[Tensor, Tensor]:
    """Return e of srkl and log m/p."""
    x = _log_u(d, rise, u, "srkl", skew).add_(d.clamp_min(0))
    ratio = torch.where(d >= 0, rise, -rise).div_(u)  # (p − q)/m
    return ratio.mul_(skew * (1 - skew)).add_(x).mul_(p).neg_(), x


def _log_u(d: Tensor, rise: Tensor, u: Tensor, kind: str, skew: float) -> Tensor:
    below = torch.where(_ahead(d, kind), rise * (1 - skew), rise * skew)  # U − 1
    return torch.where(below > -SMALL.value, below.log1p(), u.log())


def _mixed_terms(
    d: Tensor, p: Tensor, q: Tensor, kind: str, skew: float, weight: Tensor | float
) -> tuple[Tensor, Tensor, Tensor]:
    rise, smaller, u = _mixture(d, kind, skew)
    gap = torch.where(d >= 0, q, -p).mul_(rise).mul_(1 - skew)
    if kind == "skl":
        x = _log_u(d, rise, u, kind, skew).add_((-d).clamp_min_(0))  # log m/q
        e, shared = _skl_gradient(d, p, rise, smaller, u, skew, weight)
        return _forward_term(-x, q, gap), e, shared
    e, x = _srkl_gradient(d, p, rise, u, skew)
    return _forward_term(-x, p, gap.neg_()), e, torch.where(d >= 0, p, q).div_(u)


@triton.jit
def _expm1_below(x):
    """exp x − 1 for x <= 0; Triton's interpreter has no expm1."""
    t = tl.maximum(x, -0.5)
    series = t * (1.0 + t / 2 * (1.0 + t / 3 * (1.0 + t / 4 * (1.0 + t / 5 * (1.0 + t / 6 * (1.0 + t / 7))))))
    return tl.where(x > -0.5, series, tl.exp(x) - 1.0)


@triton.jit
def _log1p_below(x):
    """log(1 + x) for −1 < x <= 0: log u of the rounded u = 1 + x, times x / (u − 1) (Kahan)."""
    u = 1.0 + x
    step = u - 1.0
    return tl.where(step == 0.0, x, tl.log(u) * (x / tl.where(step == 0.0, 1.0, step)))


@triton.jit
def _forward_term_triton(x, a, difference):
    t = -tl.minimum(tl.maximum(x, -SMALL), SMALL)
    tail = 1.0 + t / 6 * (1.0 + t / 7 * (1.0 + t / 8 * (1.0 + t / 9)))
    phi = t * t / 2 * (1.0 + t / 3 * (1.0 + t / 4 * (1.0 + t / 5 * tail)))
    return tl.where(t == -x, phi * a, a * x + difference)


@triton.jit
def terms_triton(log_p, log_q, d, skew, weight, KIND: tl.constexpr):
    """What `terms` returns, of one block, and p q/m of skl and srkl, else p."""
    p = tl.exp(log_p)
    shared = p
    if KIND == "log_abs":
        value = tl.abs(d)
        e = tl.where(d > 0, -1.0, tl.where(d < 0, 1.0, 0.0))
    else:
        q = tl.exp(log_q)
        rise = _expm1_below(-tl.abs(d))
        gap = tl.where(d >= 0, q * rise, -p * rise)
        if KIND == "abs":
            value = tl.abs(gap)
            e = tl.where(d < 0, p, tl.where(d > 0, -p, 0.0))
        elif KIND == "kl":
            value = _forward_term_triton(d, q, gap)
            e = gap
        elif KIND == "rkl":
            value = _forward_term_triton(-d, p, -gap)
            e = -p * d
        elif KIND == "akl":
            value = weight * _forward_term_triton(d, q, gap)
            value += (1.0 - weight) * _forward_term_triton(-d, p, -gap)
            e = weight * gap - (1.0 - weight) * p * d
        else:
            larger = 1.0 - skew
            smaller = skew
            if KIND == "srkl":
                larger = skew
                smaller = 1.0 - skew
            below = rise * tl.where(d >= 0, larger, smaller)
            u = tl.exp(-tl.abs(d)) * tl.where(d >= 0, larger, smaller) + tl.where(d >= 0, smaller, larger)
            u = tl.maximum(u, 1.2e-38)
            log_u = tl.where(below > -SMALL, _log1p_below(tl.maximum(below, -SMALL)), tl.log(u))
            ratio = tl.where(d >= 0, rise, -rise) / u
            shared = tl.where(d >= 0, p, q) / u
            if KIND == "skl":
                x = log_u + tl.maximum(-d, 0.0)
                value = _forward_term_triton(-x, q, (1.0 - skew) * gap)
                e = (1.0 - skew) * (1.0 - skew) * p * ratio
                e = tl.where(weight > 0.5, e, (skew - 1.0) * shared)
            else:
                x = log_u + tl.maximum(d, 0.0)
                if KIND == "srkl":
                    value = _forward_term_triton(-x, p, (skew - 1.0) * gap)
                    e = -p * (x + skew * (1.0 - skew) * ratio)
                else:
                    other = log_u + tl.maximum(-d, 0.0)
                    value = _forward_term_triton(-x, p, gap * -0.5)
                    value = 0.5 * (value + _forward_term_triton(-other, q, gap * 0.5))
                    e = -0.5 * p * x
    return value, e, shared
