"""All checks of a configuration, in the order of what they cost; one that fails does not end the others."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import Any

import torch

from tokenkit.config import TrainConfig
from tokenkit.config.models import ModelSource
from tokenkit.config.paths import lost_paths
from tokenkit.data.collate import AlignedCollator
from tokenkit.data.mix import open_data
from tokenkit.errors import ExitCode, blaming_data
from tokenkit.losses import Loss
from tokenkit.models.causal_lm import LoadOptions
from tokenkit.models.reading import read_configuration, stops
from tokenkit.objective.weights import Objective
from tokenkit.tokenization.tokenizer import Tokenizer
from tokenkit.training.benchmarks import Benchmarks
from tokenkit.training.build import (
    build_collator,
    build_losses,
    build_models,
    check_length,
    check_rows,
    reads_teacher,
)
from tokenkit.training.doctor.findings import Findings, many
from tokenkit.training.doctor.machine import (
    check_device,
    check_folder,
    check_memory,
    check_room,
    check_versions,
)
from tokenkit.training.doctor.text import check_data
from tokenkit.training.doctor.tokenizers import check_pair, check_special, check_vocabulary
from tokenkit.training.estimate import estimate
from tokenkit.training.pair import Pair, Tokenizers, target_of, tokenizer_of

CPU = torch.device("cpu")


@dataclass
class _Sides:
    """What could be loaded; None: an error says why not."""

    old: Tokenizer | None = None
    target: Tokenizer | None = None
    teacher: Tokenizer | None = None

    @property
    def all(self) -> Tokenizers | None:
        if self.old is None or self.target is None or self.teacher is None:
            return None
        return Tokenizers(self.old, self.target, self.teacher, {})


def examine(config: TrainConfig, *, documents: int = 256, weights: bool = True) -> Findings:
    """Return everything that there is to say about a training before it is started. Nothing is written.

    Args:
        config: of the training.
        documents: of the data, that are tokenized.
        weights: load both models as the training does, and rehearse its export.
    """
    found = Findings()
    for said in lost_paths(config):
        found.error("config", said, code=ExitCode.DATA)
    with found.trying("machine"):
        check_versions(found)
        check_device(config, found)
        _check_tracker(config, found)
    check_folder(config, found)
    sides = _load_sides(config, found)
    losses, collator = _build(config, sides, found)
    reads = config.objective.needs_teacher or config.training.prefix.prefix_steps > 0
    if sides.target is not None and sides.teacher is not None:
        with found.trying("pair"):
            check_pair(sides.target, sides.teacher, config.text, reads, found)
    if collator is not None:
        with found.trying("data"), blaming_data():
            mix, heldout = open_data(config.data, config.run.seed)
            check_data(mix, collator, config, documents, found, has_teacher=reads)
            found.note("data", f"held out and measured: {many(len(heldout), 'document')}")
    is_read = _check_configurations(config, sides, reads, found)
    if is_read:
        with found.trying("models"):
            size = estimate(config, int(os.environ.get("WORLD_SIZE", "1")))
            check_memory(size, found)
            check_room(config, size, found)
    if weights and is_read and losses is not None and sides.all is not None:
        with found.trying("models"):
            _load_models(config, sides.all, losses)
    return found


def _check_tracker(config: TrainConfig, found: Findings) -> None:
    name = config.run.report_to
    if name != "none" and importlib.util.find_spec(name) is None:
        found.warning(
            "machine", f"report_to {name}: it is not installed, so nothing is reported there",
            "pip install 'tokenkit-torch[track]'",
        )  # fmt: skip


def _load_sides(config: TrainConfig, found: Findings) -> _Sides:
    """Load each tokenizer, and look at it; which of them failed does not matter to the others."""
    sides = _Sides()
    with found.trying("tokenizers"):
        sides.old = tokenizer_of(config.student, config)
    with found.trying("tokenizers"):
        sides.target = target_of(config) or sides.old
    with found.trying("tokenizers"):
        sides.teacher = sides.old if config.teacher is None else tokenizer_of(config.teacher, config)
    seen: set[str] = set()
    for side, tokenizer in (("student", sides.old), ("target", sides.target), ("teacher", sides.teacher)):
        if tokenizer is None or tokenizer.fingerprint() in seen:
            continue
        seen.add(tokenizer.fingerprint())
        with found.trying("vocabulary"):
            check_vocabulary(tokenizer, side, found)
    return sides


def _build(
    config: TrainConfig, sides: _Sides, found: Findings
) -> tuple[dict[str, Loss[Any]] | None, AlignedCollator | None]:
    """Build what the training builds of its configuration, each part by itself."""
    main_steps = config.schedule.steps - config.training.prefix.prefix_steps
    objective = config.objective
    losses, collator = None, None
    with found.trying("config"):
        Objective(
            objective.losses,
            objective.static_weights,
            objective.loss_schedules,
            main_steps,
            objective.weighing,
        )
    if not config.evaluation.skip_lm_eval and config.evaluation.eval.tasks:
        with found.trying("config"):
            Benchmarks.load(config.evaluation.eval)
    if sides.target is not None and sides.teacher is not None:
        paths = (objective.mined_mapping_path, objective.tokenizer_pair_data_path)
        pair = Pair(sides.target, sides.teacher, CPU, *paths)
        with found.trying("config"):
            losses = build_losses(config, pair)
            collator = build_collator(config, pair, losses)
    return losses, collator


def _check_configurations(config: TrainConfig, sides: _Sides, reads_teacher: bool, found: Findings) -> bool:
    """Compare what models say of themselves with their tokenizers; return whether they could be read."""
    sources: list[tuple[str, ModelSource, Tokenizer | None, str, int]] = [
        ("student", config.student, sides.old, "max_length_new", config.text.max_length_student)
    ]
    length = ("max_length_teacher", config.text.max_length_teacher)
    if config.teacher is not None:
        sources.append(("teacher", config.teacher, sides.teacher, *length))
    is_read = True
    for side, source, tokenizer, name, tokens in sources:
        if source.new_model is not None:
            continue
        options = LoadOptions(revision=source.revision, trust_remote_code=config.run.trust_remote_code)
        model_config = None
        with found.trying("models"), blaming_data():
            model_config = read_configuration(source.pretrained_model_name_or_path, options)
        if model_config is None:
            is_read = False
            continue
        with found.trying("models"):
            check_length(name, tokens, model_config)
        if side == "student" and config.teacher is None and reads_teacher:
            with found.trying("models"):
                check_length(*length, model_config)
        if tokenizer is not None:
            is_read &= _check_rows(side, tokenizer, model_config, found)
            ids = stops(source.pretrained_model_name_or_path, model_config, options)
            with found.trying("special"):
                check_special(tokenizer, side, ids, found)
    if sides.target is not None and sides.target is not sides.old:
        with found.trying("special"):
            check_special(sides.target, "target", (), found)
    return is_read


def _check_rows(side: str, tokenizer: Tokenizer, model_config: Any, found: Findings) -> bool:
    """Compare rows of the vocabulary with ids of the tokenizer; False: there are too few."""
    rows, ids = getattr(model_config, "vocab_size", None), tokenizer.vocab_size
    if not isinstance(rows, int):
        return True
    if ids > rows:
        found.error(
            "models",
            f"{side}: its tokenizer {tokenizer.spec} has {ids:,} ids, and the model {rows:,} rows",
            "name the tokenizer that the model was trained with (tokenizer_name), and the one that it shall "
            "get as target_tokenizer_name",
            code=65,
        )
    elif ids < rows:
        found.note(
            "models",
            f"{side}: the vocabulary is padded: {rows:,} rows for {ids:,} ids; the last {rows - ids:,} take "
            "no probability here, nor a gradient",
        )
    return ids <= rows


def _load_models(config: TrainConfig, tokenizers: Tokenizers, losses: dict[str, Loss[Any]]) -> None:
    """Load models as the training does: it compares and rehearses them on the way."""
    torch.manual_seed(config.run.seed)
    measures = config.data.heldout.documents > 0 or config.evaluation.ppl_eval_data is not None
    needs_teacher = reads_teacher(config, losses, measures=measures)
    models = build_models(config, tokenizers, needs_teacher=needs_teacher)
    check_rows(config, models.student, models.teacher, config.schedule.batch_size)
