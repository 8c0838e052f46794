"""Several heads asked as one, against logits in float64: every combination, both executors.

Faults tried, each caught here: weights in another order; a target that bounds itself; a block that is looked
at twice; the last, narrower block left out; the factor of another tile; a target counted twice in the sum;
a map the other way round; a bias added twice; rows of the second chunk under the first one's maxima.
"""

import pytest
import torch

from tokenkit.kernels.head.tiles import default_workspace
from tokenkit.kernels.linear_ensemble import Part, bounds, linear_ensemble, passes
from tokenkit.kernels.reference.linear_ensemble import combined_logp
from tokenkit.structs import Head

COMBINATIONS = ("mean_prob", "mean_logits", "max")


def three(dtype, device, N=37, V=419, spread=1.0):
    """Heads of other widths: one with padding rows and a bias, one capped and scaled, one with other ids."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, by=1.0):
        return (by * torch.randn(*shape, generator=generator)).to(device, dtype)

    ids_V = torch.randint(300, (V,), generator=generator).to(device)
    return [
        Part(normal(N, 24), Head(normal(V + 5, 24, by=spread), normal(V + 5), vocab_size=V), 0.5),
        Part(normal(N, 40), Head(normal(V, 40, by=spread), softcap=6.0, scale=0.7), 0.3),
        Part(normal(N, 16), Head(normal(300, 16, by=spread), normal(300)), 0.2, ids_V),
    ]


def targets(parts, combination, share=3):
    """Every `share`-th target is the likeliest, others are the likeliest of one head or any."""
    logp_NV, logp_KNV = combined_logp(parts, combination)
    target_N = torch.arange(len(logp_NV), device=logp_NV.device) * 7 % logp_NV.shape[1]
    target_N[::share] = logp_NV[::share].argmax(-1)
    target_N[1::share] = logp_KNV[0, 1::share].argmax(-1)
    return target_N


@pytest.mark.parametrize("combination", COMBINATIONS)
@pytest.mark.parametrize("workspace_bytes", [None, 26_000])
def test_it_is_what_full_logits_give(combination, workspace_bytes, executor, device, monkeypatch):
    if workspace_bytes is not None:  # several chunks of several tiles
        monkeypatch.setattr(passes, "columns_of", lambda side, rows: 128)
    parts = three(torch.float32, device, N=13)
    target_N = targets(parts, combination)
    wanted_NV, members_KNV = combined_logp(parts, combination)
    at = torch.arange(len(target_N), device=device), target_N
    found = linear_ensemble(parts, target_N, combination, workspace_bytes=workspace_bytes)
    assert found.logp_N.dtype == torch.float32
    torch.testing.assert_close(found.logp_N.double(), wanted_NV[at], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(found.members_KN.double(), members_KNV[:, *at], atol=2e-5, rtol=1e-5)
    assert found.is_top1_N.tolist() == (wanted_NV.argmax(-1) == target_N).tolist()
    less = linear_ensemble(parts, target_N, combination, asks_top=False, asks_members=False)
    torch.testing.assert_close(less.logp_N, found.logp_N)
    assert less.members_KN is None
    assert less.is_top1_N is None


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_float64_is_exact_and_16_bits_are_widened(combination, device):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.bfloat16, 2e-5)):
        parts = three(dtype, device, N=9)
        target_N = targets(parts, combination)
        wanted_N = combined_logp(parts, combination)[0].gather(1, target_N[:, None])[:, 0]
        found = linear_ensemble(parts, target_N, combination)
        torch.testing.assert_close(found.logp_N.double(), wanted_N, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("looks", [0, 1, 4])
def test_the_likeliest_is_found_however_often_one_looks(looks, monkeypatch):
    """Flat distributions leave most blocks open; of twins none is likelier."""
    monkeypatch.setattr(bounds, "LOOKS", looks)
    parts = three(torch.float32, "cpu", N=200, V=1000, spread=0.02)
    for part in parts[:2]:
        part.head.weight_VD[13] = part.head.weight_VD[977]
    parts = [part._replace(weight=0.5) for part in parts[:2]]
    parts[0].head.bias_V.mul_(0.02)[13] = parts[0].head.bias_V[977]
    target_N = targets(parts, "mean_prob", share=2)
    logp_NV, _ = combined_logp(parts, "mean_prob")
    at_N = logp_NV.gather(1, target_N[:, None])[:, 0]
    is_near_N = (logp_NV.amax(1) - at_N < 1e-6) & (logp_NV.argmax(1) != target_N)
    found = linear_ensemble(parts, target_N, "mean_prob").is_top1_N
    assert (found == (at_N >= logp_NV.amax(1) - 1e-9))[~is_near_N].all()
    assert found[::2].all()


def test_a_sure_target_has_its_digits(executor, device):
    """1 − p is the sum over the others, not a difference: log p of 1 − 1e-9 is not 0."""
    parts = three(torch.float32, device, N=1)[:1] * 2
    parts = [part._replace(weight=0.5) for part in parts]
    target_N = combined_logp(parts, "mean_prob")[0].argmax(1)
    parts[0].head.bias_V[target_N] += 25
    wanted = combined_logp(parts, "mean_prob")[0][0, target_N]
    assert -1e-6 < wanted < 0
    for combination in ("mean_prob", "mean_logits"):
        found = linear_ensemble(parts, target_N, combination)
        torch.testing.assert_close(found.logp_N.double(), wanted, rtol=1e-4, atol=0)


def test_few_logits_exist_at_once(monkeypatch):
    parts, kept = three(torch.float32, "cpu", N=64, V=1000), []
    original = passes._kept_chunk

    def noted(sides, target_R, weights, buffer):
        kept.append(len(target_R))
        return original(sides, target_R, weights, buffer)

    monkeypatch.setattr(passes, "_kept_chunk", noted)
    linear_ensemble(parts, targets(parts, "max"), "max", workspace_bytes=3 * 4 * 1000 * 10)
    assert max(kept) <= 10
    assert sum(kept) == 64
    assert default_workspace("cpu") == 256 * 2**20


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_no_tokens(combination, executor, device):
    parts = three(torch.float32, device, N=0)
    found = linear_ensemble(parts, torch.zeros(0, dtype=torch.int64, device=device), combination)
    assert (found.logp_N.shape, found.members_KN.shape, found.is_top1_N.shape) == ((0,), (3, 0), (0,))


def test_what_does_not_fit_is_named():
    parts = three(torch.float32, "cpu", N=2)
    target_N = torch.tensor([3, 419])
    with pytest.raises(ValueError, match=r"ids in \[0, 419\) of the first head: got 419"):
        linear_ensemble(parts, target_N, "max")
    target_N[1] = 5
    with pytest.raises(ValueError, match="of sum 1"):
        linear_ensemble(parts[:2], target_N, "mean_prob")
    with pytest.raises(ValueError, match=r"parts\[1\].hidden_ND must hold one row for each of 2 targets"):
        linear_ensemble([parts[0], parts[1]._replace(hidden_ND=torch.zeros(3, 40))], target_N, "max")
    with pytest.raises(ValueError, match=r"parts\[1\] must have an id for each of the 419"):
        linear_ensemble([parts[0], parts[2]._replace(ids_V=None)], target_N, "max")
    parts[1].hidden_ND[1, 0] = torch.nan
    for combination in COMBINATIONS:
        with pytest.raises(ValueError, match=r"row 1 (it )?holds NaN or infinity"):
            linear_ensemble(parts, target_N, combination)
