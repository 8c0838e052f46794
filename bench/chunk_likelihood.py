"""Chunk sums by stretches against a dense token-by-chunk matrix.

python bench/chunk_likelihood.py [--save bench/results/cpu/chunk_likelihood.json]
pytest bench/chunk_likelihood.py --benchmark-only
"""

import argparse
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from harness import Step, as_row, print_table, save, time_interleaved

from tokenkit.kernels.alm_difference import alm_difference
from tokenkit.kernels.chunk_likelihood import chunk_likelihood, lay_out

ROWS, LENGTH = 16, 1024
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _ids() -> Tensor:
    return (torch.rand(ROWS, LENGTH, device=DEVICE) < 0.6).cumsum(1).int()


class Problem:
    """Random chunks of a batch of 16 rows of 1024 tokens, and their loss in two ways."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.student, self.teacher = _ids(), _ids()
        self.scored = torch.ones(ROWS, LENGTH, dtype=torch.bool, device=DEVICE)
        self.logp = (-3 * torch.rand(ROWS, LENGTH, device=DEVICE)).requires_grad_()
        self.other = -3 * torch.rand(ROWS, LENGTH, device=DEVICE)

    def stretches(self) -> None:
        """The library: slots, sums, differences and their backward."""
        layout = lay_out(self.student, self.teacher, self.scored, self.scored)
        student = chunk_likelihood(self.logp, layout.student)
        teacher = chunk_likelihood(self.other, layout.teacher)
        value = alm_difference(teacher, student)
        value.where(layout.valid_BC, 0).sum().backward()

    def dense(self) -> None:
        """A [B, T, C] matrix of who belongs where, multiplied."""
        chunk_C = torch.arange(LENGTH + 1, device=DEVICE)
        student_BTC = (self.student[..., None] == chunk_C).float()
        teacher_BTC = (self.teacher[..., None] == chunk_C).float()
        valid_BC = student_BTC.any(1) & teacher_BTC.any(1)
        student = torch.einsum("bt,btc->bc", self.logp, student_BTC).clamp_max(0)
        teacher = torch.einsum("bt,btc->bc", self.other, teacher_BTC).clamp_max(0)
        alm_difference(teacher, student).where(valid_BC, 0).sum().backward()

    def check(self) -> None:
        """Raise SystemExit if the two differ."""
        gradients = []
        for step in (self.stretches, self.dense):
            self.logp.grad = None
            step()
            gradients.append(self.logp.grad)
        if not torch.allclose(*gradients, rtol=1e-4, atol=1e-7):
            raise SystemExit("the two ways differ: not timed")

    def contenders(self) -> dict[str, Step]:
        """Return both ways."""
        return {"stretches": self.stretches, "dense matrix": self.dense}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    problem = Problem()
    problem.check()
    timings = time_interleaved(problem.contenders(), arguments.repetitions, DEVICE)
    dense = timings["dense matrix"].median
    rows = {name: as_row(timing) | {"time/dense": timing.median / dense} for name, timing in timings.items()}
    print_table(rows)
    if arguments.save:
        save(arguments.save, DEVICE, {"rows": ROWS, "length": LENGTH, "contenders": rows})


@pytest.mark.parametrize("name", ["stretches", "dense matrix"])
def test_chunk_likelihood(benchmark, name: str) -> None:
    problem = Problem()
    problem.check()
    benchmark.pedantic(problem.contenders()[name], rounds=10, warmup_rounds=1)


if __name__ == "__main__":
    main()
