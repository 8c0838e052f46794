"""The loop: one run from its configuration to the exported model, resumable at every checkpoint."""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch

from tokenkit.config import TrainConfig, to_dict
from tokenkit.config.benchmarks import LmEval
from tokenkit.data.batches import LeftOut
from tokenkit.errors import CheckpointError, DataError, ExitCode, NonFiniteError
from tokenkit.evaluation.bits_per_byte import bits_per_byte
from tokenkit.models.expert_usage import ExpertUsage
from tokenkit.parallel import World
from tokenkit.run.checkpoint import Identity, State
from tokenkit.run.facts import write_facts
from tokenkit.run.metrics import Record
from tokenkit.run.safe_dcp import read_manifest
from tokenkit.structs import Batch
from tokenkit.training.benchmarks import Benchmarks
from tokenkit.training.build import Parts, build
from tokenkit.training.estimate import blaming_memory, estimate, table
from tokenkit.training.expert_reports import ExpertReports
from tokenkit.training.exporting import hand_on
from tokenkit.training.notes import describe, facts
from tokenkit.training.prefix_stage import take_over
from tokenkit.training.reports import Reports
from tokenkit.training.session import Saving, Session, StopRequest, check_same, processes, taken
from tokenkit.training.step import Run, StepReport, train_step

