"""Peak memory of every operation and of whole losses against the vocabulary, beside eager PyTorch.

    python bench/memory.py --save bench/results/cpu/memory.json --plot docs/memory.png
    python bench/memory.py --only sorted_distance --vocab 32000 256000
    python bench/memory.py --only gold --keep --save bench/results/cpu/memory.json --plot docs/memory.png

Each figure is one forward and backward in a process of its own: the peak above inputs, less the gradients
that it returns (those of a head are [V, D], whoever computes them). Eager is the same call on the definitions
of `kernels/reference`, which hold all logits. On a CPU the resident set is watched: a few MiB are noise.
`--workspace` is what the operations may use; what does not depend on it, tiles of a CPU, is in the figures.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

from alm_step import Case as StepCase
from alm_step import make_batch
from harness import machine, peak_bytes, save

from tests.losses import eager
from tokenkit.kernels.linear_divergence import linear_divergence
from tokenkit.kernels.linear_logprob import linear_logprob
from tokenkit.kernels.sorted_distance import sorted_distance
from tokenkit.losses import alm_loss, clm_loss, dskd_loss, gold_loss, mined_loss, uld_loss
from tokenkit.losses.dskd import Projections
from tokenkit.structs import Batch, Head, HiddenStates, Widths

VOCABULARIES = (32_000, 64_000, 128_256, 151_936, 256_000)
MIB = 2**20


@dataclass(frozen=True)
class Case:
    """One figure."""

    name: str
    vocab: int
    is_eager: bool
    tokens: int
    hidden: int
    workspace: int
    """Bytes."""
    device: str


class Problem:
    """Two models' states and heads over the same number of ids, and a batch."""

    def __init__(self, case: Case):
        torch.manual_seed(0)
        self.case = case
        N, V, D = case.tokens, case.vocab, case.hidden
        rows = 4
        step = StepCase(tokens=N, vocab=V, hidden=D, rows=rows)
        self.batch: Batch = make_batch(step, case.device)

        def states(*shape: int) -> Tensor:
            return torch.randn(*shape, device=case.device)

        T = N // rows
        self.hidden, self.weight = states(rows, T, D).requires_grad_(), (states(V, D) / D**0.5)
        self.teacher, self.teacher_weight = states(rows, T, D), states(V, D) / D**0.5
        self.embedded, self.teacher_embedded = states(rows, T, D), states(rows, T, D)
        self.target = torch.randint(V, (N,), device=case.device)
        self.space = self.batch.student.space_V
        self.index = torch.randint(V, (V,), device=case.device)
        self.projections = Projections(Widths(D, D, 1), Widths(D, D, 1)).to(case.device)
        self.weight_N = torch.full((N,), 1 / N, device=case.device)

    def heads(self) -> tuple[Head, Head]:
        """Return the student's, trained but for `frozen` cases, and the teacher's."""
        self.weight.requires_grad_("frozen" not in self.case.name)
        return Head(self.weight), Head(self.teacher_weight)

    def models(self) -> tuple[HiddenStates, HiddenStates, Batch]:
        """Return what a loss takes."""
        head, teacher_head = self.heads()
        student = HiddenStates(self.hidden, head, embedded_BTD=self.embedded)
        teacher = HiddenStates(self.teacher, teacher_head, embedded_BTD=self.teacher_embedded)
        return student, teacher, self.batch


def _logprob(problem: Problem, **options: Any) -> Tensor:
    function = eager.linear_logprob if problem.case.is_eager else linear_logprob
    head, _ = problem.heads()
    result = function(
        problem.hidden.flatten(0, 1), head, problem.target, subset_V=problem.space, **options
    )  # fmt: skip
    return result.logp_N.sum() + result.subset_logp_N.sum()


def _divergence(problem: Problem, kind: str, **options: Any) -> Tensor:
    function = eager.linear_divergence if problem.case.is_eager else linear_divergence
    head, teacher_head = problem.heads()
    student, teacher = problem.hidden.flatten(0, 1), problem.teacher.flatten(0, 1)
    return function(student, head, teacher, teacher_head, kind, row_weight_N=problem.weight_N, **options)


def _distance(problem: Problem, **options: Any) -> Tensor:
    function = eager.sorted_distance if problem.case.is_eager else sorted_distance
    head, teacher_head = problem.heads()
    student, teacher = problem.hidden.flatten(0, 1), problem.teacher.flatten(0, 1)
    return function(student, head, teacher, teacher_head, row_weight_N=problem.weight_N, **options)


def _loss(problem: Problem, loss: Callable[..., Any], *arguments: Any, **options: Any) -> Tensor:
    term = loss(*problem.models(), *arguments, **options)
    return (term.total / term.count).mean()


STEPS: dict[str, Callable[..., Tensor]] = {
    "linear_logprob": _logprob,
    "linear_logprob frozen": _logprob,
    "linear_divergence kl": lambda problem, **options: _divergence(problem, "kl", **options),
    "linear_divergence js": lambda problem, **options: _divergence(problem, "js", **options),
    "sorted_distance": _distance,
    "clm": lambda problem, **options: _loss(problem, _clm, **options),
    "alm": lambda problem, **options: _loss(problem, alm_loss, **options),
    "uld": lambda problem, **options: _loss(problem, uld_loss, **options),
    "gold": lambda problem, **options: _loss(problem, gold_loss, **options),
    "gold hybrid": lambda problem, **options: _loss(problem, _hybrid, **options),
    "mined": lambda problem, **options: _loss(problem, mined_loss, problem.index, **options),
    "dskd": lambda problem, **options: _loss(problem, dskd_loss, problem.projections, **options),
}


