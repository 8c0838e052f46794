"""The loop: one run from its configuration to the exported model, resumable at every checkpoint."""

from __future__ import annotations

import math
import os
import sys
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tokenkit.config import TrainConfig, to_dict, to_yaml
from tokenkit.config.models import ModelSource
from tokenkit.disk import blaming_disk, write_durably
from tokenkit.errors import DataError, DiskError, ExitCode, NonFiniteError, blaming_data
from tokenkit.evaluation.bits_per_byte import bits_per_byte
from tokenkit.export.huggingface import ExportRequest, export_huggingface
from tokenkit.models.causal_lm import DTYPES
from tokenkit.models.fingerprint import model_fingerprint
from tokenkit.parallel import (
    World,
    all_reduce_counts,
    barrier,
    broadcast_json,
    gather_json,
    start,
    stop,
    together,
)
from tokenkit.run import checkpoint
from tokenkit.run.checkpoint import Identity, State
from tokenkit.run.folder import RunLock, prepare_output
from tokenkit.run.metrics import draw_curves
from tokenkit.run.signals import StopRequest
from tokenkit.training.build import Parts, build
from tokenkit.training.ending import Ending, begin_outcome, ending
from tokenkit.training.exporting import run_facts, student_state
from tokenkit.training.finished import (
    MAY_DIFFER,
    check_finished,
    export_folder,
    go_on,
    is_finished,
    refuse_old_export,
)
from tokenkit.training.notes import describe
from tokenkit.training.reports import Reports
from tokenkit.training.step import train_step


@dataclass(frozen=True, slots=True)
class Session:
    """One process's view of a run that has begun."""

    config: TrainConfig
    world: World
    folder: Path
    parts: Parts
    state: State
    identity: Identity
    reports: Reports
    is_resumed: bool
    """It goes on from a checkpoint."""
    lock: RunLock
    ending: Ending
    stop: StopRequest


def train(config: TrainConfig) -> int:
    """Run training as configured and return the exit code.

    Raises:
        ValueError, OSError, ArithmeticError: one line for the user; `tokenkit.cli` gives each its exit code.
    """
    with StopRequest() as stop_request:
        world = _join(config)
        try:
            if config.run.dry_run:
                return _dry_run(config, world)
            return _run(Path(config.run.output_dir), config, world, stop_request)
        finally:
            stop(world)


def _join(config: TrainConfig) -> World:
    parallel = config.parallel
    if parallel.use_distributed and "WORLD_SIZE" not in os.environ:
        raise ValueError(
            "use_distributed is set but torchrun started nothing: run torchrun -m tokenkit.train"
        )
    return start(
        timeout=parallel.hang_timeout,
        backend=parallel.distributed_backend,
        n_data_parallel=parallel.n_data_parallel,
        n_model_parallel=parallel.n_model_parallel,
    )


def _dry_run(config: TrainConfig, world: World) -> int:
    """Load everything, run the first step of each stage, print its losses, write nothing."""
    parts = _build(config, world)
    for stage in parts.run.stages:
        parts.run.step = stage.first_step
        report = train_step(parts.run, next(parts.batches))
        if report.skipped == "untrained":
            raise DataError(
                "no token of the first step is trained: look at max_length_new, loss_mask_mode, data"
            )
        losses = ", ".join(f"{name} {value:.4f}" for name, value in report.losses.items())
        _say(world, f"dry run: {losses}, gradient norm {report.grad_norm:.4f}; nothing was written")
    parts.batches.close()
    return ExitCode.DONE


def _build(config: TrainConfig, world: World) -> Parts:
    torch.manual_seed(config.run.seed)  # the same on every rank: adapters begin equal
    with together("load models, tokenizers and data", world):
        parts = build(config, world)
    torch.manual_seed(config.run.seed + world.rank)  # dropout is each rank's own
    return parts


