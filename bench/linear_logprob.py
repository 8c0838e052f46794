"""Time, memory and error of linear_logprob against eager and compiled PyTorch and public kernels.

    python bench/linear_logprob.py                          the default case of this device
    python bench/linear_logprob.py --grid --save DIR        kernels.md's grid, one JSON per case (GPU)
    python bench/linear_logprob.py --model NAME_OR_PATH     hidden states of a trained model, not random
    pytest bench/linear_logprob.py --benchmark-only

One row per contender: forward and backward, forward alone, the ratio to its floor (the cuBLAS GEMMs of
that shape and number, timed in the same run), useful TFLOP/s (recomputation does not count), memory above
inputs split into outputs and workspace, and the largest error of logp and dX against float64. A contender
that is wrong is not timed. Peers (torch's linear_cross_entropy, Liger, TRL, cut-cross-entropy) run where they
are installed; they compute no mass of a subset.
"""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from harness import Cases, Rows, Step, as_row, measure_cases, peak_bytes, time_interleaved

from tokenkit.kernels.linear_logprob import IGNORE, linear_logprob, split_vocabulary
from tokenkit.kernels.reference.linear_logprob import linear_logprob as reference
from tokenkit.structs import Head

CHECKED_ROWS = 64
PEERS = ("F.linear_cross_entropy", "Liger (sum)", "TRL", "CCE", "CCE exact", "CCE compiled", "compiled")
PEER_ERRORS = (ImportError, TypeError, ValueError, RuntimeError, NotImplementedError)
ALL_MEMORY = 1 << 40
A_TILE = 256 * 2**20
"""Bytes: room for tiles of z. `_ours` lowers it until exp(z - m) does not fit."""


@dataclass(frozen=True)
class Case:
    """Sizes of one measurement."""

    tokens: int = 8192
    vocab: int = 128_256
    hidden: int = 4096
    masked: float = 0.0
    """Share of ignored rows."""

    def name(self) -> str:
        """Return the file name of its results."""
        return f"linear_logprob_{self.tokens}x{self.hidden}x{self.vocab}_masked{round(100 * self.masked)}"


CPU_CASE = Case(tokens=1024, vocab=32_000, hidden=512)
TINY_CASE = Case(tokens=64, vocab=1000, hidden=32)


def grid() -> Iterator[Case]:
    """kernels.md's grid: every vocabulary at every width, then lengths and masks at one of them."""
    for hidden in (1024, 2048, 4096):
        for vocab in (32_000, 128_256, 151_936, 256_000):
            yield Case(hidden=hidden, vocab=vocab)
    for tokens in (1024, 2048, 4096, 16_384, 32_768):
        yield Case(tokens=tokens)
    yield Case(masked=0.5)


class Problem:
    """Inputs of a case: hidden, weight and target, an upstream gradient, a third of the ids as subset."""

    def __init__(self, case: Case, device: str, model: str | None = None):
        torch.manual_seed(0)
        self.case = case
        self.dtype = torch.float32 if device == "cpu" else torch.bfloat16
        if model is None:
            hidden = torch.randn(case.tokens, case.hidden, device=device)
            weight = torch.randn(case.vocab, case.hidden, device=device) / case.hidden**0.5
        else:
            hidden, weight = states_of(model, case.tokens, device)
            self.case = replace(case, vocab=len(weight), hidden=weight.shape[1])
        self.hidden = hidden.to(self.dtype).requires_grad_()
        self.weight = weight.to(self.dtype).requires_grad_()
        self.target = torch.randint(self.case.vocab, (case.tokens,), device=device)
        self.target[torch.rand(case.tokens, device=device) < case.masked] = IGNORE
        self.subset_V = torch.rand(self.case.vocab, device=device) < 0.35
        self.split = split_vocabulary(self.subset_V)
        self.upstream = torch.rand(case.tokens, device=device)


