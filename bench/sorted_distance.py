"""Time, memory and error of sorted_distance against eager and compiled PyTorch, which sort.

    python bench/sorted_distance.py                          the default case of this device
    python bench/sorted_distance.py --grid --save DIR        lengths and vocabularies of kernels.md
    pytest bench/sorted_distance.py --benchmark-only

The student's vocabulary is 1.18 times the teacher's, as 151936 is of 128256. One row per contender: forward
and backward, forward alone, the ratio to its floor (the GEMMs of that shape and number, timed in the same
run) and to eager, memory above inputs split into outputs and workspace, and errors against float64 on the
first rows: the largest of a value, and the norm of dX's error over that of dX. A contender that is wrong is
not timed. No public kernel computes this distance without a sort.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from harness import Cases, Rows, Step, as_row, measure_cases, peak_bytes, time_interleaved

from tokenkit.kernels.reference.sorted_distance import sorted_distance as reference
from tokenkit.kernels.sorted_distance import sorted_distance
from tokenkit.structs import Head

CHECKED_ROWS = 64
LARGEST_ERROR = 0.05  # of a value: bfloat16 logits of eager are this wrong


@dataclass(frozen=True)
class Case:
    """Sizes of one measurement."""

    tokens: int = 8192
    vocab: int = 151_936
    hidden: int = 4096

    def teacher_vocab(self) -> int:
        """Return W: 128256 for 151936."""
        return round(self.vocab * 128_256 / 151_936)

    def name(self) -> str:
        """Return the file name of its results."""
        return f"sorted_distance_{self.tokens}x{self.hidden}x{self.vocab}"


CPU_CASE = Case(tokens=256, vocab=32_000, hidden=512)
TINY_CASE = Case(tokens=64, vocab=1000, hidden=32)


def grid() -> Iterator[Case]:
    """Lengths at one head, vocabularies, and a smaller width; on a CPU two vocabularies."""
    if DEVICE == "cpu":
        yield from (CPU_CASE, Case(tokens=256, hidden=256))
        return
    for tokens in (1024, 2048, 4096, 8192):
        yield Case(tokens=tokens)
    for vocab in (32_000, 128_256, 256_000):
        yield Case(vocab=vocab)
    yield Case(hidden=2048)


class Problem:
    """Hidden states and heads of two models; logits of standard deviation 3, which vary from row to row."""

    def __init__(self, case: Case, device: str):
        torch.manual_seed(0)
        self.case = case
        self.dtype = torch.float32 if device == "cpu" else torch.bfloat16
        N, D = case.tokens, case.hidden

        def states() -> Tensor:
            scale = 1 + 4 * torch.rand(N, 1, device=device)
            return (scale * torch.randn(N, D, device=device)).to(self.dtype)

        def weight(V: int) -> Tensor:
            return (torch.randn(V, D, device=device) / D**0.5).to(self.dtype)

        self.hidden, self.teacher = states().requires_grad_(), states()
        self.weight, self.teacher_weight = weight(case.vocab).requires_grad_(), weight(case.teacher_vocab())


@dataclass(frozen=True)
class Contender:
    """A way to compute the mean, its GEMMs of 2·N·V·D (both models counted alike), and its options."""

    function: Callable[..., Tensor]
    gemms: int
    weighted: bool = False
    train_head: bool = True
    options: tuple[tuple[str, Any], ...] = (("exact", False),)

    def loss(self, problem: Problem, hidden: Tensor, weight: Tensor) -> Tensor:
        """Return the mean over the rows of `hidden`."""
        N = len(hidden)
        options = dict(self.options)
        if self.weighted:
            options["row_weight_N"] = torch.full((N,), 1 / N, device=hidden.device)
        teacher, teacher_weight = problem.teacher[:N], problem.teacher_weight
        value = self.function(
            hidden, Head(weight), teacher.to(hidden.dtype), Head(teacher_weight.to(hidden.dtype)), **options
        )
        return value if self.weighted else value.mean()


def contenders(device: str) -> dict[str, Contender]:
    """Return them by name."""
    found = {
        "weighted": Contender(sorted_distance, 4, weighted=True),
        "tables": Contender(sorted_distance, 5),
        "frozen": Contender(sorted_distance, 3, train_head=False),
        "exact": Contender(sorted_distance, 4, weighted=True, options=(("exact", True),)),
        "eager": Contender(reference, 4, options=()),
    }
    if device != "cpu":
        found["compiled"] = Contender(torch.compile(reference, dynamic=False), 4, options=())
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
    """Return the errors of the first rows against sorting in float64."""
    results = []
    for function, dtype, options in (
        (contender.function, problem.dtype, dict(contender.options)),
        (reference, torch.float64, {}),
    ):
        hidden = problem.hidden[:CHECKED_ROWS].detach().to(dtype).requires_grad_()
        teacher = problem.teacher[:CHECKED_ROWS].to(dtype)
        heads = Head(problem.weight.detach().to(dtype)), Head(problem.teacher_weight.to(dtype))
        value = function(hidden, heads[0], teacher, heads[1], **options)
        value.sum().backward()
        results.append((value.detach().double(), hidden.grad.double()))
    (value, gradient), (true_value, true_gradient) = results
    return {
        "value error": (value - true_value).abs().max().item(),
        "dX error": ((gradient - true_gradient).norm() / true_gradient.norm()).item(),
    }


def floors(problem: Problem, repetitions: int, device: str) -> dict[int, float]:
    """Return milliseconds of 2 to 5 plain GEMMs of this shape: both z, dX, dW, and the student's z again."""
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    teacher, teacher_weight = problem.teacher, problem.teacher_weight
    logits = torch.empty(len(hidden), len(weight), device=device, dtype=problem.dtype).normal_()
    others = logits[:, : len(teacher_weight)].contiguous()
    products = {
        "z": lambda: torch.mm(hidden, weight.T, out=logits),
        "teacher's z": lambda: torch.mm(teacher, teacher_weight.T, out=others),
        "dX": lambda: torch.mm(logits, weight),
        "dW": lambda: torch.mm(logits.T, hidden),
    }
    timings = time_interleaved(products, repetitions, device)
    z, other, dx, dw = (t.median for t in timings.values())
    both = z + other
    return {2: both, 3: both + dx, 4: both + dx + dw, 5: both + dx + dw + z}