def _run(folder: Path, config: TrainConfig, world: World, stop_request: StopRequest) -> int:
    """Take the folder, build, restore, train, export; say in outcome.json how it ended."""
    if config.run.resume and broadcast_json(is_finished(folder, config), world):
        with together("compare the finished run", world):
            check_finished(folder, config)
        _say(world, f"{folder}: this run is done and exported; there is nothing to resume")
        return ExitCode.DONE
    lock = RunLock(folder)
    with ExitStack() as stack:
        with together("prepare the output folder", world):
            if world.is_main:
                prepare_output(folder, resume=config.run.resume)
                refuse_old_export(export_folder(config))
                stack.enter_context(lock)
                begin_outcome(folder)
        state = stack.enter_context(ending(folder, world, config.parallel.hang_timeout))
        parts = _build(config, world)
        stack.callback(parts.batches.close)
        _say(world, describe(parts, config))
        session = _begin(folder, config, world, parts, (lock, state, stop_request))
        state.code, state.reason = _train(session)
    return state.code


def _begin(
    folder: Path, config: TrainConfig, world: World, parts: Parts, around: tuple[RunLock, Ending, StopRequest]
) -> Session:
    """Restore the newest checkpoint if asked to, and open the reports where it ends."""
    run = parts.run
    state = State(module=run.model, optimizer=run.optimizer)
    fingerprints = parts.tokenizers.fingerprints() | _model_fingerprints(config, parts)
    identity = Identity(config=to_dict(config), fingerprints=fingerprints)
    found = None
    if config.run.resume:
        found = checkpoint.restore(folder / "checkpoints", state, identity, world, may_differ=MAY_DIFFER)
        if found is not None:
            go_on(parts, state, world, found)
            _say(world, f"resuming after step {run.step} from {found}")
    if world.is_main and not (folder / "config.yaml").exists():
        write_durably(folder / "config.yaml", to_yaml(config))
    around[1].step = run.step
    resumed_at = None if found is None else run.step
    reports = Reports.open(folder, config, resumed_at, is_main=world.is_main)
    return Session(config, world, folder, parts, state, identity, reports, found is not None, *around)


def _model_fingerprints(config: TrainConfig, parts: Parts) -> dict[str, str]:
    sources: dict[str, tuple[ModelSource, Any]] = {"student model": (config.student, parts.student)}
    if config.teacher is not None and parts.run.model.teacher is not None:
        sources["teacher model"] = (config.teacher, parts.run.model.teacher)
    return {
        name: model_fingerprint(
            source.pretrained_model_name_or_path, getattr(model.config, "_commit_hash", None)
        )
        for name, (source, model) in sources.items()
    }


def _train(session: Session) -> tuple[ExitCode, str]:
    run, reports, stop_request = session.parts.run, session.reports, session.stop
    with reports, stop_request.waiting_for_step("all steps are taken and saved, --resume exports"):
        _before_steps(session)
        while run.step < session.config.schedule.steps and not _is_asked_to_stop(session):
            _one_step(session)
        if _any_rank(stop_request.asked is not None, session):
            session.ending.at("saving")
            _save(session)  # in this block: the signal of another rank may reach this one only now
            name = stop_request.asked or "a signal to another rank"
            words = f"stopped by {name} after step {run.step}: go on with --resume"
            _say(session.world, words)
            return ExitCode.PREEMPTED, words
    stop_request.raise_if_asked()  # heard by no rank in the block: it came while they asked each other
    _say_left_out(session)
    if (summary := reports.summary()) is not None:
        _say(session.world, summary)
    if session.world.is_main:
        draw_curves(session.folder)
    session.ending.at("exporting")
    _export(session)
    return ExitCode.DONE, f"{run.step} steps done"


def _before_steps(session: Session) -> None:
    if session.parts.run.step or session.is_resumed:
        return  # a checkpoint of step 0 comes after its evaluation
    if session.config.evaluation.eval_at_step_zero:
        _evaluate(session)
    if session.config.schedule.save_at_step_zero:
        _save(session)


def _is_asked_to_stop(session: Session) -> bool:
    """Wait for the data of the next step; True on every rank where a signal reached one of them."""
    run, stop_request = session.parts.run, session.stop
    session.ending.at(f"waiting for the data of step {run.step + 1}")
    with blaming_data():
        is_ready = session.parts.batches.ready(
            session.config.parallel.hang_timeout, lambda: stop_request.asked is not None
        )
    session.ending.at(f"step {run.step + 1}")
    return _any_rank(not is_ready or stop_request.asked is not None, session)


