"""Time divergences of two checkouts by turns, each in a process of its own: is one slower than the other?

    git worktree add /tmp/old efa7e2f
    python bench/two_checkouts.py /tmp/old . --repetitions 7

Processor time of one thread, forward and backward of the CPU's case of `linear_divergence.py`; the ratio of
the medians, and that of each pair of neighbours in time.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

CONTENDERS = ("js weighted", "js recompute", "js rows", "kl weighted", "kl recompute", "kl rows")


def work() -> None:
    """Run each contender that standard input names; answer with its seconds."""
    import torch

    from tokenkit.kernels.linear_divergence import linear_divergence
    from tokenkit.structs import Head

    torch.set_num_threads(1)
    torch.manual_seed(0)
    N, D, V = 512, 512, 32_000
    hidden = torch.randn(N, D)
    teacher = hidden + 0.5 * torch.randn_like(hidden)
    teacher_head = Head(torch.randn(V, D) / D**0.5)
    weight = teacher_head.weight_VD.clone().requires_grad_()
    hidden.requires_grad_()
    for line in sys.stdin:
        kind, mode = line.split()
        hidden.grad = weight.grad = None
        options = {"row_weight_N": torch.full((N,), 1 / N)} if mode == "weighted" else {}
        head = Head(weight.detach() if mode == "rows" else weight)
        began = time.process_time()
        linear_divergence(hidden, head, teacher, teacher_head, kind, **options).sum().backward()
        print(time.process_time() - began, flush=True)


def start(checkout: Path) -> subprocess.Popen[str]:
    """Start a process that imports from a checkout alone."""
    environment = os.environ | {"PYTHONPATH": str(checkout.resolve()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), "--work"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment, cwd=checkout)


def ask(process: subprocess.Popen[str], contender: str) -> float:
    """Return the seconds of one run."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{contender}\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def main() -> None:
    if sys.argv[1:] == ["--work"]:
        return work()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkouts", nargs=2, type=Path)
    parser.add_argument("--repetitions", type=int, default=7)
    arguments = parser.parse_args()
    processes = [start(checkout) for checkout in arguments.checkouts]
    seconds: dict[str, list[list[float]]] = {name: [[], []] for name in CONTENDERS}
    for turn in range(arguments.repetitions + 1):
        for name in CONTENDERS:
            for which in (0, 1) if turn % 2 else (1, 0):
                found = ask(processes[which], name)
                if turn:  # the first warms up
                    seconds[name][which].append(found)
    for name, (first, second) in seconds.items():
        pairs = sorted(b / a for a, b in zip(first, second, strict=True))
        medians = statistics.median(first), statistics.median(second)
        print(
            f"{name:14} {medians[0]:8.3f} s {medians[1]:8.3f} s   ratio {medians[1] / medians[0]:.3f}   "
            f"pairs {pairs[0]:.2f} to {pairs[-1]:.2f}"
        )
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()


if __name__ == "__main__":
    main()
