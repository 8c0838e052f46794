"""Several heads asked as one, against logits in float64: every combination, both executors.

Faults tried, each caught here: weights in another order, in each of the four places that read them; a
target that bounds itself, or by another order of its sum; a block that is looked at twice; the last,
narrower block left out or not written; the factor of another tile; a target counted twice in the sum, or in
tiles where it is not; the largest of the last tile alone; a map the other way round, or none for what is
looked at; a bias, softcap or scale applied twice, or not to what is looked at; rows of the second chunk
under the first one's maxima, or read from its hidden states; a row that is not finite under the number that
it has in its chunk.
"""

import pytest
import torch

from tests.device import FakeDevice
from tokenkit.kernels.head.tiles import default_workspace
from tokenkit.kernels.linear_ensemble import Part, bounds, linear_ensemble, operation, passes
from tokenkit.kernels.reference.linear_ensemble import combined_logp
from tokenkit.structs import Head

COMBINATIONS = ("mean_prob", "mean_logits", "max")


def three(dtype, device, N=37, V=331, spread=1.0):
    """Heads of other widths: one with padding rows and a bias, one capped and scaled, one with other ids."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, by=1.0):
        return (by * torch.randn(*shape, generator=generator)).to(device, dtype)

    ids_V = torch.randint(300, (V,), generator=generator).to(device)
    return [
        Part(normal(N, 24), Head(normal(V + 5, 24, by=0.6 * spread), normal(V + 5), vocab_size=V), 0.5),
        Part(normal(N, 40), Head(normal(V, 40, by=spread), softcap=6.0, scale=0.7), 0.3),
        Part(normal(N, 16), Head(normal(300, 16, by=spread), normal(300)), 0.2, ids_V),
    ]


def targets(parts, combination):
    """Return in turn the likeliest, what the first head alone takes for it, and the likeliest but one."""
    logp_NV, logp_KNV = combined_logp(parts, combination)
    best_N2 = logp_NV.topk(2).indices
    target_N = best_N2[:, 0].clone()
    target_N[1::3] = logp_KNV[0, 1::3].argmax(-1)
    target_N[2::3] = best_N2[2::3, 1]
    return target_N


@pytest.mark.parametrize("combination", COMBINATIONS)
@pytest.mark.parametrize("workspace_bytes", [None, 26_000])
def test_it_is_what_full_logits_give(combination, workspace_bytes, executor, device, monkeypatch):
    if workspace_bytes is not None:  # several chunks of several tiles
        monkeypatch.setattr(passes, "columns_of", lambda side, rows: 128)
    parts = three(torch.float32, device, N=7)
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


def test_what_is_kept_of_a_mean_is_added_up_over_tiles(executor, device, monkeypatch):
    monkeypatch.setattr(passes, "columns_of", lambda side, rows: 128)
    parts = three(torch.float32, device, N=5)
    target_N = targets(parts, "mean_prob")
    p_NV = combined_logp(parts, "mean_prob")[0].exp()
    weights = [part.weight for part in parts]
    found = passes.kept_rows(operation._sides(parts, target_N, "mean_prob"), target_N, weights, 2**20)
    at_target_N = p_NV.gather(1, target_N[:, None])[:, 0]
    torch.testing.assert_close(found.at_target_N.double(), at_target_N, atol=0, rtol=1e-5)
    torch.testing.assert_close(found.most_N.double(), p_NV.amax(1), atol=0, rtol=1e-5)


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_float64_is_exact_and_16_bits_are_widened(combination, device):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.bfloat16, 2e-5)):
        parts = three(dtype, device, N=9)
        target_N = targets(parts, combination)
        wanted_N = combined_logp(parts, combination)[0].gather(1, target_N[:, None])[:, 0]
        found = linear_ensemble(parts, target_N, combination)
        torch.testing.assert_close(found.logp_N.double(), wanted_N, atol=tolerance, rtol=tolerance)


def noted_rows(monkeypatch, module, name, place):
    """Note how many rows each call of a function gets in its argument `place`."""
    original, rows = getattr(module, name), []

    def noted(*args):
        given = args[place]
        rows.append(len(given[0] if isinstance(given, tuple) else given))
        return original(*args)

    monkeypatch.setattr(module, name, noted)
    return rows


@pytest.mark.parametrize("looks", [0, 1, 8])
def test_the_likeliest_is_found_however_often_one_looks(looks, monkeypatch):
    """Flat distributions leave most blocks open, eight looks see them all; of twins none is likelier."""
    monkeypatch.setattr(bounds, "LOOKS", looks)
    monkeypatch.setattr(passes, "columns_of", lambda side, rows: 256)
    kept = noted_rows(monkeypatch, bounds, "kept_rows", 1)
    parts = three(torch.float32, "cpu", N=200, V=1000, spread=0.1)
    for part in parts[:2]:
        part.head.weight_VD[13] = part.head.weight_VD[977]
    for part in parts[::2]:
        part.head.bias_V.mul_(0.1)
    parts[0].head.bias_V[13] = parts[0].head.bias_V[977]
    parts[2].ids_V[13] = parts[2].ids_V[977]
    target_N = targets(parts, "mean_prob")
    p_NV = combined_logp(parts, "mean_prob")[0].exp()
    at_N1 = p_NV.gather(1, target_N[:, None])
    near_NV = ((p_NV - at_N1).abs() <= 2 * bounds.NEAR * at_N1).scatter(1, target_N[:, None], False)
    found = linear_ensemble(parts, target_N, "mean_prob", workspace_bytes=10_000).is_top1_N  # of 72 rows
    is_sure_N = ~near_NV.any(1) | (target_N == 13) | (target_N == 977)
    assert (found == (at_N1 >= p_NV * (1 - 1e-9)).all(1))[is_sure_N].all()
    assert found[::3].all()
    assert not found[2::3].all()
    if looks == 8:
        assert sum(kept) <= near_NV.any(1).sum()


def test_where_all_heads_agree_nobody_looks_but_at_what_is_likelier(monkeypatch):
    """A block's bound is then the number of its likeliest id, to the bit; the last block has three ids."""
    looked = noted_rows(monkeypatch, bounds, "_largest_in", 3)
    first = three(torch.float32, "cpu", N=60, V=bounds.BLOCK + 3)[1]
    first.head.weight_VD[bounds.BLOCK :] *= 3
    scales = {1.0: 0.5, 0.8: 0.3, 0.6: 0.2}
    parts = [first._replace(hidden_ND=c * first.hidden_ND, weight=w) for c, w in scales.items()]
    logp_NV = combined_logp(parts, "mean_prob")[0]
    target_N = logp_NV[:, : bounds.BLOCK].argmax(-1)
    is_top_N = logp_NV.argmax(-1) == target_N
    assert torch.equal(linear_ensemble(parts, target_N, "mean_prob").is_top1_N, is_top_N)
    assert sum(looked) == (~is_top_N).sum() > 0


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
    parts = three(torch.float32, "cpu", N=64, V=1000)
    kept = noted_rows(monkeypatch, passes, "_kept_chunk", 1)
    linear_ensemble(parts, targets(parts, "max"), "max", workspace_bytes=3 * 4 * 1000 * 10)
    assert max(kept) <= 10
    assert sum(kept) == 64
    assert default_workspace("cpu") == 256 * 2**20


