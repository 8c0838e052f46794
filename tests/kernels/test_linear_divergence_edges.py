"""Divergences at the edge of numbers: large logits, ids without probability, a share near 0.

Faults tried, each caught here: a log-sum-exp rounded at the size of the logits; -inf − (−inf); an infinite
value passed on as a large one; λ below the last bit of 1 lost.
"""

import pytest
import torch

from tokenkit.kernels.linear_divergence import linear_divergence
from tokenkit.kernels.not_finite import NotFiniteError
from tokenkit.kernels.reference.linear_divergence import linear_divergence as reference
from tokenkit.structs import Head

N, V = 12, 130


def logits(offset, seed=0):
    """Two models' logits around `offset`, close to each other; multiples of 2^-12, so that sums hold them."""
    generator = torch.Generator().manual_seed(seed)
    z = offset + 2 * torch.randn(N, V, generator=generator)
    other = z + 0.01 * torch.randn(N, V, generator=generator)
    return [torch.round(x * 2**12) / 2**12 for x in (z, other)]


def run(function, dtype, z, other, kind, device="cpu", bias=(None, None), **options):
    """Return values and their gradient in z: the identity times a weight is that weight, exactly."""
    eye = torch.eye(N, dtype=dtype, device=device)
    weights = [x.T.contiguous().to(device, dtype) for x in (z, other)]
    heads = [Head(w, None if b is None else b.to(device, dtype)) for w, b in zip(weights, bias, strict=True)]
    heads[0].weight_VD.requires_grad_()
    value = function(eye, heads[0], eye, heads[1], kind, **options)
    value.sum().backward()
    return value.detach().double().cpu(), heads[0].weight_VD.grad.T.double().cpu()


def worst(got, truth):
    return float(((got - truth).norm(dim=1) / truth.norm(dim=1)).max())


@pytest.mark.parametrize("offset", [0.0, 40.0, -80.0])
@pytest.mark.parametrize("kind", ["kl", "rkl", "skl", "srkl", "js", "akl", "log_abs"])
def test_gradients_are_as_near_as_eagers_however_large_the_logits(kind, offset, executor, device):
    z, other = logits(offset)
    _, truth = run(reference, torch.float64, z, other, kind)
    _, eager = run(reference, torch.float32, z, other, kind)
    for mode in ({}, {"row_weight_N": torch.ones(N, device=device)}):
        _, got = run(linear_divergence, torch.float32, z, other, kind, device, **mode)
        assert worst(got, truth) < 4 * worst(eager, truth) + 1e-6


@pytest.mark.parametrize(
    ("kind", "side"),
    [
        ("kl", 1),
        ("skl", 0),
        ("skl", 1),
        ("rkl", 0),
        ("srkl", 0),
        ("srkl", 1),
        ("js", 0),
        ("js", 1),
        ("abs", 0),
    ],
)
def test_ids_without_probability_count_as_such(kind, side, executor, device):
    """Against a logit so low that its probability is 0 in float64, too."""
    z, other = logits(0.0)
    results = []
    for function, low, dtype in (
        (reference, -800.0, torch.float64),
        (linear_divergence, -torch.inf, torch.float32),
    ):
        bias = [torch.zeros(V), torch.zeros(V)]
        bias[side][5:9] = low
        results.append(run(function, dtype, z, other, kind, device, bias=tuple(bias)))
    (value, gradient), (got, got_gradient) = results
    torch.testing.assert_close(got, value, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(got_gradient, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("kind", "side"), [("kl", 0), ("rkl", 1), ("akl", 0), ("log_abs", 1)])
def test_what_is_infinite_is_an_error(kind, side, executor, device):
    if device == "cuda":
        pytest.skip("there it is a device-side assertion")
    z, other = logits(0.0)
    bias = [torch.zeros(V), torch.zeros(V)]
    bias[side][5] = -torch.inf
    with pytest.raises(NotFiniteError, match=f"{kind} must be finite: .*in row 0; use skl, srkl or js"):
        run(linear_divergence, torch.float32, z, other, kind, device, bias=tuple(bias))


@pytest.mark.parametrize("kind", ["skl", "srkl"])
@pytest.mark.parametrize("skew", [1e-9, 1e-12, 1 - 1e-6])
def test_a_small_share_is_not_rounded_away(kind, skew, executor, device):
    z, other = logits(0.0)
    z[:, 3] -= 60  # so that λ q is most of the mixture there
    other[:, 4] -= 60
    value, gradient = run(reference, torch.float64, z, other, kind, skew=skew)
    got, got_gradient = run(linear_divergence, torch.float32, z, other, kind, device, skew=skew)
    torch.testing.assert_close(got, value, rtol=2e-5, atol=1e-9)
    torch.testing.assert_close(got_gradient, gradient, rtol=2e-4, atol=1e-7)