def _one_step(session: Session) -> None:
    config, run, reports = session.config, session.parts.run, session.reports
    schedule = config.schedule
    with blaming_data():
        micro_batches = next(session.parts.batches)
    report = train_step(run, micro_batches)
    run.step += 1
    session.ending.step = run.step
    if report.skipped == "untrained":
        reports.untrained(run.step, run.untrained_steps)
    is_last = run.step == schedule.steps
    reports.step(run.step, report, micro_batches, is_due=_due(run.step, schedule.logging_interval, is_last))
    if _due(run.step, config.evaluation.eval_interval, is_last):
        session.ending.at("evaluating")
        _evaluate(session)
    if _due(run.step, schedule.save_interval, is_last):
        session.ending.at("saving")
        _save(session)
    if run.step % schedule.sync_interval == 0:
        barrier(session.world)


def _due(step: int, interval: int, always: bool) -> bool:
    return always or step % interval == 0


def _any_rank(flag: bool, session: Session) -> bool:
    """Whether the flag is up on some rank: a signal may reach only one."""
    value = torch.tensor(float(flag))
    if session.world.mesh is None:
        return flag
    return float(all_reduce_counts({"flag": value}, session.parts.run.step, session.world)["flag"]) > 0


def _evaluate(session: Session) -> None:
    parts = session.parts
    if parts.heldout:
        measured = bits_per_byte(parts.run.model, parts.heldout, session.world, parts.run.step)
        session.reports.evaluation(parts.run.step, measured)
        if not math.isfinite(measured.student):
            cause = "the update of that step spoiled it" if parts.run.step else "before any update"
            raise NonFiniteError(
                f"the student's bits per byte are not finite after step {parts.run.step}: {cause}; "
                f"lower the learning rate{'' if parts.run.is_float32 else ' or use dtype float32'}, in a new "
                "output_dir"
            )


def _save(session: Session) -> None:
    run, state = session.parts.run, session.state
    if session.world.is_main and not session.lock.is_held():
        raise DiskError(
            f"{session.lock.path} is gone or of another run: the folder was removed or taken while the run "
            "went on, and nothing was written there; choose another output_dir, or start again"
        )
    untokenized = _untokenized(session)
    session.reports.left_out(run.step, session.parts.batches.skipped + untokenized)
    session.reports.sync()
    state.step, state.optimizer = run.step, run.stage.optimizer
    scale = (run.loss_scale.value, run.loss_scale.good_steps)
    state.extra = {
        "data": session.parts.batches.state_dict(),
        "untokenized": untokenized,
        "loss_scale": scale,
        "objective": run.objective.state_dict(),
        "untrained_steps": run.untrained_steps,
    }
    root = session.folder / "checkpoints"
    if not (root / f"step_{run.step:08d}").exists():
        checkpoint.save(root, state, session.identity, session.world)


def _untokenized(session: Session) -> Counter[str]:
    """Count the documents that could not be tokenized, over all ranks; every rank calls it."""
    return sum(map(Counter, gather_json(session.parts.batches.untokenized, session.world)), Counter())


def _say_left_out(session: Session) -> None:
    """Say which rows were no documents, or could not be tokenized: counts and reasons, no text."""
    left_out = session.parts.batches.skipped + _untokenized(session)
    if skipped := session.parts.run.untrained_steps:
        _say(session.world, f"steps skipped, because no token of theirs is trained: {skipped:,}")
    if left_out:
        reasons = "; ".join(f"{count:,} {reason}" for reason, count in left_out.most_common(5))
        _say(session.world, f"rows left out: {reasons}")
    altered = sum(map(Counter, gather_json(session.parts.batches.altered, session.world)), Counter[str]())
    if altered:
        _say(session.world, f"characters that a tokenizer cannot write, dropped or replaced: {dict(altered)}")


def _export(session: Session) -> None:
    """Gather the student on rank 0 and write it in Hugging Face layout."""
    config, measured = session.config, session.reports.bits_per_byte
    state = student_state(session.parts.run.model, session.parts.student)
    with together("export the student", session.world):
        if session.world.is_main:
            facts = run_facts(config, session.parts.run.step, measured)
            request = ExportRequest(
                folder=export_folder(config), dtype=DTYPES[config.training.dtype], facts=facts
            )
            with blaming_disk(request.folder):
                folder = export_huggingface(
                    session.parts.student, state, session.parts.tokenizers.target, request
                )
            _say(session.world, f"exported to {folder}")


def _say(world: World, text: str) -> None:
    if world.is_main:
        print(text, file=sys.stderr, flush=True)