def states_of(model: str, tokens: int, device: str) -> tuple[Tensor, Tensor]:
    """Return last hidden states of random ids, and the head, of a causal language model."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model).to(device)
    weight = network.get_output_embeddings().weight.detach()
    length = min(256, tokens)
    ids = torch.randint(len(weight), (tokens // length, length), device=device)
    with torch.no_grad():
        return network.base_model(input_ids=ids).last_hidden_state.flatten(0, 1), weight


Loss = Callable[[Problem, Tensor, Tensor], Tensor]


def _ours(problem: Problem, hidden: Tensor, weight: Tensor, *, budget: int, mass: bool) -> Tensor:
    if budget == A_TILE:
        budget = min(budget, len(hidden) * len(weight) * hidden.itemsize)
    result = linear_logprob(
        hidden, Head(weight), problem.target[: len(hidden)],
        subset_V=problem.split if mass else None, workspace_bytes=budget,
    )  # fmt: skip
    return result.logp_N if result.subset_logp_N is None else result.logp_N + result.subset_logp_N


def _eager(problem: Problem, hidden: Tensor, weight: Tensor, *, mass: bool) -> Tensor:
    subset = problem.subset_V if mass else None
    result = reference(hidden, Head(weight), problem.target[: len(hidden)], subset_V=subset)
    return result.logp_N if result.subset_logp_N is None else result.logp_N + result.subset_logp_N


def _plain_logp(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    logits = (hidden @ weight.T).float()
    picked = logits.gather(-1, target.clamp_min(0)[:, None])[:, 0]
    return (picked - logits.logsumexp(-1)).where(target != IGNORE, 0)


def _compiled(problem: Problem, hidden: Tensor, weight: Tensor, *, function: Callable[..., Tensor]) -> Tensor:
    return function(hidden, weight, problem.target[: len(hidden)])


def _torch_fused(problem: Problem, hidden: Tensor, weight: Tensor) -> Tensor:
    target = problem.target[: len(hidden)]
    return -torch.nn.functional.linear_cross_entropy(hidden, weight, target, reduction="none")


def _cce(problem: Problem, hidden: Tensor, weight: Tensor, *, kind: str) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, problem.target[: len(hidden)], impl=kind, reduction="none")


def _liger(problem: Problem, hidden: Tensor, weight: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32)
    return -loss(weight, hidden, problem.target[: len(hidden)])


def _trl(problem: Problem, hidden: Tensor, weight: Tensor) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction

    target = problem.target[: len(hidden)]
    columns = 8192 if hidden.is_cuda else 4096
    found = ChunkedLogProbFunction.apply(
        hidden, weight, None, target.clamp_min(0), 1.0, columns, None, 1.0, ()
    )
    return found[0].where(target != IGNORE, 0)


def contenders(device: str) -> dict[str, tuple[Loss, int, bool]]:
    """Return by name: the function, its GEMMs (of 2·N·V·D), and whether it needs dW."""
    found: dict[str, tuple[Loss, int, bool]] = {
        "recompute": (partial(_ours, budget=A_TILE, mass=False), 4, True),
        "recompute + mass": (partial(_ours, budget=A_TILE, mass=True), 4, True),
        "cached + mass": (partial(_ours, budget=ALL_MEMORY, mass=True), 3, True),
        "frozen + mass": (partial(_ours, budget=A_TILE, mass=True), 2, False),
        "eager": (partial(_eager, mass=False), 3, True),
        "eager + mass": (partial(_eager, mass=True), 3, True),
        "compiled": (partial(_compiled, function=torch.compile(_plain_logp)), 3, True),
    }
    if hasattr(torch.nn.functional, "linear_cross_entropy"):
        found["F.linear_cross_entropy"] = (_torch_fused, 4, True)
    if device != "cpu":  # on a CPU the loop runs whatever the budget
        found["fused"] = (partial(_ours, budget=0, mass=False), 4, True)
        found["fused + mass"] = (partial(_ours, budget=0, mass=True), 4, True)
        found["fused frozen + mass"] = (partial(_ours, budget=0, mass=True), 2, False)
    if device != "cpu" and importlib.util.find_spec("liger_kernel"):
        found["Liger (sum)"] = (_liger, 3, True)
    if importlib.util.find_spec("trl"):
        found["TRL"] = (_trl, 4, True)
    if importlib.util.find_spec("cut_cross_entropy"):
        kinds = (
            {"CCE": "cce", "CCE exact": "cce_exact"} if device != "cpu" else {"CCE compiled": "torch_compile"}
        )
        found |= {name: (partial(_cce, kind=kind), 4, True) for name, kind in kinds.items()}
    return found


def step_of(problem: Problem, loss: Loss, train_head: bool) -> Step:
    """Return forward and backward with unequal upstream gradients."""

    def step() -> None:
        problem.hidden.grad = problem.weight.grad = None
        weight = problem.weight if train_head else problem.weight.detach()
        value = loss(problem, problem.hidden, weight)
        value.backward(problem.upstream if value.ndim else None)

    return step


def forward_of(problem: Problem, loss: Loss) -> Step:
    """Return the forward alone, without gradients."""

    def forward() -> None:
        with torch.no_grad():
            loss(problem, problem.hidden, problem.weight)

    return forward


def error_of(problem: Problem, name: str, loss: Loss, train_head: bool) -> dict[str, float]:
    """Return the largest error of logp (nats) and dX (of the largest entry) against float64, first rows."""
    results = []
    for function, dtype in ((loss, problem.dtype), (partial(_eager, mass="mass" in name), torch.float64)):
        hidden = problem.hidden[:CHECKED_ROWS].detach().to(dtype).requires_grad_()
        weight = problem.weight.detach().to(dtype).requires_grad_(train_head)
        value = function(problem, hidden, weight)
        value.backward(problem.upstream[:CHECKED_ROWS].to(value.dtype) if value.ndim else None)
        results.append((value.detach().double(), hidden.grad.double()))
    (value, gradient), (true_value, true_gradient) = results
    if value.ndim == 0:  # a peer that only adds up: gradients of a plain sum
        return {
            "logp error": (value - true_value.sum()).abs().item() / CHECKED_ROWS,
            "dX error": float("nan"),
        }
    return {
        "logp error": (value - true_value).abs().max().item(),
        "dX error": ((gradient - true_gradient).abs().max() / true_gradient.abs().max()).item(),
    }


def floors(problem: Problem, repetitions: int, device: str) -> dict[int, float]:
    """Return milliseconds of 1 to 4 plain GEMMs of this shape: logits, dX, dW, and the logits again."""
    logits = torch.empty(
        problem.case.tokens, problem.case.vocab, device=device, dtype=problem.dtype
    ).normal_()
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    products = {
        "z": lambda: torch.mm(hidden, weight.T, out=logits),
        "dX": lambda: torch.mm(logits, weight),
        "dW": lambda: torch.mm(logits.T, hidden),
    }
    z, dx, dw = (t.median for t in time_interleaved(products, repetitions, device).values())
    return {1: z, 2: z + dx, 3: z + dx + dw, 4: 2 * z + dx + dw}


def measure(case: Case, device: str, repetitions: int, model: str | None = None) -> Rows:
    """Return one row per contender."""
    problem = Problem(case, device, model)
    case = problem.case
    rows: Rows = {}
    sound = {}
    for name, (loss, gemms, train_head) in contenders(device).items():
        try:
            rows[name] = dict(error_of(problem, name, loss, train_head))
        except PEER_ERRORS as error:
            if name not in PEERS:
                raise
            rows[name] = {"ms": f"{type(error).__name__}: not timed"}
            continue
        limit = (
            1e-3 if problem.dtype == torch.float32 else 0.5 if "eager" in name or name == "compiled" else 0.1
        )
        if rows[name]["logp error"] <= limit:
            sound[name] = (loss, gemms, train_head)
        else:
            rows[name]["ms"] = "wrong: not timed"
    floor = floors(problem, repetitions, device)
    both = time_interleaved(
        {name: step_of(problem, x[0], x[2]) for name, x in sound.items()}, repetitions, device
    )
    alone = time_interleaved(
        {name: forward_of(problem, x[0]) for name, x in sound.items()}, repetitions, device
    )
    for name, (loss, gemms, train_head) in sound.items():
        useful = (3 if train_head else 2) * 2 * case.tokens * case.vocab * case.hidden
        problem.hidden.grad = problem.weight.grad = None  # what the step frees would hide what it takes
        peak = peak_bytes(step_of(problem, loss, train_head), device) / 2**20
        outputs = (problem.hidden.nbytes + train_head * problem.weight.nbytes) / 2**20
        rows[name] |= as_row(both[name]) | {
            "floor": both[name].median / floor[gemms],
            "TFLOP/s": useful / both[name].median / 1e9,
            "forward ms": alone[name].median,
            "forward floor": alone[name].median / floor[1],
            "outputs MiB": outputs,
            "workspace MiB": peak - outputs,
        }
    return rows


def main() -> None:
    measure_cases(__doc__, Cases(Case(), CPU_CASE, TINY_CASE, grid), measure, takes_model=True)


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem(CPU_CASE if DEVICE == "cpu" else Case(), DEVICE)


@pytest.mark.parametrize("name", contenders("cpu"))
def test_linear_logprob(benchmark, problem: Problem, name: str) -> None:
    loss, _, train_head = contenders(DEVICE)[name]
    assert error_of(problem, name, loss, train_head)["logp error"] < 0.5
    benchmark.pedantic(step_of(problem, loss, train_head), rounds=5, warmup_rounds=1)


if __name__ == "__main__":
    main()
