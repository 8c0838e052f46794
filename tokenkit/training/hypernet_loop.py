"""A hypernetwork's training from its configuration to its folder, resumable at every checkpoint."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tokenkit.config import to_dict
from tokenkit.config.hypernet import TrainHypernetConfig
from tokenkit.data.mix import Mix, open_data
from tokenkit.embeddings.hypernet import Hypernet
from tokenkit.embeddings.hypernet_files import ABOUT, load_hypernet, rows_digest, save_hypernet
from tokenkit.errors import ConfigError, ExitCode, blaming_data
from tokenkit.models.causal_lm import LoadOptions, load_causal_lm
from tokenkit.models.reading import model_fingerprint
from tokenkit.optim_options import OptimizerOptions
from tokenkit.parallel import World
from tokenkit.run.checkpoint import Identity, State
from tokenkit.run.metrics import Record
from tokenkit.tokenization.tokenizer import load_tokenizer
from tokenkit.training.hypernet import HypernetTrainer, old_matrices, stages
from tokenkit.training.loop import take
from tokenkit.training.pair import check_is_the_models_own
from tokenkit.training.reports import Reports
from tokenkit.training.session import Session, check_same, processes, taken
from tokenkit.training.step import Run

MAY_DIFFER = ("output", "resume", "logging_interval", "save_interval", "data.num_workers")


@dataclass(frozen=True, slots=True)
class Parts:
    """What a run is made of."""

    mix: Mix
    trainer: HypernetTrainer
    about: dict[str, Any]
    """What hypernet.json says beside the network's shape."""


def train(config: TrainHypernetConfig) -> int:
    """Train and write; return the exit code.

    Raises:
        ValueError, FileNotFoundError: a model, a tokenizer or data that cannot be read or do not fit.
        FileExistsError: the output is not empty, and `resume` is off.
        NonFiniteError: a loss that is not finite.
    """
    folder = Path(config.output).expanduser()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("train-hypernet runs in one process: start it without torchrun")
    with processes() as (world, stop_request):
        if config.resume and (folder / ABOUT).is_file():
            done, now = _identity(load_hypernet(folder)[1]), _identity(_open(config, world).about)
            check_same(folder, done, now, MAY_DIFFER)
            world.say(f"{folder}: this hypernetwork is trained; there is nothing to resume")
            return ExitCode.DONE
        begun = taken(folder, config, world, stop_request, resume=config.resume, hang_timeout=math.inf)
        with begun as session:
            session.ending.code, session.ending.reason = _train(config, session, _open(config, world))
    return session.ending.code


def _identity(about: dict[str, Any]) -> Identity:
    names = ("base_model", "old_tokenizer")
    return Identity(about["config"], {name: about[name]["fingerprint"] for name in names})


def _open(config: TrainHypernetConfig, world: World) -> Parts:
    with blaming_data():
        mix, _ = open_data(config.data, config.schedule.seed)
    return Parts(mix, *_trainer(config, mix, world))


def _train(config: TrainHypernetConfig, session: Session, parts: Parts) -> tuple[ExitCode, str]:
    """Go on from the newest checkpoint, take the steps that are left, and write."""
    schedule, folder, trainer = config.schedule, session.folder, parts.trainer
    run = Run(
        model=trainer,
        stages=stages(trainer, _optimizer_options(config)),
        world=session.world,
        max_grad_norm=schedule.max_grad_norm or None,
        is_float32=True,
    )
    state = State(trainer.hypernet, run.optimizer)
    began, resumed_at = time.perf_counter(), None
    if session.restore(state, _identity(parts.about), MAY_DIFFER) is not None:
        parts.mix.load_state_dict(state.extra["data"])
        trainer.go_on(state.extra["trainer"])
        began, resumed_at = began - float(state.extra["seconds"]), state.step
        run.step = state.step
    reports = Reports.open(Record(folder, resumed_at, is_main=True), schedule.steps)
    after = "all steps are taken; --resume takes those behind the last checkpoint"
    with reports, session.taking_steps(after):
        for step in session.steps(schedule.steps):
            is_last = step == schedule.steps
            logged = (schedule.logging_interval, is_last or step == 1)
            take(run, [trainer.draw(run.step)], session, reports, logged, trainer.figures)
            if step % config.save_interval == 0 and not is_last:
                _save(session, parts, reports, began)
        if session.is_stopped():
            _save(session, parts, reports, began)
            return session.stopped()
    seconds = round(time.perf_counter() - began, 1)
    save_hypernet(folder, trainer.hypernet, {**parts.about, "seconds": seconds})
    reports.finish()
    print(f"{schedule.steps} steps in {seconds:.0f} s: {folder}")
    return ExitCode.DONE, f"{schedule.steps} steps done"


def _save(session: Session, parts: Parts, reports: Reports, began: float) -> None:
    reports.record.sync()
    seconds, trainer = time.perf_counter() - began, parts.trainer.progress()
    session.save({"data": parts.mix.state_dict(), "trainer": trainer, "seconds": seconds})


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
