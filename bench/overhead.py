"""What the trainer costs around its forward, backward and update: its steps against those of a bare loop.

    python bench/overhead.py
    python bench/overhead.py --save bench/results/cpu/overhead.json

One run of `tokenkit train`, and beside it the same models, losses, data and optimizer in twenty lines. After
each of the run's steps the bare loop takes one, so that both see the same machine: processor time of each,
and the median of the ratios step by step. A line of metrics is written at each step, which is more than a
run does. The losses of both are compared: they take the same steps.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from harness import print_table, save

from tokenkit import parallel
from tokenkit.config import ALIASES, TrainConfig, parse_command_line
from tokenkit.training import loop
from tokenkit.training.build import build
from tokenkit.training.reports import Reports
from tokenkit.training.requests import StudentHalf, TeacherHalf, ask

DATA = Path(__file__).parents[1] / "shared" / "data"
ALONE = parallel.World(0, 1, torch.device("cpu"), None)


def configuration(options: argparse.Namespace, output: Path) -> TrainConfig:
    """Return the run's configuration: stories260K to a tokenizer of 10,000 ids, its old self the teacher."""
    flags = {
        "student": options.data / "models" / "stories260K",
        "target": options.data / "tokenizers" / "tinystories10k",
        "data": options.data / "text" / "tinystories.train.txt",
        "losses": "clm,alm_unconstrained",
        "train-model-mode": "full",
        "steps": options.steps + 1,
        "batch-size": options.batch_size,
        "max-length-new": options.length,
        "max-length-teacher": 2 * options.length,
        "save-interval": 10**6,
        "eval-interval": 10**6,
        "eval-at-step-zero": "false",
        "logging-interval": 1,
        "data.num-workers": 0,
        "output": output,
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return parse_command_line(TrainConfig, words, program="overhead", aliases=ALIASES)


class BareLoop:
    """What one would write around the same parts: no counts over ranks, no checks, no reports."""

    def __init__(self, config: TrainConfig):
        torch.manual_seed(config.run.seed)
        self.parts = build(config, ALONE)
        self.losses: list[float] = []

    def step(self) -> None:
        """Take one step."""
        run, stage = self.parts.run, self.parts.run.main
        (batch,) = next(self.parts.batches)
        number = len(self.losses)
        prepared = ask(run.model, TeacherHalf(batch))
        terms = ask(run.model, StudentHalf(batch, prepared))
        loss = torch.stack([term.total / term.count for term in terms.values()]).sum()
        loss.backward()
        moving = [p for p in run.model.parameters() if p.requires_grad]
        torch.nn.utils.clip_grad_norm_(moving, run.max_grad_norm or float("inf"))
        for group in stage.optimizer.param_groups:
            group["lr"] = stage.learning_rate(number)
        stage.optimizer.step()
        stage.optimizer.zero_grad()
        self.losses.append(loss.item())


def measure(config: TrainConfig) -> dict[str, dict[str, float]]:
    """Run the trainer, a bare step behind each of its own; return milliseconds and their ratio."""
    bare, report = BareLoop(config), Reports.step
    spent: dict[str, list[float]] = {"trainer": [], "bare loop": []}
    losses: list[float] = []
    mark = 0.0

    def step_and_step(self: Reports, step: int, found: object, *args: object, **options: object) -> None:
        nonlocal mark
        report(self, step, found, *args, **options)
        ended = time.process_time()
        bare.step()
        if step > 1:  # the first compares the losses' gradients, once in a run
            spent["trainer"].append(1e3 * (ended - mark))
            spent["bare loop"].append(1e3 * (time.process_time() - ended))
        losses.append(found.loss)
        mark = time.process_time()

    Reports.step = step_and_step
    try:
        loop.train(config)
    finally:
        Reports.step = report
    far = max(abs(a - b) / abs(b) for a, b in zip(losses, bare.losses, strict=True))
    if far > 1e-5:
        raise SystemExit(f"the loops took different steps: their losses differ by {far:.1e}")
    rows = {name: {"ms, median": round(statistics.median(times), 2)} for name, times in spent.items()}
    ratios = [one / other for one, other in zip(*spent.values(), strict=True)]
    quantiles = statistics.quantiles(ratios, n=5)
    rows["trainer"] |= {"ratio": round(statistics.median(ratios), 4), "p20": round(quantiles[0], 4)}
    rows["trainer"]["p80"] = round(quantiles[-1], 4)
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="student tokens of a document, at most")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(configuration(options, Path(folder) / "run"))
    print_table(rows)
    if options.save:
        save(options.save, "cpu", {**vars(options), "data": "", "save": "", "rows": rows})


if __name__ == "__main__":
    main()
