"""linear_logprob against its float64 definition, in every mode, through torch's and Triton's epilogues.

Faults tried, each caught by a test here: the running maximum not updated across tiles; the sum not
rescaled when it rises; the frozen head's accumulator not rescaled; the target's column off by one tile;
dz at the target left as −a p; the target kept in the frozen accumulator; one part's factor given to both;
a kept tile overwritten by the first backward; the softcap's slope dropped; α dropped from the gradient;
a mask dropped in either kernel; ignored rows pulling; padding rows counted; bias gradient not written.
"""

import math

import pytest
import torch

from tests.budget import assert_within_budget
from tokenkit.kernels import launch
from tokenkit.kernels.head import products
from tokenkit.kernels.linear_logprob import IGNORE, linear_logprob, plan, split_vocabulary, tiled
from tokenkit.kernels.linear_logprob import operation as module
from tokenkit.kernels.reference import linear_logprob as reference
from tokenkit.structs import Head

CACHED, RECOMPUTE = 1 << 30, 1 << 14  # room for a tile: with none, other kernels run
SHAPES = [
    (1, 1, 1),  # nothing to tile
    (7, 33, 16),  # odd everywhere: three tiles, the last one of a single column
    (16, 32, 32),  # exact multiples
    (17, 49, 24),  # one past everything
]
NAMES = ("logp", "subset_logp", "is_top1", "lse", "dhidden", "dweight", "dbias")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of 16 columns in programs of 8, so that small shapes cross every boundary."""
    monkeypatch.setattr(plan, "COLUMNS", (16, 16))
    monkeypatch.setattr(plan, "RING_COLUMNS", 32)
    monkeypatch.setattr(tiled, "BLOCK_V", 8)
    monkeypatch.setattr(tiled, "BLOCK_D", 16)


def make(N, V, D, device, *, scale=1.0, bias=True, subset=True):
    """Return hidden, weight, bias, target (one row ignored), subset mask, and unequal upstream gradients."""
    hidden = torch.randn(N, D, device=device)
    weight = scale * torch.randn(V, D, device=device) / D**0.5
    bias_V = torch.randn(V, device=device) if bias else None
    target = torch.randint(V, (N,), device=device)
    if N > 1:
        target[N // 2] = IGNORE
    mask = torch.rand(V, device=device) < 0.4
    mask[V // 2] = True
    return hidden, weight, bias_V, target, mask if subset else None, torch.rand(3, N, device=device)


def run(function, dtype, inputs, *, frozen=False, head=None, **options):
    """Return the results by NAMES of `function` on copies of the inputs in `dtype`."""
    hidden, weight, bias, target, mask, upstream = inputs
    hidden = hidden.detach().to(dtype).requires_grad_()
    weight = weight.detach().to(dtype).requires_grad_(not frozen)
    bias = None if bias is None else bias.detach().to(dtype).requires_grad_(not frozen)
    result = function(hidden, Head(weight, bias, **(head or {})), target, subset_V=mask, **options)
    terms = (result.logp_N, result.subset_logp_N, result.lse_N)
    total = sum((u * x).sum() for u, x in zip(upstream, terms, strict=True) if x is not None)
    total.backward()
    values = [*result, hidden.grad, weight.grad, None if bias is None else bias.grad]
    return {name: x.detach() for name, x in zip(NAMES, values, strict=True) if x is not None}


def assert_like_eager(dtype, inputs, **options):
    workspace_bytes = options.pop("workspace_bytes", RECOMPUTE)
    rounded = tuple(
        x.to(dtype) if x is not None and x.is_floating_point() and i < 3 else x for i, x in enumerate(inputs)
    )
    kernel = run(linear_logprob, dtype, rounded, workspace_bytes=workspace_bytes, **options)
    eager = run(reference.linear_logprob, dtype, rounded, **options)
    truth = run(reference.linear_logprob, torch.float64, rounded, **options)
    assert kernel.keys() == truth.keys()
    for name, value in truth.items():
        if name != "is_top1":
            assert_within_budget(name, kernel[name], eager[name], value)
    assert torch.equal(kernel["is_top1"], truth["is_top1"])


MODES = pytest.mark.parametrize(
    "mode",
    [
        {"workspace_bytes": RECOMPUTE},
        {"workspace_bytes": CACHED},
        {"frozen": True},
    ],
    ids=["recompute", "cached", "frozen"],
)


@pytest.mark.parametrize("scale", [1.0, 20.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(("N", "V", "D"), SHAPES)
@MODES
def test_matches_float64(mode, N, V, D, dtype, scale, executor, device):
    assert_like_eager(dtype, make(N, V, D, device, scale=scale), **mode)


@pytest.mark.parametrize(
    "head", [{"softcap": 4.0, "scale": 1.7}, {"vocab_size": 50}], ids=["softcap", "padded"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@MODES
def test_head_options_reach_values_and_gradients(mode, dtype, head, executor, device):
    hidden, weight, bias, target, mask, upstream = make(9, 65, 16, device)
    V = head.get("vocab_size", 65)
    inputs = hidden, weight, bias, target.clamp(max=V - 1), mask[:V], upstream
    assert_like_eager(dtype, inputs, head=head, temperature=0.6, **mode)


@MODES
def test_without_subset_or_bias(mode, executor, device):
    inputs = make(9, 65, 16, device, bias=False, subset=False)
    inputs = (*inputs[:5], inputs[5])
    assert_like_eager(torch.float32, inputs, **mode)


@MODES
def test_a_certain_target_keeps_its_small_gradient(mode, executor, device):
    """p > 0.999: 1 − p in 16 bits would be 0 or 100 % off."""
    hidden = torch.eye(4, 8, device=device)
    weight = 12.0 * torch.eye(40, 8, device=device)
    target = torch.arange(4, device=device)
    mask = torch.arange(40, device=device) < 2
    inputs = (hidden, weight, None, target, mask, torch.tensor([[1.0, 2.0, 0.5, 3.0]] * 3, device=device))
    truth = run(reference.linear_logprob, torch.float64, inputs)
    assert 0.999 < truth["logp"].exp().min() < 0.9999
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.bfloat16, 2**-7)):
        kernel = run(linear_logprob, dtype, inputs, **{"workspace_bytes": RECOMPUTE, **mode})
        for name in ("logp", "subset_logp", "dhidden"):
            torch.testing.assert_close(
                kernel[name].double(), truth[name], rtol=tolerance, atol=2e-6, msg=name
            )


@pytest.mark.parametrize("sure", [1e-3, 1e-6, 1e-9])
@pytest.mark.parametrize("offset", [0.0, 40.0, 80.0, -80.0])
@MODES
def test_a_very_sure_target_keeps_every_digit_of_its_gradient(mode, offset, sure, executor, device):
    """Logits of any size and p of 1 − 1e-9: with the target in the sum float32 would know 1 − p to 1e-7."""
    V, N = 300, 6
    generator = torch.Generator().manual_seed(3)
    gap = math.log(sure / V) + torch.randn(N, V, generator=generator)
    target = torch.arange(N) * 40 % V
    z = torch.round((offset + gap.scatter(1, target[:, None], 0.0)) * 2**12) / 2**12
    # the identity times a weight: products are exact, so all that is measured is what follows them
    upstream = torch.tensor([1.0, 0.5, 0.0])[:, None].expand(3, N)
    inputs = (torch.eye(N), z.T.contiguous(), None, target, torch.arange(V) < 90, upstream)
    inputs = tuple(x if x is None else x.to(device) for x in inputs)
    truth = run(reference.linear_logprob, torch.float64, inputs)
    kernel = run(linear_logprob, torch.float32, inputs, **{"workspace_bytes": RECOMPUTE, **mode})
    for name in ("logp", "subset_logp", "dhidden"):
        error = (kernel[name].double() - truth[name]).norm() / truth[name].norm()
        assert error < 1e-5, (name, error)


@MODES
def test_logits_of_80_neither_overflow_nor_lose_the_subset(mode, executor, device):
    """Rows where the subset's mass is e^-160: its log and its gradient are those of float64."""
    weight = torch.zeros(40, 4, device=device)
    weight[20, 0], weight[3, 0], weight[37, 1] = 80.0, -80.0, 80.0
    weight[:, 2] = torch.linspace(-1, 1, 40, device=device)
    hidden = torch.tensor([[1.0, 0, 1, 0], [-1.0, 0, 1, 0], [0.0, 1, 1, 0]], device=device)
    mask = torch.zeros(40, dtype=torch.bool, device=device)
    mask[3] = mask[4] = True
    target = torch.tensor([3, 3, 37], device=device)
    inputs = (hidden, weight, None, target, mask, torch.rand(3, 3, device=device))
    truth = run(reference.linear_logprob, torch.float64, inputs)
    kernel = run(linear_logprob, torch.float32, inputs, **{"workspace_bytes": RECOMPUTE, **mode})
    assert truth["subset_logp"].min() < -75
    for name in ("logp", "subset_logp", "lse", "dhidden"):
        torch.testing.assert_close(kernel[name].double(), truth[name], rtol=1e-5, atol=1e-6, msg=name)


