"""What lies in an output folder already: a run that came to its end or goes on, an export."""

from __future__ import annotations

from pathlib import Path

from tokenkit.config import TrainConfig, to_dict
from tokenkit.errors import CheckpointError
from tokenkit.parallel import World
from tokenkit.run import checkpoint
from tokenkit.run.checkpoint import Identity, State
from tokenkit.run.safe_dcp import read_manifest
from tokenkit.training.build import Parts
from tokenkit.training.prefix_stage import take_over

MAY_DIFFER = (  # of the configuration, on resume: what moves no number
    "name", "output_dir", "resume", "debug", "dry_run", "export_to", "report_to",
    "logging_interval", "save_interval", "sync_interval", "eval_interval",
    "eval_at_step_zero", "save_at_step_zero", "skip_lm_eval", "data.num_workers",
    "use_distributed", "distributed_backend", "n_data_parallel", "hang_timeout",
)  # fmt: skip


def export_folder(config: TrainConfig) -> Path:
    """Return where the model is written in Hugging Face layout."""
    return Path(config.run.export_to or Path(config.run.output_dir) / "export")


def is_finished(folder: Path, config: TrainConfig) -> bool:
    """Whether the run in `folder` came to its end: it took this number of steps, and its export is whole.

    An export gets its name only after it was checked, so its name says that nothing is missing.
    """
    last = folder / "checkpoints" / f"step_{config.schedule.steps:08d}"
    return last.is_dir() and (export_folder(config) / "config.json").is_file()


def check_finished(folder: Path, config: TrainConfig) -> None:
    """Refuse to call a run done that another configuration has done.

    Raises:
        ValueError: with each difference.
    """
    last = folder / "checkpoints" / f"step_{config.schedule.steps:08d}"
    done = Identity(read_manifest(last).config)
    if changes := checkpoint.differences(done, Identity(to_dict(config)), MAY_DIFFER):
        raise ValueError(
            f"{folder} holds a finished run of another configuration (then -> now):\n  "
            + "\n  ".join(changes)
            + "\nchoose another output_dir"
        )


def refuse_old_export(folder: Path) -> None:
    """Find before training what the export would find behind it.

    Raises:
        FileExistsError: the folder holds something, or is a link.
    """
    if folder.is_symlink():
        raise FileExistsError(f"{folder} is a link, and an export is moved to its name: remove it")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(
            f"{folder} already holds an exported model, and the run would write there at its end: "
            "move it away, or name another folder with export_to"
        )


def go_on(parts: Parts, state: State, world: World, found: Path) -> None:
    """Go on from what a checkpoint holds beside its tensors.

    Raises:
        CheckpointError: it holds something else than a run writes.
    """
    run, extra = parts.run, state.extra
    run.step = state.step
    take_over(run)
    try:
        value, good_steps = extra["loss_scale"]
        try:
            run.loss_scale.value, run.loss_scale.good_steps = float(value), int(good_steps)
            run.untrained_steps = int(extra.get("untrained_steps", 0))
        except ValueError as error:
            raise TypeError(str(error)) from error
        # counted over all ranks: one of them goes on counting
        untokenized = extra.get("untokenized", {}) if world.is_main else {}
        parts.batches.load_state_dict(extra["data"], untokenized)
        run.objective.load_state_dict(extra["objective"])
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(
            f"{found} holds no state that this run can go on from ({error!r}): the checkpoint was changed by "
            "hand; move it away, and the one before it is used"
        ) from error
