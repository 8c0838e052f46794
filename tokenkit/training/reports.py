"""Where the numbers of a run go: metrics.jsonl, trackers, the progress bar or printed lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from tokenkit.evaluation.bits_per_byte import BitsPerByte
from tokenkit.run.curves import draw_curves
from tokenkit.run.metrics import Record
from tokenkit.run.redaction import complain
from tokenkit.structs import Batch
from tokenkit.training.clock import Clock
from tokenkit.training.step import StepReport

SKIPPED = {
    "overflow": "float16 overflow",
    "untrained": "no token is trained",
    "nonfinite": "a loss or gradient is not finite",
}
SMALL_SHARE = 0.02
"""A loss with less of the gradient than this moves little that another would not move."""


def _spelled(seconds: float) -> str:
    """Return a time in the one or two units that matter: 45 s, 12 min, 3 h 05 min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


class Progress:
    """A progress bar on a terminal, and lines where standard error is none; other ranks are silent."""

    def __init__(self, total_steps: int, step: int, *, is_main: bool):
        self._bar = None
        self._total, self._first, self._began = total_steps, step, time.perf_counter()
        self._is_main = is_main
        if is_main and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total_steps, initial=step, unit="step", file=sys.stderr, dynamic_ncols=True
            )

    def update(self, step: int, **numbers: float | None) -> None:
        """Move to `step` and show `numbers`: loss, bits_per_byte, tokens_per_second."""
        if self._bar is not None:
            shown = {name.replace("_", " "): f"{n:.4g}" for name, n in numbers.items() if n is not None}
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(step - self._bar.n)

    def line(self, step: int, words: str) -> None:
        """Print what was logged at `step`, with the time that is left; nothing beside a bar."""
        if not self._is_main or self._bar is not None:
            return
        done, left = step - self._first, ""
        if done > 0 and step < self._total:
            left = f"  {_spelled((time.perf_counter() - self._began) / done * (self._total - step))} left"
        print(f"step {step:,}/{self._total:,}  {words}{left}", file=sys.stderr, flush=True)

    def note(self, words: str) -> None:
        """Print a line of its own, on a terminal above the bar."""
        if self._bar is not None:
            self._bar.write(words, file=sys.stderr)
        elif self._is_main:
            print(words, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


@dataclass
class Reports(AbstractContextManager["Reports"]):
    """Open reports of one run. Only rank 0 writes."""

    record: Record
    progress: Progress
    bits_per_byte: BitsPerByte | None = None
    """The newest measurement."""
    first_bits_per_byte: BitsPerByte | None = None
    """That of step 0, where there was one."""
    gradient_shares: dict[str, float] = field(default_factory=dict)
    """Not logged yet."""
    tokens: int = 0
    """Student tokens of this rank since `since`."""
    seconds: float = 0.0
    """Spent in training steps since the last line."""
    save_seconds: float = 0.0
    """That training stood still for checkpoints since the last line."""
    since: float = field(default_factory=time.perf_counter)

    @classmethod
    def open(cls, record: Record, steps: int) -> Reports:
        """Open the reports of a run of so many steps, which may go on from some step of its record."""
        reports = cls(record, Progress(steps, record.step or 0, is_main=record.is_main))
        measured = measurements(record.before)
        reports.first_bits_per_byte = measured.get(0)
        reports.bits_per_byte = measured[max(measured)] if measured else None
        return reports

    def step(
        self,
        step: int,
        report: StepReport,
        micro_batches: Sequence[Batch],
        figures: Mapping[str, float],
        *,
        is_due: bool,
        clock: Clock,
    ) -> None:
        """Show one step; write a line of metrics where one is due, with `figures` beside the report's."""
        self.tokens += sum(int(batch.student.length_B.sum()) for batch in micro_batches)
        self.seconds += time.perf_counter() - self.since
        rate = self.tokens / max(self.seconds, 1e-9)
        measured = None if self.bits_per_byte is None else self.bits_per_byte.student
        self.progress.update(step, loss=report.loss, bits_per_byte=measured, tokens_per_second=rate)
        self.gradient_shares |= report.gradient_shares
        if (small := small_losses(report.gradient_shares)) is not None:
            self.progress.note(small)
        if is_due:
            self.progress.line(step, step_line(report, rate))
            values: dict[str, Any] = {"grad_norm": report.grad_norm}
            if report.phase is None:  # the sum of the main stage's losses alone is "loss"
                values["loss"] = report.loss
            values |= {f"loss/{name}": value for name, value in report.losses.items()}
            values |= {f"count/{name}": value for name, value in report.counts.items()}
            values |= {f"weight/{name}": value for name, value in report.weights.items()}
            values |= {f"excess/{name}": report.losses[name] - floor for name, floor in report.floors.items()}
            values |= {f"chunk_share/{name}": value for name, value in report.chunk_shares.items()}
            values |= {f"gradient_share/{name}": value for name, value in self.gradient_shares.items()}
            self.gradient_shares = {}
            values |= {"learning_rate": report.learning_rate, "tokens_per_second": round(rate, 1)}
            if report.phase is not None:
                values["phase"] = report.phase
            if self.save_seconds:
                values["save_seconds"] = round(self.save_seconds, 4)
            self.record.write(step, {**values, **figures, **padding(micro_batches), **times(clock)})
            self.tokens, self.seconds, self.save_seconds = 0, 0.0, 0.0
        self.since = time.perf_counter()

    def evaluation(self, step: int, measured: BitsPerByte) -> None:
        """Write a measurement on held-out text."""
        self.bits_per_byte = measured
        if step == 0:
            self.first_bits_per_byte = measured
        self.progress.update(step, bits_per_byte=measured.student)
        self.progress.line(step, measured_line(None, measured))
        values: dict[str, Any] = {"bits_per_byte/student": measured.student}
        if measured.teacher is not None:
            values["bits_per_byte/teacher"] = measured.teacher
        self.record.write(step, {**values, "heldout_bytes": measured.num_bytes})
        self.since = time.perf_counter()

    def benchmarks(self, step: int, scores: Mapping[str, float]) -> None:
        """Write scores of tasks, by `TASK/METRIC`; those that are no shares of 1 are not drawn."""
        kinds = {name: "score" if 0 <= value <= 1 else "cost" for name, value in scores.items()}
        self.progress.line(step, "  ".join(f"{name} {value:.4g}" for name, value in scores.items()))
        self.record.write(step, {f"task_{kinds[name]}/{name}": value for name, value in scores.items()})
        self.since = time.perf_counter()

    def finish(self) -> list[str]:
        """Draw the curves, and say in lines what the run changed in bits per byte, if it was measured."""
        if self.record.is_main:
            draw_curves(self.record.folder)
        if self.bits_per_byte is None:
            return []
        return [measured_line(self.first_bits_per_byte, self.bits_per_byte)]

    def saved(self, step: int, left_out: Mapping[str, int]) -> None:
        """Say how many rows of the data were left out so far, where there are any, and put all on the disk.

        A checkpoint expects every line up to it there.
        """
        if left_out:
            self.record.write(step, {"rows_left_out": sum(left_out.values())})
        self.record.sync()

    def skipped(self, step: int, why: str, number: int) -> None:
        """Write that a step was skipped, the run's `number`-th for this reason."""
        self.record.write(step, {f"{why}_steps": number})

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put everything on the disk and let go of it; what hinders that does not hide `error`."""
        self.progress.close()
        try:
            self.record.close()
        except OSError as trouble:
            if error is None:
                raise
            complain(f"tokenkit: {trouble}")


def padding(micro_batches: Sequence[Batch]) -> dict[str, float]:
    """Return the share of padding in what models read of a step here; the teacher's where chunks are."""
    found = {}
    for name in ("student", *(("teacher",) if micro_batches[0].chunks else ())):
        sides = [getattr(batch, name) for batch in micro_batches]
        positions = sum(side.num_positions for side in sides)
        tokens = sum(int(side.length_B.sum()) for side in sides)
        found[f"padding/{name}"] = round(1 - tokens / positions, 4)
    return found


def times(clock: Clock) -> dict[str, float]:
    """Return the mean seconds of a step by part since the last line, and the most memory so far."""
    found = {f"seconds/{part}": round(seconds, 5) for part, seconds in clock.take().items()}
    peak = clock.peak_memory()
    return found if peak is None else {**found, "peak_memory_gib": round(peak, 3)}


def measurements(lines: Iterable[Mapping[str, Any]]) -> dict[int, BitsPerByte]:
    """Return what lines of metrics.jsonl hold, by step: a resumed run may measure nothing more itself."""
    return {
        line["step"]: BitsPerByte(
            line["bits_per_byte/student"], line.get("bits_per_byte/teacher"), line.get("heldout_bytes", 0)
        )
        for line in lines
        if "bits_per_byte/student" in line
    }


def step_line(report: StepReport, rate: float) -> str:
    """Return what is printed of a logged step, behind its number."""
    parts = [f"loss {report.loss:.4f}"] if report.phase is None and len(report.losses) > 1 else []
    for name, value in report.losses.items():
        parts.append(f"{name} {value:.4f}" + _beside(report, name, value))
    if report.skipped is not None:
        parts.append(f"skipped: {SKIPPED[report.skipped]}")
    return "  ".join(
        [*parts, f"grad {report.grad_norm:.3g}", f"lr {report.learning_rate:.2g}", f"{rate:,.0f} tokens/s"]
    )


def _beside(report: StepReport, name: str, value: float) -> str:
    notes = []
    if report.floors.get(name):
        notes.append(f"excess {value - report.floors[name]:.4f}")
    if name in report.chunk_shares:
        notes.append(f"{report.counts[name]:,.0f} chunks, {report.chunk_shares[name]:.0%} of all")
    return f" ({', '.join(notes)})" if notes else ""


def small_losses(shares: dict[str, float]) -> str | None:
    """Return a line about losses that hardly move anything; None: there are none."""
    small = {name: share for name, share in shares.items() if 0 < share < SMALL_SHARE}
    if not small:
        return None
    others = ", ".join(f"{name} {share:.0%}" for name, share in shares.items() if name not in small)
    told = ", ".join(f"loss {name} gives {share:.2%}" for name, share in small.items())
    return (
        f"{told} of the gradient ({others}): almost nothing is learned from it; raise its loss_weights, or "
        "let multitask_aggregation_fn or loss_weight_mode balance the losses"
    )


def measured_line(first: BitsPerByte | None, last: BitsPerByte) -> str:
    """Return both models' bits per byte in words; with `first`, of step 0, what became of the student."""
    before = "" if first is None or first == last else f"{first.student:.4f} -> "
    teacher = "" if last.teacher is None else f", teacher {last.teacher:.4f}"
    return f"bits per byte on held-out text: student {before}{last.student:.4f}{teacher}"
