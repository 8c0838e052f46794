"""Time, memory and error of linear_divergence against eager and compiled PyTorch, Liger and TRL.

    python bench/linear_divergence.py                          the default case of this device
    python bench/linear_divergence.py --grid --save DIR        lengths and vocabularies of kernels.md (GPU)
    pytest bench/linear_divergence.py --benchmark-only

The loss is the mean over rows, so that peers which only return a mean can run. One row per contender: forward
and backward, forward alone, the ratio to its floor (the GEMMs of that shape and number, timed in the same
run), memory above inputs split into outputs and workspace, and the largest error of the loss and of dX
against float64. A contender that is wrong is not timed. `map`: the teacher's vocabulary is 1.2 times the
student's, and every student id faces a random one of its ids. No peer does that; eager gathers its logits.
"""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from harness import Cases, Rows, Step, as_row, measure_cases, peak_bytes, time_interleaved

from tokenkit.kernels.linear_divergence import linear_divergence
from tokenkit.kernels.reference.linear_divergence import linear_divergence as reference
from tokenkit.structs import Head

CHECKED_ROWS = 64
LARGEST_ERROR = 2e-2  # of the loss, relative: bfloat16 logits of eager are this wrong
PEERS = ("Liger js", "Liger js chunked", "TRL js", "TRL kl")
PEER_ERRORS = (ImportError, TypeError, ValueError, RuntimeError, NotImplementedError)


@dataclass(frozen=True)
class Case:
    """Sizes of one measurement."""

    tokens: int = 8192
    vocab: int = 128_256
    hidden: int = 4096

    def name(self) -> str:
        """Return the file name of its results."""
        return f"linear_divergence_{self.tokens}x{self.hidden}x{self.vocab}"


CPU_CASE = Case(tokens=512, vocab=32_000, hidden=512)
TINY_CASE = Case(tokens=64, vocab=1000, hidden=32)


def grid() -> Iterator[Case]:
    """Lengths at Llama 3's head, vocabularies, and a smaller width."""
    for tokens in (1024, 2048, 4096, 8192, 16_384):
        yield Case(tokens=tokens)
    for vocab in (32_000, 151_936, 256_000):
        yield Case(vocab=vocab)
    yield Case(vocab=151_936, hidden=2048)


class Problem:
    """Hidden states and heads of two models that agree in part, a map between them, and equal row weights."""

    def __init__(self, case: Case, device: str):
        torch.manual_seed(0)
        self.case = case
        self.dtype = torch.float32 if device == "cpu" else torch.bfloat16
        N, V, D = case.tokens, case.vocab, case.hidden
        W = V + V // 5
        hidden, weight = torch.randn(N, D, device=device), torch.randn(W, D, device=device) / D**0.5
        self.hidden = hidden.to(self.dtype).requires_grad_()
        self.teacher = (hidden + 0.5 * torch.randn_like(hidden)).to(self.dtype)
        self.weight = weight[:V].to(self.dtype).requires_grad_()
        self.teacher_weight = weight.to(self.dtype)
        self.index = torch.randint(W, (V,), device=device)


Loss = Callable[[Problem, Tensor, Tensor], Tensor]


def _heads(problem: Problem, weight: Tensor, *, mapped: bool) -> tuple[Head, Head, dict[str, Any]]:
    teacher_weight = problem.teacher_weight.to(weight.dtype)
    if mapped:
        return Head(weight), Head(teacher_weight), {"teacher_index": problem.index}
    return Head(weight), Head(teacher_weight[: len(weight)]), {}


def _divergence(
    problem: Problem,
    hidden: Tensor,
    weight: Tensor,
    *,
    function: Any,
    kind: str,
    weighted: bool,
    mapped: bool,
) -> Tensor:
    student_head, teacher_head, options = _heads(problem, weight, mapped=mapped)
    N = len(hidden)
    teacher = problem.teacher[:N].to(hidden.dtype)
    if weighted:
        options["row_weight_N"] = torch.full((N,), 1 / N, device=hidden.device)
    value = function(hidden, student_head, teacher, teacher_head, kind, **options)
    return value if weighted else value.mean()


def _liger(problem: Problem, hidden: Tensor, weight: Tensor, *, chunked: bool) -> Tensor:
    if chunked:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, compiled=hidden.is_cuda)
    else:
        from liger_kernel.transformers import LigerFusedLinearJSD

        loss = LigerFusedLinearJSD(accum_dtype=torch.float32)
    labels = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
    teacher_weight = problem.teacher_weight[: len(weight)]
    return loss(hidden, weight, problem.teacher[: len(hidden)], teacher_weight, labels)


def _trl(problem: Problem, hidden: Tensor, weight: Tensor, *, beta: float) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    teacher, teacher_weight = problem.teacher[: len(hidden)], problem.teacher_weight[: len(weight)]
    teacher, teacher_weight = teacher.to(hidden.dtype), teacher_weight.to(hidden.dtype)
    found = ChunkedDivergenceFunction.apply(hidden, weight, None, teacher, teacher_weight, None, beta)
    return found[0].mean()


@dataclass(frozen=True)
class Contender:
    """A loss, its GEMMs of 2·N·V·D (both models counted alike), and what it computes."""

    loss: Loss
    gemms: int
    kind: str
    train_head: bool = True
    mapped: bool = False


