"""What a run reports: `metrics.jsonl`, `curves.png`, `outcome.json` and an exit code.

`metrics.jsonl` is the record: one JSON object per line, with `step` and any numbers. All else is drawn
from it or repeats it. Numbers are written so that they read back exactly; those that JSON has no word
for are the strings "nan", "inf" and "-inf".

    loss, loss/<name>             nats, the mean over the step's count
    excess/<name>                 nats, that loss less its value where the student equals the teacher
    chunk_share/<name>            chunks that count, over those before any were joined
    gradient_share/<name>         of the sum of the losses' gradient norms, at the first step
    loss/prefix, phase            of the steps of a prefix stage, whose phase is "prefix"; they have no `loss`
    bits_per_byte/<model>         on held-out text
    task_score/<task>/<metric>    of benchmarks, from 0 to 1; task_cost: perplexities and bits
    grad_norm, learning_rate, tokens_per_second
    save_seconds                  that training stood still for checkpoints since the line before
    expert_usage/..., experts/... of PEER layers, a window of log_freq steps (`models.expert_usage`)
    rows_left_out                 no documents, or not tokenizable, since the run began; with each checkpoint
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from tokenkit.disk import NO_LINK, blaming_disk, write_durably
from tokenkit.errors import DiskError
from tokenkit.run.trackers import Trackers

METRICS_NAME = "metrics.jsonl"
Value = float | int | str | Tensor

PANELS = {  # by the first part of a metric's name, in this order
    "loss": "loss (nats)",
    "excess": "loss over its least value (nats)",
    "bits_per_byte": "bits per byte, held out",
    "task_score": "benchmarks (score)",
    "grad_norm": "gradient norm",
    "learning_rate": "learning rate",
    "tokens_per_second": "tokens per second",
}
NOISY = ("loss", "excess", "grad_norm", "tokens_per_second")  # drawn pale, under their moving average
_COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # Okabe and Ito


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a `metrics.jsonl`, oldest first; a torn last line is left out.

    Raises:
        ValueError: a line before the last is no JSON object with a step.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    found = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last line feed is torn
        try:
            values = {name: _number(value) for name, value in json.loads(line).items()}
            values["step"] = int(values["step"])
        except (ValueError, KeyError, AttributeError, TypeError, OverflowError, RecursionError) as error:
            raise ValueError(
                f"line {number} of {path} must be a JSON object with a step, got {line[:80]!r}: "
                "correct or remove it"
            ) from error
        found.append(values)
    return found


def _number(value: Any) -> Any:
    return float(value) if value in ("nan", "inf", "-inf") else value


def _plain(value: Value) -> float | int | str:
    if isinstance(value, Tensor):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def truncate_metrics(path: Path, step: int | None) -> None:
    """Drop the lines after `step`, which a resumed run will write again, and a torn last one; None: all."""
    if path.exists():
        kept = [values for values in read_metrics(path) if step is not None and values["step"] <= step]
        write_durably(path, "".join(_line(values) for values in kept))


def _line(values: Mapping[str, Value]) -> str:
    return json.dumps({name: _plain(value) for name, value in values.items()}, allow_nan=False) + "\n"


class MetricsFile:
    """Appends to a run's `metrics.jsonl`. Ranks other than the first hold one that writes nothing.

    Args:
        folder: `output_dir`.
        step: of the checkpoint that the run resumes from; 0 keeps what was written before its first step.
            None where there is no checkpoint: the run begins anew, and so does the file.
        is_main: whether this rank writes.
    """

    def __init__(self, folder: Path, *, step: int | None, is_main: bool):
        self.path = folder / METRICS_NAME
        self._file = None
        if is_main:
            truncate_metrics(self.path, step)
            # unbuffered: a line that the disk would not take must not come again, as an error, when it closes
            handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | NO_LINK, 0o640)
            self._file = open(handle, "ab", buffering=0)  # noqa: SIM115

    def write(self, step: int, values: Mapping[str, Value]) -> None:
        """Append one line. A tensor makes the host wait for its device: pass numbers where speed counts.

        Raises:
            DiskError: the disk is full, or the file was removed while the run went on.
        """
        if self._file is None:
            return
        line = _line({"step": step, **values}).encode()
        with blaming_disk(self.path, len(line)):
            written = self._file.write(line)
            if written != len(line):  # as far as the disk, or a limit on files, allowed
                self._file.write(line[written:])
        if os.fstat(self._file.fileno()).st_nlink == 0:
            raise DiskError(
                f"{self.path} was removed while the run went on, and nothing that it writes would be found: "
                "put the folder back if you have it and go on with --resume, or start again"
            )

    def sync(self) -> None:
        """Put every line on the disk. Call it before a checkpoint: a resume expects the lines up to it."""
        if self._file is not None:
            with blaming_disk(self.path):
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Put every line on the disk and close the file."""
        if self._file is not None:
            try:
                self.sync()
            finally:
                self._file.close()
                self._file = None