def test_the_host_does_not_wait(monkeypatch):
    """But for the likeliest of mean_prob, which torch's lines find by bounds."""
    device = FakeDevice(monkeypatch)
    parts = three(torch.float32, "cpu", N=7)
    target_N = targets(parts, "max")
    for part in parts:
        for tensor in (part.hidden_ND, part.ids_V, part.head.weight_VD, part.head.bias_V, target_N):
            if tensor is not None:
                device.put(tensor)
    with device:
        for combination in COMBINATIONS:
            linear_ensemble(parts, target_N, combination, asks_top=combination != "mean_prob")
    assert device.waits == []


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_no_tokens(combination, executor, device):
    parts = three(torch.float32, device, N=0)
    found = linear_ensemble(parts, torch.zeros(0, dtype=torch.int64, device=device), combination)
    assert (found.logp_N.shape, found.members_KN.shape, found.is_top1_N.shape) == ((0,), (3, 0), (0,))


def test_what_does_not_fit_is_named():
    parts = three(torch.float32, "cpu", N=2)
    target_N = torch.tensor([3, 331])
    with pytest.raises(ValueError, match=r"ids in \[0, 331\) of the first head: got 331"):
        linear_ensemble(parts, target_N, "max")
    target_N[1] = 5
    with pytest.raises(ValueError, match="of sum 1"):
        linear_ensemble(parts[:2], target_N, "mean_prob")
    with pytest.raises(ValueError, match=r"parts\[1\].hidden_ND must hold one row for each of 2 targets"):
        linear_ensemble([parts[0], parts[1]._replace(hidden_ND=torch.zeros(3, 40))], target_N, "max")
    with pytest.raises(ValueError, match=r"parts\[1\] must have an id for each of the 331"):
        linear_ensemble([parts[0], parts[2]._replace(ids_V=None)], target_N, "max")
    parts[1].hidden_ND[1, 0] = torch.nan
    for combination in COMBINATIONS:
        with pytest.raises(ValueError, match=r"row 1 (it )?holds NaN or infinity"):
            linear_ensemble(parts, target_N, combination, workspace_bytes=1)  # one row at a time