@MODES
def test_16_bit_inputs_lose_only_their_own_rounding(mode, executor, device):
    """Logits and sums are float32: logp is exact to 1e-5, gradients to the rounding of dz."""
    hidden, weight, _, target, mask, upstream = make(17, 65, 24, device, scale=8.0)
    inputs = (hidden.bfloat16(), weight.bfloat16(), None, target, mask, upstream)
    truth = run(reference.linear_logprob, torch.float64, inputs)
    kernel = run(linear_logprob, torch.bfloat16, inputs, **{"workspace_bytes": RECOMPUTE, **mode})
    for name, tolerance in (("logp", 1e-5), ("subset_logp", 1e-5), ("lse", 1e-6), ("dhidden", 5e-3)):
        error = (kernel[name].double() - truth[name]).abs().max() / truth[name].abs().max()
        assert error <= tolerance, (name, error)


def test_the_top_token_is_known_whichever_part_it_is_in(executor, device):
    """A vocabulary of two parts; targets are the top token, the second, and one of two that tie."""
    weight = torch.zeros(40, 3, device=device)
    weight[[5, 30, 31], 0] = torch.tensor([9.0, 8.0, 7.0], device=device)
    weight[[5, 30, 31], 1] = torch.tensor([7.0, 8.0, 9.0], device=device)
    weight[[5, 30], 2] = 9.0
    hidden = torch.eye(3, device=device).repeat_interleave(2, 0)
    target = torch.tensor([5, 30, 31, 30, 5, 31], device=device)
    for mask in (torch.arange(40, device=device) >= 30, torch.arange(40, device=device) < 30):
        result = linear_logprob(hidden, Head(weight), target, subset_V=mask)
        assert result.is_top1_N.tolist() == [True, False, True, False, True, False]


