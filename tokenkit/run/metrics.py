"""What a run measures, and where it goes: `metrics.jsonl`, and trackers, off until asked for.

`metrics.jsonl` is the record: one JSON object per line, with `step` and any numbers. All else is drawn
from it (`run.curves`) or repeats it, and whatever happens to a tracker, the training goes on. Numbers are
written so that they read back exactly; those that JSON has no word for are the strings "nan", "inf" and
"-inf".

    loss, loss/<name>             nats, the mean over the step's count
    excess/<name>                 nats, that loss less its value where the student equals the teacher
    chunk_share/<name>            chunks that count, over those before any were joined
    gradient_share/<name>         of the sum of the losses' gradient norms, at the first step
    loss/prefix, phase            of the steps of a prefix stage, whose phase is "prefix"; they have no `loss`
    bits_per_byte/<model>         on held-out text
    task_score/<task>/<metric>    of benchmarks, from 0 to 1; task_cost: perplexities and bits
    grad_norm, learning_rate, tokens_per_second
    padding/<side>                share of the positions that the models read in this step, of rank 0
    seconds/<part>                a step's mean since the line before, of rank 0: data (waiting for it),
                                  teacher (and counts), student (and losses, both ways), optimizer (and norm)
    peak_memory_gib               of rank 0 so far: of its GPU, or else of its process
    save_seconds                  that training stood still for checkpoints since the line before
    expert_usage/..., experts/... of PEER layers, a window of log_freq steps (`models.expert_usage`)
    rows_left_out                 no documents, or not tokenizable, since the run began; with each checkpoint
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import secrets
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from torch import Tensor

from tokenkit.disk import NO_LINK, blaming_disk, write_durably
from tokenkit.errors import DiskError
from tokenkit.run.redaction import redact, redact_config

METRICS_NAME = "metrics.jsonl"
TIMES = ("tokens_per_second", "save_seconds", "seconds/", "peak_memory_gib")
"""How names begin of what two runs of one curve differ in."""
Value = float | int | str | Tensor
UNNAMED = "tokenkit"
"""The default of `name`, which names no run."""

Histograms = Mapping[str, Sequence[float]]
Tables = Mapping[str, tuple[Sequence[str], list[list[int]]]]

logger = logging.getLogger(__name__)


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


def without_times(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return a line without what the machine decides."""
    return {name: value for name, value in line.items() if not name.startswith(TIMES)}


def _number(value: Any) -> Any:
    return float(value) if value in ("nan", "inf", "-inf") else value


def _plain(value: Value) -> float | int | str:
    if isinstance(value, Tensor):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def truncate_metrics(path: Path, step: int | None) -> list[dict[str, Any]]:
    """Drop the lines after `step`, which a resumed run will write again, and a torn last one; None: all.

    Returns:
        the lines that are left, oldest first.
    """
    if not path.exists():
        return []
    kept = [values for values in read_metrics(path) if step is not None and values["step"] <= step]
    write_durably(path, "".join(_line(values) for values in kept))
    return kept


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
        self.before: list[dict[str, Any]] = []
        """The lines that were there, oldest first; none on ranks that do not write."""
        if is_main:
            self.before = truncate_metrics(self.path, step)
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

    @property
    def before(self) -> list[dict[str, Any]]:
        """The lines that were there when it was opened, oldest first; none on ranks that do not write."""
        return self._file.before

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


class _Run(Protocol):
    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def show(self, step: int, histograms: Histograms, tables: Tables, images: Mapping[str, Path]) -> None: ...

    def upload(self, checkpoint: Path) -> None: ...

    def close(self) -> None: ...


