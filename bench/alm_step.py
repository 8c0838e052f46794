"""One ALM step of the student, from hidden states to gradients, against full logits in eager PyTorch.

    python bench/alm_step.py                              table of time and memory, ratios to eager
    python bench/alm_step.py --save bench/results/cpu/alm_step.json
    pytest bench/alm_step.py --benchmark-only

Contenders compute the same loss from the same prepared teacher half: `eager` keeps log_softmax over the
vocabulary, `lean eager` only what logsumexp needs. `clm + alm` adds the next-token loss to it, with one pass
of the head for both as in a training step, `clm + alm apart` with one for each; both recompute. Times are
interleaved in one process, memory is taken in a process each, above inputs and outputs. Stops if a contender
is wrong.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from harness import Step, as_row, peak_bytes, print_table, save, time_interleaved

from tokenkit.kernels.chunk_likelihood import chunk_likelihood
from tokenkit.losses import make_loss
from tokenkit.losses.alm import alm
from tokenkit.losses.logprobs import answer
from tokenkit.structs import Batch, Chunks, Context, Head, HiddenStates, Side

EAGER = "eager"
TWO = ("clm + alm apart", "clm + alm")
A_TILE = 160 * 2**20
"""Bytes: room for the backward's tile of z on a GPU."""


def names(device: str) -> tuple[str, ...]:
    """Return the contenders; on a CPU the loop over tiles runs whatever the budget."""
    everywhere = (EAGER, "lean eager", "recompute", "cached", "frozen head", *TWO)
    return everywhere if device == "cpu" else (*everywhere, "fused", "fused frozen head")


@dataclass(frozen=True)
class Case:
    """Sizes of the step."""

    tokens: int = 2048
    vocab: int = 128_256
    hidden: int = 512
    rows: int = 8
    """Documents; tokens / rows positions each."""


def make_batch(case: Case, device: str) -> Batch:
    """Return random tokens, every one but the first in a valid chunk, a third of the vocabulary as space."""
    T = case.tokens // case.rows

    def side() -> Side:
        ids = torch.randint(case.vocab, (case.rows, T), device=device)
        trained = torch.ones_like(ids, dtype=torch.bool)
        space = torch.rand(case.vocab, device=device) < 0.35
        return Side(ids, torch.full((case.rows,), T, device=device), trained, space, 2)

    def chunks() -> Tensor:
        order = torch.rand(case.rows, T, device=device)
        order[:, :2] = -1  # the first token is a chunk of its own
        starts = order.argsort(1).argsort(1) < T * 6 // 10  # as many chunks on both sides
        return (starts.cumsum(1) - 1).int()

    return Batch(side(), side(), {"unconstrained": Chunks(chunks(), chunks())})


def within(prepared: Any, workspace_bytes: int) -> Any:
    """Return what a first half prepared, with another budget for the second."""
    return replace(prepared, request=replace(prepared.request, workspace_bytes=workspace_bytes))