def test_a_16_bit_cache_keeps_small_probabilities(executor, device):
    """e^-25 is below float16's smallest number; its row of dW is right all the same."""
    hidden = torch.tensor([[5.0, 1.0]], device=device, dtype=torch.bfloat16)
    weight = torch.zeros(40, 2, device=device, dtype=torch.bfloat16)
    weight[7, 0] = 5.0
    upstream = torch.tensor([[1.0], [0.0], [0.0]], device=device)
    inputs = (hidden, weight, None, torch.tensor([7], device=device), None, upstream)
    truth = run(reference.linear_logprob, torch.float64, inputs)
    kernel = run(linear_logprob, torch.bfloat16, inputs, workspace_bytes=CACHED)
    torch.testing.assert_close(kernel["dweight"][8].double(), truth["dweight"][8], rtol=1e-2, atol=0)


@MODES
def test_modes_are_chosen_by_gradients_and_budget(mode, device):
    hidden, weight, _, _, _, _ = make(4, 40, 8, device)
    head = Head(weight.requires_grad_(not mode.get("frozen")))
    budget = mode.get("workspace_bytes", 0)
    expected = {RECOMPUTE: "recompute", CACHED: "cached"}.get(mode.get("workspace_bytes"), "frozen")
    assert module._mode(hidden.requires_grad_(), head, budget) == expected
    with torch.no_grad():
        assert module._mode(hidden, head, CACHED) == "statistics"