def measure(case: Case, device: str, repetitions: int) -> Rows:
    """Return one row per contender."""
    problem = Problem(case, device)
    rows: Rows = {}
    sound: dict[str, Contender] = {}
    for name, contender in contenders(device).items():
        errors = error_of(problem, contender)
        rows[name] = dict(errors)
        if errors["value error"] <= LARGEST_ERROR:
            sound[name] = contender
        else:
            rows[name]["ms"] = "wrong: not timed"
    floor = floors(problem, repetitions, device)
    both, alone = (
        time_interleaved({name: make(problem, x) for name, x in sound.items()}, repetitions, device)
        for make in (step_of, forward_of)
    )
    for name, contender in sound.items():
        problem.hidden.grad = problem.weight.grad = None  # what the step frees would hide what it takes
        peak = peak_bytes(step_of(problem, contender), device) / 2**20
        outputs = (problem.hidden.nbytes + contender.train_head * problem.weight.nbytes) / 2**20
        rows[name] |= as_row(both[name]) | {
            "floor": both[name].median / floor[contender.gemms],
            "of eager": both[name].median / both["eager"].median if "eager" in both else "",
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
def test_sorted_distance(benchmark, problem: Problem, name: str) -> None:
    contender = contenders(DEVICE)[name]
    assert error_of(problem, contender)["value error"] <= LARGEST_ERROR
    benchmark.pedantic(step_of(problem, contender), rounds=3, warmup_rounds=1)


if __name__ == "__main__":
    main()