class Problem:
    """One step's inputs, and the contenders as functions that leave gradients in them."""

    def __init__(self, case: Case, device: str, dtype: torch.dtype):
        torch.manual_seed(0)
        self.batch = make_batch(case, device)
        T = case.tokens // case.rows
        self.hidden = torch.randn(case.rows, T, case.hidden, device=device, dtype=dtype).requires_grad_()
        weight = torch.randn(case.vocab, case.hidden, device=device, dtype=dtype) / case.hidden**0.5
        self.weight = weight.requires_grad_()
        teacher_hidden = torch.randn(case.rows, T, 64, device=device, dtype=dtype)
        teacher_weight = torch.randn(case.vocab, 64, device=device, dtype=dtype) / 8
        teacher = HiddenStates(teacher_hidden, Head(teacher_weight))
        self.prepared = make_loss("alm_unconstrained").prepare(teacher, self.batch)
        self.scored = make_loss("clm").prepare(None, self.batch)

    def kernel(self, workspace_bytes: int, *, frozen: bool = False) -> None:
        """The library's step."""
        weight = self.weight.detach() if frozen else self.weight
        loss = make_loss("alm_unconstrained", workspace_bytes=workspace_bytes)
        student = HiddenStates(self.hidden, Head(weight))
        term = loss.loss(student, within(self.prepared, workspace_bytes), self.batch)
        (term.total / term.count).backward()

    def two(self, workspace_bytes: int, *, apart: bool) -> None:
        """Next-token prediction and ALM, added up."""
        losses = [make_loss(name, workspace_bytes=workspace_bytes) for name in ("clm", "alm_unconstrained")]
        student, said = HiddenStates(self.hidden, Head(self.weight)), {}
        prepared = [within(one, workspace_bytes) for one in (self.scored, self.prepared)]
        if not apart:
            requests = {str(i): loss.student_request(prepared[i]) for i, loss in enumerate(losses)}
            said = answer(student, requests)
        terms = [
            loss.loss(student, prepared[i], self.batch, Context(scores=said.get(str(i))))
            for i, loss in enumerate(losses)
        ]
        sum(term.total / term.count for term in terms).backward()

    def eager(self, *, lean: bool = False) -> None:
        """The same loss with all logits in memory."""
        side, prepared = self.batch.student, self.prepared
        logits = self.hidden @ self.weight.T
        following = side.ids_BT.roll(-1, 1)[..., None]
        if lean:
            lse = logits.logsumexp(-1)
            logp = logits.gather(-1, following)[..., 0] - lse
            mass = logits.masked_fill(~side.space_V, -torch.inf).logsumexp(-1) - lse
        else:
            scores = logits.log_softmax(-1)
            logp = scores.gather(-1, following)[..., 0]
            mass = scores.masked_fill(~side.space_V, -torch.inf).logsumexp(-1)
        chunks = prepared.sizes[0]
        inside = torch.nn.functional.pad(chunks.valid_BC, (0, 1)).gather(1, chunks.student.slot_BL)
        logp = torch.nn.functional.pad(logp[:, :-1], (1, 0)).where(inside, 0).float()
        space = mass.gather(1, chunks.student.last_BC.clamp_min(0)).where(chunks.valid_BC, 0).float()
        likelihood = chunk_likelihood(logp, chunks.student, space).where(chunks.valid_BC, 0)
        total = alm(chunks.teacher_BC, likelihood, chunks.weight_BC)
        (total / prepared.count).backward()

    def contenders(self) -> dict[str, Step]:
        """Return every contender; each starts without gradients."""
        tile = 0 if self.hidden.device.type == "cpu" else A_TILE  # on a CPU: the narrowest
        steps = {
            EAGER: lambda: self.eager(),
            "lean eager": lambda: self.eager(lean=True),
            "recompute": lambda: self.kernel(tile),
            "cached": lambda: self.kernel(1 << 36),
            "frozen head": lambda: self.kernel(tile, frozen=True),
            TWO[0]: lambda: self.two(tile, apart=True),
            TWO[1]: lambda: self.two(tile, apart=False),
            "fused": lambda: self.kernel(0),
            "fused frozen head": lambda: self.kernel(0, frozen=True),
        }
        return {name: self._fresh(steps[name]) for name in names(self.hidden.device.type)}

    def _fresh(self, step: Step) -> Step:
        def run() -> None:
            self.hidden.grad = self.weight.grad = None
            step()

        return run

    def check(self) -> None:
        """Raise SystemExit if a contender's gradients are not those that they should be."""
        steps = self.contenders()
        for reference, names_of in ((EAGER, set(steps) - set(TWO)), (TWO[0], {TWO[1]})):
            steps[reference]()
            truth = self.hidden.grad, self.weight.grad
            for name in names_of:
                steps[name]()
                for value, expected in zip((self.hidden.grad, self.weight.grad), truth, strict=True):
                    if value is None:
                        continue
                    error = ((value - expected).abs().max() / expected.abs().max()).item()
                    if not error <= (1e-3 if value.dtype == torch.float32 else 2e-2):
                        raise SystemExit(f"{name} is off by {error:.1e} of the largest gradient: not timed")


def memory_mib(case: Case, device: str, dtype: str) -> dict[str, float]:
    """Return MiB above inputs and outputs, each contender in a process of its own."""
    found = {}
    for name in names(device):
        command = [sys.executable, __file__, "--device", device, "--dtype", dtype, "--memory-of", name]
        command += [x for key, value in asdict(case).items() for x in (f"--{key}", str(value))]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found[name] = json.loads(output.splitlines()[-1])
    return found


def measure(
    case: Case, device: str, dtype: str, repetitions: int, *, processor_time: bool = False
) -> dict[str, dict[str, float]]:
    """Return time and memory of each contender, and their ratios to eager."""
    memory = memory_mib(case, device, dtype)
    problem = Problem(case, device, getattr(torch, dtype))
    problem.check()
    timings = time_interleaved(problem.contenders(), repetitions, device, processor_time=processor_time)
    rows = {}
    for name, timing in timings.items():
        rows[name] = as_row(timing) | {
            "time/eager": timing.median / timings[EAGER].median,
            "MiB": memory[name],
            "memory/eager": memory[name] / memory[EAGER],
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for key, value in asdict(Case()).items():
        parser.add_argument(f"--{key}", type=int, default=value)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default=None, help="float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--processor-time", action="store_true", help="one thread's CPU time, not wall time")
    parser.add_argument("--save", type=Path)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = arguments.device
    dtype = arguments.dtype or ("float32" if device == "cpu" else "bfloat16")
    case = Case(**{key: getattr(arguments, key) for key in asdict(Case())})
    if arguments.memory_of:
        problem = Problem(case, device, getattr(torch, dtype))
        peak = peak_bytes(problem.contenders()[arguments.memory_of], device)
        outputs = sum(x.grad.nbytes for x in (problem.hidden, problem.weight) if x.grad is not None)
        print(json.dumps((peak - outputs) / 2**20))
        return
    if arguments.processor_time:
        torch.set_num_threads(1)
    rows = measure(case, device, dtype, arguments.repetitions, processor_time=arguments.processor_time)
    print_table(rows)
    if arguments.save:
        results = {
            "case": asdict(case),
            "dtype": dtype,
            "clock": "processor" if arguments.processor_time else "wall",
            "rows": rows,
        }
        save(arguments.save, device, results)


@pytest.fixture(scope="module")
def problem() -> Problem:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    problem = Problem(Case(), device, torch.float32 if device == "cpu" else torch.bfloat16)
    problem.check()
    return problem


@pytest.mark.parametrize("name", names("cuda" if torch.cuda.is_available() else "cpu"))
def test_alm_step(benchmark, problem: Problem, name: str) -> None:
    benchmark.pedantic(problem.contenders()[name], rounds=3, warmup_rounds=1)


if __name__ == "__main__":
    main()