@MODES
def test_gradcheck(mode, device):
    hidden, weight, bias, target, mask, _ = make(3, 33, 5, device)
    hidden = hidden.double().requires_grad_()
    weight, bias = (x.double().requires_grad_(not mode.get("frozen")) for x in (weight, bias))

    def values(*tensors):
        hidden, weight, bias = tensors
        head = Head(weight, bias, softcap=3.0 if mode.get("frozen") else None, scale=0.7)
        budget = mode.get("workspace_bytes", 0)
        result = linear_logprob(hidden, head, target, subset_V=mask, workspace_bytes=budget)
        return result.logp_N, result.subset_logp_N, result.lse_N

    assert torch.autograd.gradcheck(values, (hidden, weight, bias))


@MODES
def test_a_second_backward_gives_the_same(mode, executor, device):
    hidden, weight, _, target, mask, _ = make(9, 40, 8, device)
    hidden.requires_grad_()
    weight.requires_grad_(not mode.get("frozen"))
    inputs = [hidden] if mode.get("frozen") else [hidden, weight]
    budget = mode.get("workspace_bytes", 0)
    result = linear_logprob(hidden, Head(weight), target, subset_V=mask, workspace_bytes=budget)
    total = result.logp_N.sum() + result.subset_logp_N.sum()
    first = torch.autograd.grad(total, inputs, retain_graph=True)
    second = torch.autograd.grad(total, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@MODES
@pytest.mark.parametrize("N", [0, 4])
def test_ignored_rows_are_zero_and_pull_nothing(mode, N, executor, device):
    hidden = torch.randn(N, 8, device=device, requires_grad=True)
    weight = torch.randn(40, 8, device=device, requires_grad=not mode.get("frozen"))
    target = torch.full((N,), IGNORE, device=device)
    budget = mode.get("workspace_bytes", 0)
    result = linear_logprob(hidden, Head(weight), target, workspace_bytes=budget)
    result.logp_N.sum().backward()
    assert result.logp_N.shape == (N,)
    assert not result.logp_N.any()
    assert not result.is_top1_N.any()
    assert not hidden.grad.any()
    assert mode.get("frozen") or not weight.grad.any()


@MODES
def test_an_ignored_row_still_has_its_mass_and_its_gradient(mode, executor, device):
    hidden, weight, _, _, mask, upstream = make(5, 40, 8, device)
    target = torch.full((5,), IGNORE, device=device)
    assert_like_eager(torch.float32, (hidden, weight, None, target, mask, upstream), **mode)


@pytest.mark.parametrize("mode", [{}, {"softcap": True}], ids=["plain", "softcap"])
def test_a_row_of_a_tile_may_be_several_blocks(mode, device, monkeypatch):
    """As where few tokens make wide tiles; more than fits a program's registers."""
    monkeypatch.setattr(launch, "INTERPRET", device == "cpu")
    monkeypatch.setattr(tiled, "FOLD_BLOCK_V", 4)
    head = {"softcap": 4.0} if mode else {}
    assert_like_eager(torch.float32, make(5, 33, 8, device), head=head, workspace_bytes=RECOMPUTE)


@MODES
def test_repeats_bit_for_bit(mode, executor, device):
    inputs = make(9, 33, 8, device)
    options = {"workspace_bytes": RECOMPUTE, **mode}
    first, second = (run(linear_logprob, torch.float32, inputs, **options) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_no_product_that_nobody_needs(device, monkeypatch):
    """A frozen head multiplies no dW, constant hidden states no dX: autograd would drop both silently."""
    calls = []
    for owner, name in ((products, "write_product"), (products, "add_product"), (tiled, "add_product")):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, _o=original, _n=name: (calls.append(_n), _o(*args))[1])
    hidden, weight, _, target, _, _ = make(4, 40, 8, device)
    linear_logprob(hidden, Head(weight.requires_grad_()), target).logp_N.sum().backward()
    assert set(calls) == {"write_product"}
    calls.clear()
    linear_logprob(hidden.requires_grad_(), Head(weight.detach()), target).logp_N.sum().backward()
    assert set(calls) == {"add_product"}
    calls.clear()
    with torch.no_grad():
        linear_logprob(hidden, Head(weight), target)
    assert not calls


def test_the_head_option_of_16_bit_cache_is_refused_under_a_softcap(device):
    hidden, weight, _, _, _, _ = make(4, 40, 8, device)
    head = Head(weight.requires_grad_(), softcap=5.0)
    assert module._mode(hidden, head, CACHED) == "recompute"


def test_a_subset_may_be_split_beforehand_and_be_shorter_than_the_head(device):
    hidden, weight, _, target, mask, _ = make(6, 40, 8, device)
    short = mask[:30]
    short[0] = True
    padded = torch.nn.functional.pad(short, (0, 10))
    values = [
        linear_logprob(hidden, Head(weight), target, subset_V=x).subset_logp_N
        for x in (padded, short, split_vocabulary(short))
    ]
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[0], values[2])


