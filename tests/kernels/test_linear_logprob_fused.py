"""The kernels without a workspace against float64, in every mode: the twin of test_linear_logprob.py.

Faults tried, each caught: the maximum of a stretch not joined; a stretch's sum not rescaled; the running sum
not rescaled when the maximum rises; the mask behind the vocabulary, or behind the tokens, dropped; the
subset's mask read from the tile's start; the target looked for in the wrong tile; the softcap's slope left
out of dz, or of the frozen mean; the target kept in the frozen mean; the factor of one part given to both;
the gradient at the target without its upstream factor; dW without its last chunk of channels.
"""

import pytest
import torch

from tests.kernels.test_linear_logprob import assert_like_eager, make, run
from tests.kernels.test_linear_logprob import reference as definition
from tokenkit.kernels import launch
from tokenkit.kernels.head.call import head_fields
from tokenkit.kernels.linear_logprob import IGNORE, linear_logprob, plan, tiled
from tokenkit.kernels.linear_logprob import fused as module
from tokenkit.structs import Head

pytestmark = pytest.mark.usefixtures("triton_runs", "small_blocks")
SHAPES = [
    (1, 3, 16),  # less than any block
    (7, 33, 16),
    (32, 64, 32),  # exact multiples
    (17, 49, 40),  # one past everything, channels in two chunks
]
MODES = pytest.mark.parametrize("mode", [{}, {"frozen": True}], ids=["recompute", "frozen"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])


@pytest.fixture
def triton_runs(monkeypatch, device):
    """torch has the loop alone."""
    if device == "cpu":
        monkeypatch.setattr(launch, "INTERPRET", True)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 16: small shapes cross every boundary. No loop may help out."""
    cut = module.Blocks(16, 16, 16, 4, 1, 32)
    monkeypatch.setattr(module, "BLOCKS", {name: {80: cut} for name in module.BLOCKS})
    monkeypatch.setattr(module, "_architecture", lambda hidden: 90)
    for name in ("forward", "backward"):
        monkeypatch.setattr(tiled, name, refuse)


def refuse(*arguments):
    raise AssertionError("the loop ran")


@pytest.mark.parametrize("scale", [1.0, 20.0], ids=["flat", "peaked"])
@DTYPES
@pytest.mark.parametrize(("N", "V", "D"), SHAPES)
@MODES
def test_matches_float64(mode, N, V, D, dtype, scale, device):
    assert_like_eager(dtype, make(N, V, D, device, scale=scale), workspace_bytes=0, **mode)


@pytest.mark.parametrize(
    "head", [{"softcap": 4.0, "scale": 1.7}, {"vocab_size": 50}], ids=["softcap", "padded"]
)
@DTYPES
@MODES
def test_head_options_reach_values_and_gradients(mode, dtype, head, device):
    hidden, weight, bias, target, mask, upstream = make(9, 65, 16, device)
    V = head.get("vocab_size", 65)
    inputs = hidden, weight, bias, target.clamp(max=V - 1), mask[:V], upstream
    assert_like_eager(dtype, inputs, head=head, temperature=0.6, workspace_bytes=0, **mode)


@DTYPES
def test_plain_loads_do_what_descriptors_do(dtype, device, monkeypatch):
    inputs = make(17, 49, 40, device)
    options = {"workspace_bytes": 0}
    described = run(linear_logprob, dtype, inputs, **options)
    monkeypatch.setattr(module, "_architecture", lambda hidden: 80)
    loaded = run(linear_logprob, dtype, inputs, **options)
    assert all(torch.equal(described[name], loaded[name]) for name in described)


@MODES
def test_without_subset_or_bias(mode, device):
    assert_like_eager(
        torch.float32, make(19, 65, 16, device, bias=False, subset=False), workspace_bytes=0, **mode
    )


@MODES
def test_logits_of_80_neither_overflow_nor_lose_the_subset(mode, device):
    """The subset's mass is e^-160, in the first and in the last tile, and some tiles hold none of it."""
    weight = torch.zeros(70, 16, device=device)
    weight[20, 0], weight[3, 0], weight[67, 1] = 80.0, -80.0, 80.0
    weight[:, 2] = torch.linspace(-1, 1, 70, device=device)
    hidden = torch.zeros(3, 16, device=device)
    hidden[:, 2], hidden[0, 0], hidden[1, 0], hidden[2, 1] = 1, 1, -1, 1
    mask = torch.zeros(70, dtype=torch.bool, device=device)
    mask[[3, 4, 66]] = True
    target = torch.tensor([3, 3, 67], device=device)
    inputs = (hidden, weight, None, target, mask, torch.rand(3, 3, device=device))
    truth = run(definition.linear_logprob, torch.float64, inputs)
    found = run(linear_logprob, torch.float32, inputs, workspace_bytes=0, **mode)
    assert truth["subset_logp"].min() < -75
    for name in ("logp", "subset_logp", "lse", "dhidden"):
        torch.testing.assert_close(found[name].double(), truth[name], rtol=1e-5, atol=1e-6, msg=name)