def contenders(device: str) -> dict[str, Contender]:
    """Return them by name."""
    found = {}
    compiled = torch.compile(reference, dynamic=False)
    for kind in ("js", "kl"):
        for mapped in (False, True) if kind == "kl" else (False,):
            name, common = f"{kind} map" if mapped else kind, {"kind": kind, "mapped": mapped}
            ours, eager = (partial(_divergence, function=f, **common) for f in (linear_divergence, reference))
            found |= {
                f"weighted {name}": Contender(partial(ours, weighted=True), 4, **common),
                f"recompute {name}": Contender(partial(ours, weighted=False), 6, **common),
                f"rows {name}": Contender(partial(ours, weighted=False), 3, train_head=False, **common),
                f"eager {name}": Contender(partial(eager, weighted=False), 4, **common),
            }
            if device != "cpu":
                loss = partial(_divergence, function=compiled, weighted=False, **common)
                found[f"compiled {name}"] = Contender(loss, 4, **common)
    if importlib.util.find_spec("trl"):
        found["TRL js"] = Contender(partial(_trl, beta=0.5), 6, "js")
        found["TRL kl"] = Contender(partial(_trl, beta=0.0), 6, "kl")
    if importlib.util.find_spec("liger_kernel"):
        found["Liger js chunked"] = Contender(partial(_liger, chunked=True), 4, "js")
        if device != "cpu":
            found["Liger js"] = Contender(partial(_liger, chunked=False), 4, "js")
    return found


def step_of(problem: Problem, contender: Contender) -> Step:
    """Return forward and backward."""

    def step() -> None:
        problem.hidden.grad = problem.weight.grad = None
        weight = problem.weight if contender.train_head else problem.weight.detach()
        contender.loss(problem, problem.hidden, weight).backward()

    return step


def forward_of(problem: Problem, contender: Contender) -> Step:
    """Return the forward alone, without gradients."""

    def forward() -> None:
        with torch.no_grad():
            contender.loss(problem, problem.hidden, problem.weight)

    return forward


def error_of(problem: Problem, contender: Contender) -> dict[str, float]:
    """Return the errors of the loss and of dX (of its largest entry) against float64, on the first rows."""
    truth = partial(
        _divergence, function=reference, kind=contender.kind, weighted=False, mapped=contender.mapped
    )
    results = []
    for function, dtype in ((contender.loss, problem.dtype), (truth, torch.float64)):
        hidden = problem.hidden[:CHECKED_ROWS].detach().to(dtype).requires_grad_()
        weight = problem.weight.detach().to(dtype).requires_grad_(contender.train_head)
        value = function(problem, hidden, weight)
        value.backward()
        results.append((value.detach().double(), hidden.grad.double()))
    (value, gradient), (true_value, true_gradient) = results
    return {
        "loss error": ((value - true_value).abs() / true_value).item(),
        "dX error": ((gradient - true_gradient).abs().max() / true_gradient.abs().max()).item(),
    }


def floors(problem: Problem, repetitions: int, device: str) -> dict[int, float]:
    """Return milliseconds of 2, 3, 4 and 6 plain GEMMs of this shape: both z, dX, dW, both z again."""
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    logits = torch.empty(len(hidden), len(weight), device=device, dtype=problem.dtype).normal_()
    products = {
        "z": lambda: torch.mm(hidden, weight.T, out=logits),
        "dX": lambda: torch.mm(logits, weight),
        "dW": lambda: torch.mm(logits.T, hidden),
    }
    processor_time = device == "cpu" and torch.get_num_threads() == 1
    timed = time_interleaved(products, repetitions, device, processor_time=processor_time)
    z, dx, dw = (t.median for t in timed.values())
    return {2: 2 * z, 3: 2 * z + dx, 4: 2 * z + dx + dw, 6: 4 * z + dx + dw}


def measure(case: Case, device: str, repetitions: int) -> Rows:
    """Return one row per contender."""
    problem = Problem(case, device)
    rows: Rows = {}
    sound: dict[str, Contender] = {}
    for name, contender in contenders(device).items():
        try:
            rows[name] = dict(error_of(problem, contender))
        except PEER_ERRORS as error:
            if name not in PEERS:
                raise
            rows[name] = {"ms": f"{type(error).__name__}: not timed"}
            continue
        if float(str(rows[name]["loss error"])) <= LARGEST_ERROR:
            sound[name] = contender
        else:
            rows[name]["ms"] = "wrong: not timed"
    floor = floors(problem, repetitions, device)
    processor_time = device == "cpu" and torch.get_num_threads() == 1
    both, alone = (
        time_interleaved(
            {name: make(problem, x) for name, x in sound.items()},
            repetitions,
            device,
            processor_time=processor_time,
        )
        for make in (step_of, forward_of)
    )
    for name, contender in sound.items():
        problem.hidden.grad = problem.weight.grad = None  # what the step frees would hide what it takes
        peak = peak_bytes(step_of(problem, contender), device) / 2**20
        outputs = (problem.hidden.nbytes + contender.train_head * problem.weight.nbytes) / 2**20
        rows[name] |= as_row(both[name]) | {
            "floor": both[name].median / floor[contender.gemms],
            "of eager": both[name].median
            / both[f"eager {contender.kind if name in PEERS else name.split(' ', 1)[1]}"].median,
            "forward ms": alone[name].median,
            "forward floor": alone[name].median / floor[2],
            "outputs MiB": outputs,
            "workspace MiB": peak - outputs,
        }
    return rows


def main() -> None:
    measure_cases(__doc__, Cases(Case(), CPU_CASE, TINY_CASE, grid), measure)


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem(CPU_CASE if DEVICE == "cpu" else Case(), DEVICE)


@pytest.mark.parametrize("name", contenders("cpu"))
def test_linear_divergence(benchmark, problem: Problem, name: str) -> None:
    contender = contenders(DEVICE)[name]
    assert error_of(problem, contender)["loss error"] <= LARGEST_ERROR
    benchmark.pedantic(step_of(problem, contender), rounds=3, warmup_rounds=1)


if __name__ == "__main__":
    main()