MAY_DIFFER = (  # of the configuration, on resume: what moves no number
    "name", "output_dir", "resume", "debug", "dry_run", "export_to", "report_to",
    "logging_interval", "save_interval", "async_save", "keep_checkpoints", "sync_interval",
    "skip_nonfinite", "eval_interval", "eval_at_step_zero", "save_at_step_zero", "skip_lm_eval",
    "data.num_workers",
    "eval_batch_size", "wandb.project", "wandb.entity", "wandb.log_model",
    *(f"eval.{option.name}" for option in fields(LmEval)),
    "use_distributed", "distributed_backend", "n_data_parallel", "hang_timeout", "reshard_after_forward",
    "teacher_sharding",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Training:
    """One process's view of a run whose parts are loaded."""

    config: TrainConfig
    session: Session
    parts: Parts
    reports: Reports
    benchmarks: Benchmarks | None
    experts: ExpertReports | None = None
    """What is said of the use of experts, where the model's configuration asks for it."""


def train(config: TrainConfig) -> int:
    """Run training as configured and return the exit code.

    Raises:
        ValueError, OSError, ArithmeticError: one line for the user; `tokenkit.cli` gives each its exit code.
    """
    parallel = config.parallel
    if parallel.use_distributed and "WORLD_SIZE" not in os.environ:
        raise ValueError(
            "use_distributed is set but torchrun started nothing: run torchrun -m tokenkit.train"
        )
    joined = processes(
        timeout=parallel.hang_timeout,
        backend=parallel.distributed_backend,
        n_data_parallel=parallel.n_data_parallel,
        n_model_parallel=parallel.n_model_parallel,
    )
    with joined as (world, stop_request):
        if config.run.do_cost_analysis:
            _say_cost(config, world)
        if config.run.dry_run:
            return _dry_run(config, world)
        return _run(Path(config.run.output_dir), config, world, stop_request)


def _say_cost(config: TrainConfig, world: World) -> None:
    """Say what each process will hold and send; see `estimate`."""
    if world.is_main:
        world.say(table({world.world_size: estimate(config, world.world_size)}, None))


def _dry_run(config: TrainConfig, world: World) -> int:
    """Load everything, run the first step of each stage, print its losses, write nothing."""
    _benchmarks(config, world)
    parts = _build(config, world)
    for stage in parts.run.stages:
        parts.run.step = stage.first_step
        report = train_step(parts.run, next(parts.batches))
        if report.skipped == "untrained":
            raise DataError(
                "no token of the first step is trained: look at max_length_new, loss_mask_mode, data"
            )
        losses = ", ".join(f"{name} {value:.4f}" for name, value in report.losses.items())
        world.say(f"dry run: {losses}, gradient norm {report.grad_norm:.4f}; nothing was written")
    parts.batches.close()
    return ExitCode.DONE


def _build(config: TrainConfig, world: World) -> Parts:
    if config.training.products.tf32:
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(config.run.seed)  # the same on every rank: adapters begin equal
    with world.together("load models, tokenizers and data"):
        parts = build(config, world)
    torch.manual_seed(config.run.seed + world.rank)  # dropout is each rank's own
    return parts


def _benchmarks(config: TrainConfig, world: World) -> Benchmarks | None:
    """Read the tasks that are asked for, before any model is loaded."""
    if config.evaluation.skip_lm_eval or not config.evaluation.eval.tasks:
        return None
    with world.together("load the tasks of eval.tasks"):
        return Benchmarks.load(config.evaluation.eval)


def _run(folder: Path, config: TrainConfig, world: World, stop_request: StopRequest) -> int:
    """Take the folder, build, restore, train, export; say in outcome.json how it ended."""
    if config.run.resume and world.broadcast(_is_finished(folder, config)):
        with world.together("compare the finished run"):
            done = Identity(read_manifest(_last_checkpoint(folder, config)).config)
            check_same(folder, done, Identity(to_dict(config)), MAY_DIFFER)
        world.say(f"{folder}: this run is done and exported; there is nothing to resume")
        return ExitCode.DONE
    begun = taken(
        folder,
        config,
        world,
        stop_request,
        resume=config.run.resume,
        hang_timeout=config.parallel.hang_timeout,
        export=_export_folder(config),
        saving=Saving(config.schedule.keep_checkpoints, config.schedule.async_save),
    )
    with begun as session, blaming_memory(config, world.world_size):
        benchmarks = _benchmarks(config, world)
        parts = _build(config, world)
        with closing(parts.batches):
            world.say(describe(parts, config))
            training = _begin(config, session, parts, benchmarks)
            if world.is_main:
                write_facts(session.folder, facts(parts), resumed=session.is_resumed)
            session.ending.code, session.ending.reason = _train(training)
    return session.ending.code


def _export_folder(config: TrainConfig) -> Path:
    """Return where the model is written in Hugging Face layout."""
    return Path(config.run.export_to or Path(config.run.output_dir) / "export")


def _last_checkpoint(folder: Path, config: TrainConfig) -> Path:
    return folder / "checkpoints" / f"step_{config.schedule.steps:08d}"


def _is_finished(folder: Path, config: TrainConfig) -> bool:
    """Whether the run in `folder` came to its end: it took this number of steps, and its export is whole.

    An export gets its name only after it was checked, so its name says that nothing is missing.
    """
    return _last_checkpoint(folder, config).is_dir() and (_export_folder(config) / "config.json").is_file()


def _begin(config: TrainConfig, session: Session, parts: Parts, benchmarks: Benchmarks | None) -> Training:
    """Restore the newest checkpoint if asked to, and open the reports where it ends."""
    run, world = parts.run, session.world
    state = State(module=run.model, optimizer=run.optimizer)
    about = to_dict(config)
    if (found := session.restore(state, Identity(about, parts.fingerprints), MAY_DIFFER)) is not None:
        go_on(parts, state, world, found)
    resumed_at = None if found is None else run.step
    record = Record(session.folder, resumed_at, world.is_main, config.run.report_to, about)
    usage = ExpertUsage.of(parts.student)
    experts = None if usage is None else ExpertReports(usage, session.folder)
    reports = Reports.open(record, config.schedule.steps)
    return Training(config, session, parts, reports, benchmarks, experts)


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
            run.nonfinite_steps = int(extra.get("nonfinite_steps", 0))
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


def _train(training: Training) -> tuple[ExitCode, str]:
    session, world, parts = training.session, training.session.world, training.parts
    with training.reports, session.taking_steps("all steps are taken and saved, --resume exports"):
        _before_steps(training)
        for _ in session.steps(training.config.schedule.steps, partial(_is_ready, training)):
            _one_step(training)
        if session.is_stopped():
            _save(training)  # in this block: the signal of another rank may reach this one only now
            return session.stopped()
    said = [*_words_left_out(training), *training.reports.finish()]
    for line in said:
        world.say(line)
    session.at("exporting")
    folder, measured = _export_folder(training.config), training.reports.bits_per_byte
    hand_on(folder, training.config, parts, world, measured)
    world.say(f"exported to {folder}")
    return ExitCode.DONE, f"{session.ending.step} steps done"


def _before_steps(training: Training) -> None:
    if training.session.is_resumed:
        return  # a checkpoint of step 0 comes after its evaluation
    if training.config.evaluation.eval_at_step_zero:
        _evaluate(training)
    if training.config.schedule.save_at_step_zero:
        _save(training)


def _is_ready(training: Training) -> bool:
    """Wait for the data of the next step; False: a signal came."""
    stop_request, timeout = training.session.stop, training.config.parallel.hang_timeout
    began = time.perf_counter()
    is_ready = training.parts.batches.ready(timeout, lambda: stop_request.asked is not None)
    training.parts.run.clock.add("data", time.perf_counter() - began)
    return is_ready


def _one_step(training: Training) -> None:
    config, run, reports = training.config, training.parts.run, training.reports
    schedule = config.schedule
    is_last = run.step + 1 == schedule.steps
    take(run, next(training.parts.batches), training.session, reports, (schedule.logging_interval, is_last))
    if training.experts is not None:
        training.experts.after_step(run.step, reports, training.session.world)
    if _due(run.step, config.evaluation.eval_interval, is_last):
        _evaluate(training)
    if _due(run.step, schedule.save_interval, is_last):
        _save(training)
    if run.step % schedule.sync_interval == 0:
        training.session.world.barrier()


def take(
    run: Run,
    micro_batches: Sequence[Batch],
    session: Session,
    reports: Reports,
    logged: tuple[int, bool],
    figures: Callable[[StepReport], Mapping[str, float]] = lambda report: {},
) -> None:
    """Take the step of a run that is next, count it and report it; so does every training.

    Args:
        run: what is trained.
        micro_batches: of this rank.
        session: counts the steps.
        reports: of the run.
        logged: steps between two lines of metrics, and whether this is the last one.
        figures: numbers of a line beside those of a report.
    """
    report = train_step(run, micro_batches)
    run.step += 1
    session.ending.step = run.step
    if report.skipped in ("untrained", "nonfinite"):
        number = run.untrained_steps if report.skipped == "untrained" else run.nonfinite_steps
        reports.skipped(run.step, report.skipped, number)
    is_due, more = _due(run.step, *logged), figures(report)
    reports.step(run.step, report, micro_batches, more, is_due=is_due, clock=run.clock)


def _due(step: int, interval: int, always: bool) -> bool:
    return always or step % interval == 0


def _evaluate(training: Training) -> None:
    parts, session = training.parts, training.session
    session.at("evaluating")
    if parts.heldout:
        measured = bits_per_byte(parts.run.model, parts.heldout, session.world, parts.run.step)
        training.reports.evaluation(parts.run.step, measured)
        if not math.isfinite(measured.student):
            cause = "the update of that step spoiled it" if parts.run.step else "before any update"
            raise NonFiniteError(
                f"the student's bits per byte are not finite after step {parts.run.step}: {cause}; "
                f"lower the learning rate{'' if parts.run.is_float32 else ' or use dtype float32'}, in a new "
                "output_dir"
            )
    if training.benchmarks is not None:
        scores = training.benchmarks.run(parts.run.model, parts.tokenizers.target, session.world)
        training.reports.benchmarks(parts.run.step, scores)


def _save(training: Training) -> None:
    session, run, batches = training.session, training.parts.run, training.parts.batches
    left_out = _left_out(training)
    training.reports.saved(run.step, left_out.rows)
    session.state.optimizer = run.stage.optimizer
    window = None if training.experts is None else training.experts.newest()
    session.save(
        {
            "data": batches.state_dict(),
            "untokenized": left_out.untokenized,
            "loss_scale": (run.loss_scale.value, run.loss_scale.good_steps),
            "objective": run.objective.state_dict(),
            "untrained_steps": run.untrained_steps,
            "nonfinite_steps": run.nonfinite_steps,
        },
        then=partial(_after_checkpoint, training, run.step, window),
    )
    training.reports.save_seconds += session.save_seconds
    session.save_seconds = 0.0


def _after_checkpoint(training: Training, step: int, window: str | None) -> None:
    if training.experts is not None:
        training.experts.after_checkpoint(step, window, training.session.world)
    training.reports.record.upload(training.session.folder / "checkpoints" / f"step_{step:08d}")


def _left_out(training: Training) -> LeftOut:
    """Count what was left out of the data, over all ranks; every rank calls it."""
    mine = training.parts.batches.left_out()
    ranks = training.session.world.gather([mine.untokenized, mine.altered])
    untokenized, altered = (sum(map(Counter, counts), Counter[str]()) for counts in zip(*ranks, strict=True))
    return LeftOut(mine.skipped, untokenized, altered)


def _words_left_out(training: Training) -> Iterator[str]:
    """Say which rows were no documents, or could not be tokenized: counts and reasons, no text."""
    left_out = _left_out(training)
    if skipped := training.parts.run.untrained_steps:
        yield f"steps skipped, because no token of theirs is trained: {skipped:,}"
    if skipped := training.parts.run.nonfinite_steps:
        yield f"steps skipped, because a loss or gradient was not finite: {skipped:,}"
    if left_out.rows:
        reasons = "; ".join(f"{count:,} {reason}" for reason, count in left_out.rows.most_common(5))
        yield f"rows left out: {reasons}"
    if left_out.altered:
        yield f"characters that a tokenizer cannot write, dropped or replaced: {dict(left_out.altered)}"