@MODES
def test_blocks_that_reach_behind_the_end_add_nothing_to_logits_of_minus_200(mode, device):
    """There z is 0, and exp(0 + 200) is no number: times the zeros behind the end it would be NaN."""
    hidden, weight, bias, target, mask, upstream = make(17, 49, 16, device)
    inputs = (hidden, weight, bias - 200, target, mask, upstream)
    truth = run(definition.linear_logprob, torch.float64, inputs)
    found = run(linear_logprob, torch.float32, inputs, workspace_bytes=0, **mode)
    for name, value in found.items():
        torch.testing.assert_close(value.to(truth[name].dtype), truth[name], rtol=1e-4, atol=1e-4, msg=name)


@MODES
@pytest.mark.parametrize("most", [1, 1 << 20], ids=["one stretch", "stretches"])
def test_stretches_join_to_the_same(mode, most, device, monkeypatch):
    monkeypatch.setattr(module, "PARTIAL_BYTES", most)
    assert_like_eager(torch.float32, make(9, 130, 16, device, scale=8.0), workspace_bytes=0, **mode)


@MODES
def test_repeats_bit_for_bit(mode, device):
    inputs = make(9, 65, 16, device)
    first, second = (run(linear_logprob, torch.float32, inputs, workspace_bytes=0, **mode) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias"])
def test_what_is_trained_alone_has_its_gradient(trained, device):
    hidden, weight, bias, target, mask, upstream = make(9, 40, 16, device)
    found = []
    for function, options in ((linear_logprob, {"workspace_bytes": 0}), (definition.linear_logprob, {})):
        parameters = {"hidden": hidden, "weight": weight, "bias": bias}
        parameters = {name: x.detach().requires_grad_(name == trained) for name, x in parameters.items()}
        head = Head(parameters["weight"], parameters["bias"])
        result = function(parameters["hidden"], head, target, subset_V=mask, **options)
        ((result.logp_N + result.subset_logp_N) * upstream[0]).sum().backward()
        found.append(parameters[trained].grad)
    torch.testing.assert_close(*found)


def test_ignored_rows_pull_nothing(device):
    hidden = torch.randn(20, 16, device=device, requires_grad=True)
    weight = torch.randn(40, 16, device=device, requires_grad=True)
    target = torch.full((20,), IGNORE, device=device)
    linear_logprob(hidden, Head(weight), target, workspace_bytes=0).logp_N.sum().backward()
    assert not hidden.grad.any()
    assert not weight.grad.any()


@pytest.mark.parametrize(
    ("mode", "D", "budget", "expected"),
    [
        ("recompute", 64, 0, (True, True)),
        ("recompute", 64, 1 << 20, (False, False)),  # room for a tile
        ("recompute", 12, 0, (False, False)),  # rows of 24 bytes
        ("recompute", 2048, 0, (True, False)),
        ("frozen", 256, 0, (True, True)),
        ("frozen", 512, 0, (False, False)),
    ],
)
def test_the_budget_and_the_width_choose_the_executor(mode, D, budget, expected, device):
    hidden = torch.zeros(32, D, device=device, dtype=torch.bfloat16)
    made = plan_of(hidden, mode, budget)
    assert tuple(module.takes(made, backward=x) for x in (False, True)) == expected


def plan_of(hidden, mode, budget):
    target = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
    head = head_fields(Head(hidden), tensors=False)
    call = {"mode": mode, "temperature": 1.0, "workspace_bytes": budget, "head": head}
    return plan.make_plan((hidden, hidden, None), target, [], call)
