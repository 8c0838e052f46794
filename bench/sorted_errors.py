"""How far the sorted distance is from float64's sort, by bins and by float32's sort, over kinds of rows.

    python bench/sorted_errors.py
    python bench/sorted_errors.py --finer      the gradient alone, by the number of bins in an octave

Logits of both models are normal with the standard deviation named; `peaked` lifts three ids of each row. W is
0.844 V. The largest of 4 rows: of a value, in [0, 2], the error; of a row's gradient, the norm of the error
over its own.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from harness import print_table

from tokenkit.kernels.reference.sorted_distance import sorted_distance as reference
from tokenkit.kernels.sorted_distance import sorted_distance
from tokenkit.structs import Head

ROWS = 4
VOCABULARIES = (97, 1000, 8192, 32_000, 128_256)
KINDS = {"sd 1e-4": 1e-4, "sd 0.1": 0.1, "sd 1": 1.0, "sd 3": 3.0, "sd 8": 8.0, "peaked": 1.0}


def logits(kind: str, size: int) -> Tensor:
    """Return one model's logits of a kind."""
    z_NV = KINDS[kind] * torch.randn(ROWS, size)
    if kind == "peaked":
        z_NV[:, :3] += 12 + 2 * torch.rand(ROWS, 3)
    return z_NV


def answers(z_NV: Tensor, z_NW: Tensor, exact: bool | None) -> tuple[Tensor, Tensor]:
    """Return values and gradients of the logits; None: by the definition, in float64."""
    dtype = torch.float64 if exact is None else torch.float32
    one, values, gradients = torch.ones(1, 1, dtype=dtype), [], []
    for z_V, z_W in zip(z_NV, z_NW, strict=True):
        weight, other = z_V[:, None].to(dtype).requires_grad_(), z_W[:, None].to(dtype)
        arguments = one, Head(weight), one, Head(other)
        value = reference(*arguments) if exact is None else sorted_distance(*arguments, exact=exact)
        value.sum().backward()
        assert weight.grad is not None
        values.append(value.detach().double())
        gradients.append(weight.grad.double()[:, 0])
    return torch.cat(values), torch.stack(gradients)


def signs(p_V: Tensor, q_W: Tensor, bins: int) -> Tensor:
    """Return the sign of each id of p in the gradient, in so many bins of log2 p an octave; 0: sorted."""
    if not bins:
        order_V = p_V.argsort(descending=True)
        other_V = torch.zeros_like(p_V)
        ranked_W = q_W.sort(descending=True).values
        other_V[: len(ranked_W)] = ranked_W[: len(p_V)]
        return torch.zeros_like(p_V).scatter(0, order_V, (p_V[order_V] - other_V).sign())
    lowest = max(p_V.max(), q_W.max()).log2().ceil() - 24
    bin_V, bin_W = ((((x.log2() - lowest) * bins).floor().clamp(0, 24 * bins - 1)).long() for x in (p_V, q_W))
    edge = 2 ** (lowest + torch.arange(24 * bins, dtype=p_V.dtype) / bins)
    width = edge * (2 ** (1 / bins) - 1)
    above, inside = torch.zeros_like(edge), torch.zeros_like(edge)
    for bin_X, x, sign in ((bin_V, p_V, 1.0), (bin_W, q_W, -1.0)):
        above.index_add_(0, bin_X, torch.full_like(x, sign))
        inside.index_add_(0, bin_X, sign * (x - edge[bin_X]).clamp(min=0))
    beyond = above.flip(0).cumsum(0).flip(0) - above
    return (beyond * width + inside).sign()[bin_V]


def finer() -> None:
    """Print the error of the gradient by the number of bins in an octave."""
    rows: dict[str, dict[str, float]] = {}
    for kind in KINDS:
        z_NV, z_NW = (logits(kind, size).double() for size in (32_000, 27_008))
        for p_V, q_W in zip(z_NV.softmax(1), z_NW.softmax(1), strict=True):
            true_V = p_V * ((sign_V := signs(p_V, q_W, 0)) - (p_V * sign_V).sum())
            for bins in (64, 256, 1024, 4096, 16_384):
                found_V = p_V * ((sign_V := signs(p_V, q_W, bins)) - (p_V * sign_V).sum())
                error = float((found_V - true_V).norm() / true_V.norm())
                row = rows.setdefault(kind, {})
                row[f"{bins} bins"] = max(row.get(f"{bins} bins", 0.0), error)
    print_table(rows)


def main() -> None:
    torch.manual_seed(0)
    if sys.argv[1:] == ["--finer"]:
        return finer()
    rows: dict[str, dict[str, float]] = {}
    for size in VOCABULARIES:
        for kind in KINDS:
            z_NV, z_NW = logits(kind, size), logits(kind, round(0.844 * size))
            true_N, true_NV = answers(z_NV, z_NW, None)
            row = rows[f"{size} {kind}"] = {}
            for name, exact in (("bins", False), ("exact", True)):
                value_N, gradient_NV = answers(z_NV, z_NW, exact)
                row[f"{name} value"] = (value_N - true_N).abs().max().item()
                error_N = (gradient_NV - true_NV).norm(dim=1) / true_NV.norm(dim=1)
                row[f"{name} gradient"] = error_N.max().item()
    print_table(rows)


if __name__ == "__main__":
    main()
