"""Divergences at the edge of numbers: large logits, ids without probability, a share near 0.

Faults tried, each caught here: a log-sum-exp rounded at the size of the logits; -inf − (−inf); an infinite
value passed on as a large one; λ below the last bit of 1 lost; the share of a repeated id added to its logit;
log q − log p of rounded logs; skl in one form alone, or chosen without the ids in no pair.
"""

import pytest
import torch

from tokenkit.kernels.linear_divergence import linear_divergence
from tokenkit.kernels.not_finite import NotFiniteError
from tokenkit.kernels.reference.linear_divergence import linear_divergence as reference
from tokenkit.structs import Head

N, V = 4, 64  # Triton's interpreter takes a row at a time


def logits(offset, seed=0):
    """Two models' logits around `offset`, close to each other; multiples of 2^-12, so that sums hold them."""
    generator = torch.Generator().manual_seed(seed)
    z = offset + 2 * torch.randn(N, V, generator=generator)
    other = z + 0.01 * torch.randn(N, V, generator=generator)
    return [torch.round(x * 2**12) / 2**12 for x in (z, other)]


def run(function, dtype, z, other, kind, device="cpu", bias=(None, None), **options):
    """Return values and their gradients in z and other, of products with identities: these are exact."""
    eyes = [torch.eye(n, dtype=dtype, device=device) for n in z.shape]
    weight, teacher = (x.clone().to(device, dtype).requires_grad_() for x in (z.T.contiguous(), other))
    biases = [None if b is None else b.to(device, dtype) for b in bias]
    options = {k: v.to(device) if torch.is_tensor(v) else v for k, v in options.items()}
    value = function(eyes[0], Head(weight, biases[0]), teacher, Head(eyes[1], biases[1]), kind, **options)
    value.sum().backward()
    return tuple(x.double().cpu() for x in (value.detach(), weight.grad.T, teacher.grad))


def errors(got, truth):
    """Return each row's, relative."""
    return (got - truth).norm(dim=1) / truth.norm(dim=1)


@pytest.mark.parametrize("offset", [40.0, -80.0])
@pytest.mark.parametrize("kind", ["kl", "rkl", "skl", "srkl", "js", "akl", "log_abs"])
def test_gradients_are_as_near_as_eagers_however_large_the_logits(kind, offset, executor, device):
    z, other = logits(offset)
    truth = run(reference, torch.float64, z, other, kind)
    eager = run(reference, torch.float32, z, other, kind)
    modes = [{}] if executor == "triton" else [{}, {"row_weight_N": torch.ones(N)}]  # the same kernels
    for mode in modes:
        got = run(linear_divergence, torch.float32, z, other, kind, device, **mode)
        for one, expected, true in zip(got[1:], eager[1:], truth[1:], strict=True):
            ours_N, eager_N = errors(one, true), errors(expected, true)
            assert ours_N.square().mean().sqrt() < 2 * eager_N.square().mean().sqrt() + 5e-7
            if kind in ("skl", "srkl", "js"):  # differences of near logits are exact
                assert ours_N.max() < 1e-6


@pytest.mark.parametrize("outcomes", ["all", "pairs", "rest"])
@pytest.mark.parametrize("kind", ["skl", "srkl"])
def test_models_that_are_sure_of_different_ids(kind, outcomes, executor, device):
    z, other = logits(0.0)
    z[::2, 3] += 24
    other[:, 4] += 24
    z[1::2, 4] += 24  # there they agree, in the last row on an id in no pair
    z[3, 5] += 26
    other[3, 5] += 26
    ids = torch.arange(0, V, 2) if outcomes == "rest" else torch.arange(40)
    options = {"student_index": ids, "teacher_index": ids, "rest_as_outcome": outcomes == "rest"}
    options = {} if outcomes == "all" else options
    truth = run(reference, torch.float64, z, other, kind, **options)
    eager = run(reference, torch.float32, z, other, kind, **options)
    got = run(linear_divergence, torch.float32, z, other, kind, device, **options)
    torch.testing.assert_close(got[0], truth[0], rtol=1e-5, atol=1e-7)
    i = 1 if kind == "skl" else 2  # whose gradient is that of skl; the other's terms add up to 0
    ours_N, eager_N = (errors(x[i], truth[i]) for x in (got, eager))
    assert (ours_N < 2 * eager_N + 1e-6).all()
    assert ours_N[3] < 1e-6


@pytest.mark.parametrize("kind", ["kl", "rkl"])
def test_repeated_ids_of_large_logits(kind, executor, device):
    z, other = (logits(800.0, seed)[0] for seed in (0, 1))
    ids = torch.arange(40)
    options = {"student_index": torch.cat([ids, ids[:6]]), "teacher_index": torch.cat([ids, ids[:6] + 7])}
    options["rest_as_outcome"] = True
    truth = run(reference, torch.float64, z, other, kind, **options)
    got = run(linear_divergence, torch.float32, z, other, kind, device, **options)
    torch.testing.assert_close(got[0], truth[0], rtol=2e-6, atol=0)
    assert max(errors(got[i], truth[i]).max() for i in (1, 2)) < 2e-6


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
    (value, gradient, _), (got, got_gradient, _) = results
    torch.testing.assert_close(got, value, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(got_gradient, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("kind", "side"), [("kl", 0), ("rkl", 1), ("akl", 0), ("log_abs", 1)])
def test_what_is_infinite_is_an_error(kind, side, executor, device):
    if device == "cuda":
        pytest.skip("there it is a device-side assertion")
    z, other = (x[:1] for x in logits(0.0))
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
    value, gradient, _ = run(reference, torch.float64, z, other, kind, skew=skew)
    got, got_gradient, _ = run(linear_divergence, torch.float32, z, other, kind, device, skew=skew)
    torch.testing.assert_close(got, value, rtol=2e-5, atol=1e-9)
    torch.testing.assert_close(got_gradient, gradient, rtol=2e-4, atol=1e-7)