def _clm(student: HiddenStates, teacher: HiddenStates, batch: Batch, **options: Any) -> Any:
    return clm_loss(student, batch, **options)


def _hybrid(student: HiddenStates, teacher: HiddenStates, batch: Batch, **options: Any) -> Any:
    matched = torch.arange(len(student.head.weight_VD) // 2, device=student.hidden_BTD.device)
    return gold_loss(student, teacher, batch, matched, matched, uld_use_hybrid_loss=True, **options)


def step_of(case: Case) -> tuple[Problem, Callable[[], None]]:
    """Return the inputs, and one forward and backward that leaves gradients in them."""
    problem = Problem(case)

    def step() -> None:
        STEPS[case.name](problem, workspace_bytes=case.workspace).backward()

    return problem, step


def measure(case: Case) -> float:
    """Return MiB above inputs and gradients, in this process, which must be fresh."""
    if case.is_eager:
        eager.use(pytest.MonkeyPatch())
    _, warm_up = step_of(replace(case, vocab=500, tokens=64))  # what a first call loads and keeps
    warm_up()
    problem, step = step_of(case)
    peak = peak_bytes(step, case.device)
    returned = (problem.hidden, problem.weight, *problem.projections.parameters())
    return (peak - sum(x.grad.nbytes for x in returned if x.grad is not None)) / MIB


def in_fresh_process(case: Case) -> float | None:
    """Return `measure(case)` of a process of its own; None where it has not the memory."""
    command = [sys.executable, __file__, "--case", json.dumps(asdict(case))]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        if case.is_eager and ("memory" in result.stderr or result.returncode < 0):
            return None
        raise RuntimeError(f"{case} failed:\n{result.stderr[-2000:]}")
    return float(result.stdout.splitlines()[-1])


def kept(path: Path, sizes: dict[str, Any]) -> tuple[dict[str, dict[int, float | None]], dict[str, str]]:
    """Return the figures that a file holds and the commit of each row, where they are of the same sizes."""
    saved = json.loads(path.read_text())
    if saved["results"]["case"] != sizes:
        raise SystemExit(
            f"{path} holds figures of {saved['results']['case']}, not of {sizes}: leave out --keep"
        )
    rows = {name: {int(V): x for V, x in row.items()} for name, row in saved["results"]["MiB"].items()}
    commits = saved["results"].get("commit", {})
    return rows, {name: commits.get(name, saved["machine"]["commit"]) for name in rows}


def print_markdown(rows: dict[str, dict[int, float | None]], vocabularies: list[int]) -> None:
    """Print MiB, one line per contender."""
    print("| MiB |", " | ".join(f"{V:,}" for V in vocabularies), "|")
    print("|---" * (len(vocabularies) + 1) + "|")
    for name, figures in rows.items():
        cells = ("" if figures[V] is None else f"{figures[V]:.0f}" for V in vocabularies)
        print(f"| {name} |", " | ".join(cells), "|")


def plot(rows: dict[str, dict[int, float | None]], names: list[str], path: Path) -> None:
    """Draw ours and eager's, operations left and losses right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, title, chosen in (
        (axes[0], "operations", [name for name in names if "linear" in name or "sorted" in name]),
        (axes[1], "losses", [name for name in names if "linear" not in name and "sorted" not in name]),
    ):
        for i, name in enumerate(chosen):
            for row, style in ((name, "-o"), (f"{name}, eager", "--")):
                points = [(V, mib) for V, mib in rows.get(row, {}).items() if mib is not None]
                label = name if row == name else None
                axis.plot(*zip(*points, strict=True), style, color=f"C{i}", label=label, markersize=3)
        axis.set_title(f"{title} (dashed: eager, all logits)", fontsize=10)
        axis.set_xlabel("vocabulary")
        axis.set_ylim(bottom=1)
        axis.set_yscale("log")
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("MiB above inputs and gradients")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    print(f"written: {path}")


def main() -> None:
    """Measure every case in its own process; print, save and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--workspace", type=int, default=16, help="MiB that an operation may use")
    parser.add_argument("--vocab", type=int, nargs="+", default=list(VOCABULARIES))
    parser.add_argument("--only", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--save", type=Path, help="JSON with every figure")
    parser.add_argument("--keep", action="store_true", help="the other rows of --save stay as they are")
    parser.add_argument("--plot", type=Path, help="PNG")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(measure(Case(**json.loads(arguments.case))))
        return
    sizes = {
        "tokens": arguments.tokens,
        "hidden": arguments.hidden,
        "workspace": arguments.workspace * MIB,
        "device": arguments.device,
    }
    rows, commits = kept(arguments.save, sizes) if arguments.keep and arguments.save else ({}, {})
    for name in arguments.only:
        for is_eager in (False, True):
            row = rows.setdefault(f"{name}, eager" if is_eager else name, {})
            commits[f"{name}, eager" if is_eager else name] = machine(arguments.device)["commit"]
            for V in arguments.vocab:
                row[V] = in_fresh_process(Case(name, V, is_eager, **sizes))
            print(f"{name}{', eager' if is_eager else ''}: {row}", file=sys.stderr, flush=True)
    print_markdown(rows, arguments.vocab)
    if arguments.save:
        results = {"case": sizes, "MiB": rows, "commit": commits}
        save(arguments.save, arguments.device, results)
    if arguments.plot:
        plot(rows, [name for name in STEPS if name in rows], arguments.plot)


if __name__ == "__main__":
    main()
