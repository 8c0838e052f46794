"""Experiment trackers, off until asked for. Whatever happens to one, the training goes on."""

from __future__ import annotations

import logging
import math
import os
import re
import secrets
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from tokenkit.run.redaction import redact, redact_config

UNNAMED = "tokenkit"
"""The default of `name`, which names no run."""

Histograms = Mapping[str, Sequence[float]]
Tables = Mapping[str, tuple[Sequence[str], list[list[int]]]]

logger = logging.getLogger(__name__)


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