class Trackers:
    """Sends numbers to the trackers of `report_to`, from the main rank only.

    A tracker that raises is no reason to lose a run, and no bug of ours: failures are counted in
    `failures`, and the first of each tracker is logged.

    Args:
        report_to: names among "wandb" and "tensorboard"; "none" is ignored.
        folder: `output_dir`; what the trackers write locally lies in it.
        config: the resolved configuration; secrets are hidden before it leaves.
        is_main: whether this rank reports.

    Raises:
        ValueError: a name that is neither.
    """

    def __init__(self, report_to: Sequence[str], folder: Path, config: Mapping[str, Any], *, is_main: bool):
        self.failures: Counter[str] = Counter()
        self._runs: dict[str, _Run] = {}
        for name in report_to:
            if name != "none" and name not in _OPENERS:
                raise ValueError(f"report_to must be none, {' or '.join(_OPENERS)}, got {name!r}")
            if name in _OPENERS and is_main:
                self._try(name, partial(self._open, name, folder, config))

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Send the finite numbers among `values`."""
        numbers = {k: float(v) for k, v in values.items() if isinstance(v, int | float) and math.isfinite(v)}
        for name, run in self._runs.items():
            self._try(name, partial(run.log, step, numbers))

    def show(self, step: int, histograms: Histograms, tables: Tables, images: Mapping[str, Path]) -> None:
        """Send what is no number: values of histograms, rows of tables under their columns, PNG files."""
        for name, run in self._runs.items():
            self._try(name, partial(run.show, step, histograms, tables, images))

    def upload(self, checkpoint: Path) -> None:
        """Offer a checkpoint that was written; a tracker that was not asked to keep them leaves it alone."""
        for name, run in self._runs.items():
            self._try(name, partial(run.upload, checkpoint))

    def close(self) -> None:
        """Let each tracker finish."""
        for name, run in self._runs.items():
            self._try(name, run.close)
        self._runs.clear()

    def _open(self, name: str, folder: Path, config: Mapping[str, Any]) -> None:
        self._runs[name] = _OPENERS[name](folder, config)

    def _try(self, name: str, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # other people's code, which may raise anything
            if not self.failures[name]:
                words = redact(str(error), 500)
                logger.warning("%s failed and will be ignored: %s: %s", name, type(error).__name__, words)
            self.failures[name] += 1


def run_name(folder: Path, config: Mapping[str, Any]) -> str:
    """Return what the run is called: `name`, where the user gave one, else the name of its folder."""
    given = str(config.get("name") or "").strip()
    return given if given and given != UNNAMED else folder.resolve().name


def run_id(folder: Path) -> str:
    """Return the identifier of the run in `folder`, made at its first use: a resumed run keeps it."""
    path = folder / "run_id"
    if not path.exists():
        path.write_text(secrets.token_hex(8), encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


class _Wandb:
    def __init__(self, folder: Path, config: Mapping[str, Any]):
        import wandb

        has_key = bool(os.environ.get("WANDB_API_KEY") or wandb.api.api_key)
        settings = wandb.Settings(init_timeout=5, console="off", disable_git=True, save_code=False)
        self._uploads = config.get("wandb.log_model") is not None
        self._run = wandb.init(
            project=config.get("wandb.project") or os.environ.get("WANDB_PROJECT", "tokenkit"),
            entity=config.get("wandb.entity"),
            name=run_name(folder, config),
            id=run_id(folder),
            resume="allow",
            dir=folder,
            # without a key, wandb would ask for one and wait
            mode=None if has_key or "WANDB_MODE" in os.environ else "offline",
            config=redact_config(dict(config)),
            settings=settings,
        )
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "step": step})

    def show(self, step: int, histograms: Histograms, tables: Tables, images: Mapping[str, Path]) -> None:
        import wandb

        shown: dict[str, Any] = {name: wandb.Histogram(values) for name, values in histograms.items()}
        shown |= {name: wandb.Table(list(columns), rows) for name, (columns, rows) in tables.items()}
        shown |= {name: wandb.Image(str(path)) for name, path in images.items()}
        self._run.log({**shown, "step": step})

    def upload(self, checkpoint: Path) -> None:
        if self._uploads:
            name = f"checkpoint-{self._run.id}"
            self._run.log_artifact(str(checkpoint), name=name, type="model", aliases=[checkpoint.name])

    def close(self) -> None:
        self._run.finish()


class _TensorBoard:
    def __init__(self, folder: Path, config: Mapping[str, Any]):
        from torch.utils.tensorboard import SummaryWriter

        # a run is called there what its folder is called, "." where it is the top one
        name = run_name(folder, config)
        below = "" if name == folder.resolve().name else re.sub(r"[^\w.-]+", "_", name).strip(".")
        self._writer = SummaryWriter(str(folder / "tensorboard" / below))
        self._writer.add_text("config", f"```\n{redact_config(dict(config))}\n```")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def show(self, step: int, histograms: Histograms, tables: Tables, images: Mapping[str, Path]) -> None:
        for name, values in histograms.items():
            self._writer.add_histogram(name, values, step)

    def upload(self, checkpoint: Path) -> None:
        """It takes no files."""

    def close(self) -> None:
        self._writer.close()


_OPENERS: dict[str, Callable[[Path, Mapping[str, Any]], _Run]] = {
    "wandb": _Wandb,
    "tensorboard": _TensorBoard,
}