def test_the_whole_vocabulary_as_subset_has_mass_one(executor, device):
    hidden, weight, _, target, _, upstream = make(6, 40, 8, device)
    everything = torch.ones(40, dtype=torch.bool, device=device)
    result = run(linear_logprob, torch.float32, (hidden, weight, None, target, everything, upstream))
    assert not result["subset_logp"].any()
    assert torch.isfinite(result["dhidden"]).all()


BAD = {
    "hidden and weight differ": (dict(weight=torch.zeros(5, 9)), r"\(4, 8\) and \(5, 9\)"),
    "targets per row": (dict(target=torch.zeros(3, dtype=torch.long)), r"one int64 id per row .* \(4\)"),
    "dtypes differ": (dict(weight=torch.zeros(5, 8).half()), "cast the head once"),
    "target outside": (dict(target=torch.tensor([0, 1, 5, 2])), "the other model's tokenizer"),
    "negative target": (dict(target=torch.tensor([0, 1, -1, 2])), r"-1 to 2"),
    "subset too long": (dict(subset=torch.ones(6, dtype=torch.bool)), "covers 6 ids but the head has 5"),
    "subset empty": (dict(subset=torch.zeros(5, dtype=torch.bool)), "holds no id"),
    "subset not bool": (dict(subset=torch.ones(5)), "bool mask"),
    "vocab_size": (dict(vocab_size=6), r"\[1, 5\]"),
    "temperature": (dict(temperature=0.0), "temperature must be positive"),
    "temperature nan": (dict(temperature=float("nan")), "temperature must be positive"),
    "softcap": (dict(softcap=-1.0), "softcap must be positive"),
    "workspace": (dict(workspace_bytes=-1), "workspace_bytes must be at least 0: got -1"),
    "bias length": (dict(bias_V=torch.zeros(4)), r"bias_V must hold one number per row .*\(5\)"),
    "bias dtype": (dict(bias_V=torch.zeros(5).double()), "bias_V is torch.float64"),
    "integers": (dict(target=torch.zeros(4, dtype=torch.int32)), "int64"),
    "devices differ": (dict(target=torch.zeros(4, dtype=torch.long, device="meta")), "is on meta"),
    "hidden NaN": (
        dict(poison=(2, float("nan"))),
        "hidden_ND and its head must be finite: in row 2 it holds",
    ),
    "hidden inf": (
        dict(poison=(1, float("inf"))),
        "hidden_ND and its head must be finite: in row 1 it holds",
    ),
    "hidden inf, softcap": (
        dict(poison=(3, float("inf")), softcap=5.0),
        "hidden_ND and its head must be finite: in row 3 it holds",
    ),
    "weight NaN": (dict(weight=torch.full((5, 8), torch.nan)), "weight_VD and bias_V"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    change, message = BAD[name]
    fields = {key: change.get(key) for key in ("bias_V", "softcap", "vocab_size")}
    head = Head(change.get("weight", torch.ones(5, 8)), **fields)
    target = change.get("target", torch.zeros(4, dtype=torch.long))
    hidden = torch.zeros(4, 8)
    row, value = change.get("poison", (0, 0.0))
    hidden[row, 5] = value
    options = {key: change[key] for key in ("temperature", "workspace_bytes") if key in change}
    with pytest.raises(ValueError, match=message):
        linear_logprob(hidden, head, target, subset_V=change.get("subset"), **options)
