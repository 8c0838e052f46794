"""A hypernetwork's training from its configuration to its folder, resumable at every checkpoint."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tokenkit.config import to_dict, to_yaml
from tokenkit.config.hypernet import TrainHypernetConfig
from tokenkit.data.mix import Mix, open_data
from tokenkit.disk import write_durably
from tokenkit.embeddings.hypernet import Hypernet
from tokenkit.embeddings.hypernet_files import ABOUT, load_hypernet, rows_digest, save_hypernet
from tokenkit.errors import ConfigError, ExitCode, blaming_data
from tokenkit.models.causal_lm import LoadOptions, load_causal_lm
from tokenkit.models.fingerprint import model_fingerprint
from tokenkit.optim import LearningRate, build_optimizer
from tokenkit.optim_options import OptimizerOptions
from tokenkit.parallel import World, start
from tokenkit.run import checkpoint
from tokenkit.run.checkpoint import Identity, State
from tokenkit.run.folder import RunLock, prepare_output
from tokenkit.run.metrics import MetricsFile, Progress, draw_curves
from tokenkit.run.signals import StopRequest
from tokenkit.tokenization.tokenizer import load_tokenizer
from tokenkit.training.build import check_is_the_models_own
from tokenkit.training.ending import Ending, begin_outcome, ending
from tokenkit.training.hypernet import HypernetTrainer, old_matrices, take_step

MAY_DIFFER = ("output", "resume", "logging_interval", "save_interval", "data.num_workers")


@dataclass(frozen=True, slots=True)
class Session:
    """A run that has begun."""

    config: TrainHypernetConfig
    folder: Path
    mix: Mix
    trainer: HypernetTrainer
    state: State
    about: dict[str, Any]
    """What hypernet.json says beside the network's shape."""
    world: World
    stop: StopRequest
    ending: Ending


def train(config: TrainHypernetConfig) -> int:
    """Train and write; return the exit code.

    Raises:
        ValueError, FileNotFoundError: a model, a tokenizer or data that cannot be read or do not fit.
        FileExistsError: the output is not empty, and `resume` is off.
        FloatingPointError: a loss that is not finite.
    """
    folder = Path(config.output).expanduser()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("train-hypernet runs in one process: start it without torchrun")
    world = start()
    with StopRequest() as stop_request, ExitStack() as stack:
        if config.resume and (folder / ABOUT).is_file():
            _check_finished(folder, _open(config, world)[2])
            print(f"{folder}: this hypernetwork is trained; there is nothing to resume", file=sys.stderr)
            return ExitCode.DONE
        prepare_output(folder, resume=config.resume)
        stack.enter_context(RunLock(folder))
        begin_outcome(folder)
        end = stack.enter_context(ending(folder, world, math.inf))
        mix, trainer, about = _open(config, world)
        if not (folder / "config.yaml").exists():
            write_durably(folder / "config.yaml", to_yaml(config))
        optimizer = build_optimizer(trainer.hypernet.named_parameters(), _optimizer_options(config))
        state = State(trainer.hypernet, optimizer)
        session = Session(config, folder, mix, trainer, state, about, world, stop_request, end)
        end.code, end.reason = _train(session, _restore(session) if config.resume else 0.0)
    return end.code


def _open(config: TrainHypernetConfig, world: World) -> tuple[Mix, HypernetTrainer, dict[str, Any]]:
    with blaming_data():
        mix, _ = open_data(config.data, config.schedule.seed)
    return mix, *_trainer(config, mix, world)


def _identity(about: Mapping[str, Any]) -> Identity:
    names = ("base_model", "old_tokenizer")
    return Identity(about["config"], {name: about[name]["fingerprint"] for name in names})


def _check_finished(folder: Path, about: Mapping[str, Any]) -> None:
    """Refuse to call a run done that another configuration has done.

    Raises:
        ValueError: with each difference.
    """
    done = _identity(load_hypernet(folder)[1])
    if changes := checkpoint.differences(done, _identity(about), MAY_DIFFER):
        raise ValueError(
            f"{folder} holds a hypernetwork that was trained otherwise (then -> now):\n  "
            + "\n  ".join(changes)
            + "\nchoose another output"
        )


def _restore(session: Session) -> float:
    """Go on from the newest checkpoint, if there is one; return the seconds that it took to get there."""
    state, root = session.state, session.folder / "checkpoints"
    found = checkpoint.restore(root, state, _identity(session.about), session.world, may_differ=MAY_DIFFER)
    if found is None:
        return 0.0
    session.mix.load_state_dict(state.extra["data"])
    session.trainer.load_state_dict(state.extra["trainer"])
    print(f"resuming after step {state.step} from {found}", file=sys.stderr)
    return float(state.extra["seconds"])