class Record:
    """All that a run measures, and where it goes: its `metrics.jsonl`, and the trackers of `report_to`.

    Args:
        folder: `output_dir`.
        step: as in `MetricsFile`.
        is_main: whether this rank writes.
        report_to: a tracker's name, or "none".
        config: as in `Trackers`.
    """

    def __init__(
        self,
        folder: Path,
        step: int | None,
        is_main: bool,
        report_to: str = "none",
        config: Mapping[str, Any] = MappingProxyType({}),
    ):
        self.folder, self.step, self.is_main = folder, step, is_main
        self._file = MetricsFile(folder, step=step, is_main=is_main)
        self.trackers = Trackers([report_to], folder, config, is_main=is_main)

    def lines(self) -> list[dict[str, Any]]:
        """Return what is there, oldest first; nothing on ranks that do not write."""
        return read_metrics(self._file.path) if self.is_main else []

    def write(self, step: int, values: Mapping[str, Value]) -> None:
        """Append one line, and send its numbers."""
        self._file.write(step, values)
        self.trackers.log(step, values)

    def sync(self) -> None:
        """Put every line on the disk."""
        self._file.sync()

    def upload(self, checkpoint: Path) -> None:
        """Offer a checkpoint that was written to the trackers."""
        self.trackers.upload(checkpoint)

    def close(self) -> None:
        """Put everything on the disk and let go of it."""
        self.trackers.close()
        self._file.close()


def draw_curves(folder: Path) -> None:
    """Draw `folder/curves.png` from its `metrics.jsonl`; nothing where there is nothing to draw."""
    series = series_of(read_metrics(folder / METRICS_NAME))
    panels = [prefix for prefix in PANELS if prefix in series]
    if not panels:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5 * columns, 3.4 * rows), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, index + 1)
        for colour, (name, points) in zip(cycle(_COLOURS), sorted(series[panel].items()), strict=False):
            steps, values = zip(*points, strict=True)
            noisy = panel in NOISY and len(values) > 50
            axes.plot(
                steps,
                values,
                color=colour,
                lw=1,
                alpha=0.25 if noisy else 1,
                label=None if noisy else name,
                marker="o" if len(values) < 3 else None,  # one point makes no line
            )
            if noisy:
                axes.plot(steps, _smooth(values), color=colour, lw=1.6, label=name)
        axes.set_title(PANELS[panel], fontsize=10)
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
        if len(series[panel]) > 1:
            axes.legend(frameon=False, fontsize=8)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_durably(folder / "curves.png", picture.getvalue())


def series_of(lines: list[dict[str, Any]]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Return finite (step, value) points by panel, then by name."""
    series: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for line in lines:
        for name, value in line.items():
            panel, _, rest = name.partition("/")
            if panel in PANELS and isinstance(value, int | float) and math.isfinite(value):
                series.setdefault(panel, {}).setdefault(rest or "total", []).append((line["step"], value))
    return series


def _smooth(values: tuple[float, ...], half_life: float = 10.0) -> list[float]:
    """Exponential moving average, corrected for its start."""
    decay = 0.5 ** (1 / half_life)
    total = weight = 0.0
    smooth = []
    for value in values:
        total, weight = decay * total + value, decay * weight + 1
        smooth.append(total / weight)
    return smooth


def draw_heatmap(path: Path, rows: Mapping[str, Sequence[float]], title: str) -> None:
    """Draw rows of numbers, of any lengths, as a PNG file; nothing where there are none."""
    width = max(map(len, rows.values()), default=0)
    if not width:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.5 + 0.35 * len(rows)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    values = [[*row, *[math.nan] * (width - len(row))] for row in rows.values()]
    figure.colorbar(axes.imshow(values, aspect="auto", cmap="viridis"))
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_xlabel("rank")
    axes.set_title(title, fontsize=10)
    figure.savefig(path)
