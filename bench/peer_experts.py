"""The sum of a token's tiny experts, forward and backward, against the usual ways to write it.

    OMP_NUM_THREADS=1 python bench/peer_experts.py [--compile] [--save bench/results/cpu/peer_experts.json]
    pytest bench/peer_experts.py --benchmark-only

naive       gathers the rows of all experts of all tokens, twice [N, P, D]
chunked     the same for 64 tokens at a time, computed again in the backward pass
bags        EmbeddingBag with weights on the way up; the way down gathers
compile     naive under torch.compile

Times are those of the processor, saved is what autograd keeps beside inputs and parameters.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import embedding_bag, gelu
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).parent))

from harness import Step, as_row, print_table, save, time_interleaved

from tokenkit.kernels.peer_experts import peer_experts
from tokenkit.kernels.reference.peer_experts import peer_experts as naive

CHUNK = 64  # tokens


class Problem:
    """Random tokens and tables, one neuron an expert, and the experts of each token."""

    def __init__(self, tokens: int = 512, experts: int = 65_536, width: int = 256, picked: int = 64) -> None:
        torch.manual_seed(0)
        self.hidden = torch.randn(tokens, width, requires_grad=True)
        self.down, self.up = (
            (torch.randn(experts, 1, width) / width**0.5).requires_grad_() for _ in range(2)
        )
        self.expert = torch.randint(experts, (tokens, picked))
        self.gate = torch.rand(tokens, picked, requires_grad=True)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What has gradients."""
        return self.hidden, self.down, self.up, self.gate

    def step(self, way: Callable[..., Tensor]) -> Step:
        """Return one forward and backward of a way."""

        def run() -> None:
            for tensor in self.inputs:
                tensor.grad = None
            way(self.hidden, self.down, self.up, self.expert, self.gate).square().sum().backward()

        return run

    def saved_mib(self, way: Callable[..., Tensor]) -> float:
        """Return what autograd keeps of a forward, each storage once."""
        own = {tensor.untyped_storage()._cdata for tensor in (*self.inputs, self.expert)}
        sizes, alive = {}, []

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                sizes[storage._cdata] = storage.nbytes()
                alive.append(tensor)
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            way(self.hidden, self.down, self.up, self.expert, self.gate)
        return sum(sizes.values()) / 2**20


def chunked(hidden: Tensor, down: Tensor, up: Tensor, expert: Tensor, gate: Tensor) -> Tensor:
    """Gather for a few tokens at a time, and again in the backward pass."""
    parts = [
        checkpoint(naive, hidden[i : i + CHUNK], down, up, expert[i : i + CHUNK], gate[i : i + CHUNK],
                   use_reentrant=False)
        for i in range(0, len(hidden), CHUNK)
    ]  # fmt: skip
    return torch.cat([part for part in parts if part is not None])


def bags(hidden: Tensor, down: Tensor, up: Tensor, expert: Tensor, gate: Tensor) -> Tensor:
    """Gather on the way down; on the way up a bag of rows with weights."""
    score = torch.einsum("nd,npd->np", hidden, down[:, 0][expert])
    return embedding_bag(expert, up[:, 0], per_sample_weights=gate * gelu(score), mode="sum")


WAYS = {"tokenkit": peer_experts, "naive": naive, "chunked": chunked, "bags": bags}


def check(problem: Problem) -> None:
    """Raise AssertionError where two ways differ."""
    found = {}
    for name, way in WAYS.items():
        problem.step(way)()
        found[name] = [tensor.grad for tensor in problem.inputs]
    for grads in found.values():
        for got, wanted in zip(grads, found["naive"], strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", WAYS)
def test_experts(benchmark, name):
    """One way, for pytest-benchmark."""
    problem = Problem(tokens=64, experts=4096, width=64, picked=16)
    check(problem)
    benchmark(problem.step(WAYS[name]))


def run() -> None:
    """Print and save the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="torch.compile too: it takes a compiler")
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    problem, ways = Problem(), dict(WAYS)
    check(Problem(tokens=64, experts=4096, width=64, picked=16))
    if arguments.compile:
        ways["compile"] = torch.compile(naive)
    steps = {name: problem.step(way) for name, way in ways.items()}
    timed = time_interleaved(steps, arguments.repetitions, "cpu", processor_time=True)
    rows = {
        name: as_row(timing)
        | {"of naive": timing.median / timed["naive"].median, "saved MiB": problem.saved_mib(ways[name])}
        for name, timing in timed.items()
    }
    print_table(rows)
    if arguments.save:
        save(arguments.save, "cpu", rows)


if __name__ == "__main__":
    run()