def _train(session: Session, seconds: float) -> tuple[ExitCode, str]:
    """Take the steps that are left and write; `seconds` were spent before."""
    config, state, folder = session.config, session.state, session.folder
    schedule = config.schedule
    rate = LearningRate(_optimizer_options(config), schedule.steps, schedule.warmup_steps)
    metrics = MetricsFile(folder, step=state.step, is_main=True)
    progress = Progress(schedule.steps, state.step, is_main=True)
    began = time.perf_counter() - seconds
    try:
        stop_request = session.stop
        with stop_request.waiting_for_step(
            "all steps are taken; --resume takes those behind the last checkpoint"
        ):
            while state.step < schedule.steps:
                figures = take_step(session.trainer, state, rate)
                session.ending.step = state.step
                progress.update(state.step, loss=figures.get("loss/clm", figures.get("loss/identity")))
                is_last = state.step == schedule.steps
                if state.step % schedule.logging_interval == 0 or state.step == 1 or is_last:
                    metrics.write(state.step, figures)
                stopping = stop_request.asked is not None
                if stopping or (state.step % config.save_interval == 0 and not is_last):
                    metrics.sync()
                    _save(session, time.perf_counter() - began)
                if stopping:
                    words = f"stopped by {stop_request.asked} after step {state.step}: go on with --resume"
                    print(words, file=sys.stderr)
                    return ExitCode.PREEMPTED, words
    finally:
        progress.close()
        with suppress(OSError) if sys.exception() else nullcontext():  # the first error is the one to see
            metrics.close()
    seconds = round(time.perf_counter() - began, 1)
    save_hypernet(folder, session.trainer.hypernet, {**session.about, "seconds": seconds})
    draw_curves(folder)
    print(f"{schedule.steps} steps in {seconds:.0f} s: {folder}")
    return ExitCode.DONE, f"{schedule.steps} steps done"


def _save(session: Session, seconds: float) -> None:
    session.state.extra = {
        "data": session.mix.state_dict(),
        "trainer": session.trainer.state_dict(),
        "seconds": seconds,
    }
    checkpoint.save(session.folder / "checkpoints", session.state, _identity(session.about), session.world)


def _optimizer_options(config: TrainHypernetConfig) -> OptimizerOptions:
    schedule = config.schedule
    return OptimizerOptions(
        learning_rate=schedule.learning_rate,
        weight_decay=schedule.weight_decay,
        max_grad_norm=schedule.max_grad_norm,
    )


def _trainer(config: TrainHypernetConfig, mix: Mix, world: World) -> tuple[HypernetTrainer, dict[str, Any]]:
    """Load the model, and return its trainer and what the hypernetwork's JSON says beside its shape."""
    source, schedule = config.model, config.schedule
    name = source.pretrained_model_name_or_path
    with blaming_data():
        old = load_tokenizer(
            source.tokenizer_name or name,
            revision=source.revision,
            trust_remote_code=config.trust_remote_code,
        )
        options = LoadOptions(revision=source.revision, trust_remote_code=config.trust_remote_code)
        model = load_causal_lm(name, old.vocab_size, options).to(world.device)
        matrices = old_matrices(model, old)
    check_is_the_models_own(old, source)
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and schedule.max_length > limit:
        raise ConfigError(
            f"max_length is {schedule.max_length}, but the model has {limit} positions: set it to at most "
            f"{limit}"
        )
    writes = 2 if config.output_embeddings_mode == "untie" else len(matrices)
    torch.manual_seed(schedule.seed)
    hypernet = Hypernet(config.hypernet, matrices[0].shape[1], reads=len(matrices), writes=writes)
    commit = getattr(model.config, "_commit_hash", None)
    about = {
        "base_model": {
            "name": name,
            "fingerprint": model_fingerprint(name, commit),
            "rows": rows_digest(matrices),
        },
        "old_tokenizer": {"name": source.tokenizer_name or name, "fingerprint": old.fingerprint()},
        "config": to_dict(config),
    }
    hypernet = hypernet.to(world.device).fit_scale(matrices)
    return HypernetTrainer(model, old, hypernet, _texts(mix), schedule, config.sampling), about


def _texts(mix: Mix) -> Iterator[str]:
    """Yield the texts of a mix; of conversations, what is said."""
    for document in mix:
        yield document.text or "\n".join(message.content for message in document.messages or ())
