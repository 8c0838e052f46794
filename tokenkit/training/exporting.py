"""What a run knows of the model that it hands on: the student's whole state, and what its card says.

A run uses both at its end; `tokenkit export` makes both of a checkpoint, without data and without a teacher.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from tokenkit import __version__
from tokenkit.config import TrainConfig, from_dict
from tokenkit.config.paths import check_model_folder
from tokenkit.disk import blaming_disk
from tokenkit.errors import CheckpointError, ConfigError, blaming_data
from tokenkit.evaluation.bits_per_byte import BitsPerByte
from tokenkit.export.card import CardFacts
from tokenkit.export.huggingface import EXPANSION, ExportRequest, export_huggingface
from tokenkit.models.causal_lm import DTYPES, CausalLM
from tokenkit.models.options import BodyOptions
from tokenkit.models.reading import model_fingerprint
from tokenkit.parallel import World
from tokenkit.run.checkpoint import State, check_whole, find_latest, load_tensors
from tokenkit.run.facts import read_facts
from tokenkit.run.metrics import METRICS_NAME, UNNAMED, read_metrics
from tokenkit.run.safe_dcp import Manifest, read_manifest
from tokenkit.training.build import Parts, build_models
from tokenkit.training.distillation import Distillation
from tokenkit.training.pair import load_tokenizers
from tokenkit.training.reports import measurements
from tokenkit.training.requests import WrittenRows, ask

if TYPE_CHECKING:
    from tokenkit.tokenization.tokenizer import Tokenizer

STUDENT = "student.pretrained_model_name_or_path"
SINGLE = World(rank=0, world_size=1, device=torch.device("cpu"), mesh=None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Places:
    """Where the files that a run began with lie now. None: where the run found them."""

    base_model: str | None = None
    base_tokenizer: str | None = None
    target_tokenizer_name: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restored:
    """The model of a checkpoint."""

    student: CausalLM
    state: dict[str, Tensor]
    """Its whole state, as `export_huggingface` takes it."""
    tokenizer: Tokenizer
    """That it ends with."""
    settings: TrainConfig
    """Of its run."""
    folder: Path
    manifest: Manifest


def hand_on(
    folder: Path, config: TrainConfig, parts: Parts, world: World, measured: BitsPerByte | None
) -> None:
    """Gather the student of a run on rank 0 and write it in Hugging Face layout; every rank calls it.

    Args:
        folder: is made.
        config: of the run.
        parts: of the run.
        world: its processes.
        measured: the newest measurement, for the card.
    """
    state = student_state(parts.run.model, parts.student)
    with world.together("export the student"):
        if world.is_main:
            command = read_facts(Path(config.run.output_dir)).get("command")
            facts = run_facts(config, parts.run.step, measured, command)
            request = ExportRequest(folder=folder, dtype=DTYPES[config.training.dtype], facts=facts)
            with blaming_disk(folder):
                export_huggingface(parts.student, state, parts.tokenizers.target, request)


def student_state(model: nn.Module, student: CausalLM) -> dict[str, Tensor]:
    """Gather the student's state as an export takes it, the rows of a hypernetwork written out.

    Every rank calls it; the first one gets the tensors, in main memory.

    Args:
        model: the root that holds `student`, a `Distillation`.
        student: the model that is handed on.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    gathered = get_model_state_dict(student.model, options=options)  # not the teacher beside it
    if student.expansion is not None:
        rows = get_model_state_dict(student.expansion, options=options)
        gathered |= {f"{EXPANSION}{name}": value for name, value in rows.items()}
    if student.projector is not None:
        gathered |= _written_rows(model, student)
    return {name: value for name, value in gathered.items() if isinstance(value, Tensor)}


def _written_rows(model: nn.Module, student: CausalLM) -> dict[str, Tensor]:
    """Return what the student's projector writes, by the names of these matrices; every rank calls it."""
    rows = ask(model, WrittenRows())
    assert rows is not None
    own = student.matrices()
    named = student.model.named_parameters(remove_duplicate=False)
    return {
        name: row_VD.cpu()
        for name, p in named
        for weight, row_VD in zip(own, rows, strict=True)
        if p is weight
    }


def run_facts(
    config: TrainConfig, step: int, measured: BitsPerByte | None, command: object = None
) -> CardFacts:
    """Return what the card of a run's model says after `step` steps.

    Args:
        config: of the run.
        step: its steps so far.
        measured: the measurement of that step.
        command: its words, as `facts.json` has them; paths are cut to names.
    """
    lines = {
        "steps": str(step) if step == config.schedule.steps else f"{step} of {config.schedule.steps}",
        "versions": f"tokenkit {__version__}, torch {torch.__version__}, "
        f"transformers {version('transformers')}",
    }
    data = config.data
    if measured is not None:
        teacher = "" if measured.teacher is None else f", teacher {measured.teacher:.4f}"
        lines["bits per byte, held out"] = f"student {measured.student:.4f}{teacher}"
    return CardFacts(
        base="" if config.student.from_config else config.student.pretrained_model_name_or_path,
        teacher=config.teacher.pretrained_model_name_or_path if config.teacher is not None else None,
        losses=config.objective.losses,
        sources={
            "tokenizer": [config.target.target_tokenizer_name or "unchanged"],
            "data": [
                name for name in (data.dataset_name, *(s.path or s.name for s in data.datasets)) if name
            ],
        },
        lines=lines,
        command=[str(word) for word in command] if isinstance(command, list) else (),
        title=None if config.run.name == UNNAMED else config.run.name,
        bits_per_byte=None if measured is None else measured.student,
    )


def facts_of(found: Restored) -> CardFacts:
    """Return what the card of a checkpoint's model says; what its run knows, where it still lies in it."""
    folder, step = found.folder, found.manifest.step
    run = folder.parent.parent if folder.parent.name == "checkpoints" else None
    measured = {} if run is None else measurements(read_metrics(run / METRICS_NAME))
    command = None if run is None else read_facts(run).get("command")
    return run_facts(found.settings, step, measured.get(step), command)


def restore(name: str, places: Places, *, trust_remote_code: bool) -> Restored:
    """Return the model of a run's newest whole checkpoint, or of one checkpoint.

    Args:
        name: folder of a run or checkpoint.
        places: of the files that it began with.
        trust_remote_code: run code that comes with them, where the run did.

    Raises:
        FileNotFoundError: there is no run or checkpoint, or the base model is gone.
        CheckpointError: it is torn, or its base model or tokenizers are others now.
        ConfigError: see `run_settings`.
    """
    folder, manifest = find_checkpoint(name)
    settings = run_settings(name, manifest, places, trust_remote_code=trust_remote_code)
    try:
        with blaming_data():
            student, state, tokenizer = restore_student(folder, manifest, settings)
    except FileNotFoundError as error:
        if folder.is_dir():
            raise
        raise FileNotFoundError(
            f"{folder} was deleted while it was read: its run goes on, and keeps its newest two checkpoints; "
            "try again"
        ) from error
    return Restored(
        student=student, state=state, tokenizer=tokenizer, settings=settings, folder=folder, manifest=manifest
    )


def find_checkpoint(name: str) -> tuple[Path, Manifest]:
    """Return the checkpoint that a path means, and its manifest; every byte of it was compared with that.

    Raises:
        FileNotFoundError: neither a run nor a checkpoint, or a run that has saved nothing.
        CheckpointError: the checkpoint is torn, or all those of the run are.
    """
    path = Path(name).expanduser()
    step = re.fullmatch(r"step_(\d+)", path.name)
    if step is not None and not path.exists():  # RUN/step_5000, as other programs call it
        own = f"step_{int(step[1]):08d}"
        places = (path.with_name(own), path.parent / "checkpoints" / own)
        path = next((place for place in places if place.is_dir()), path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist: name the folder of a run, or one of its checkpoints")
    if (path / "manifest.json").is_file() or step is not None:
        return path, check_whole(path, SINGLE)
    root = path if path.name == "checkpoints" else path / "checkpoints"
    if not root.is_dir():
        what = (
            "is a model in Hugging Face layout already"
            if (path / "config.json").is_file()
            else "holds no run"
        )
        raise FileNotFoundError(
            f"{path} {what}: name the folder of a run, which has a folder checkpoints, or one of those"
        )
    found = find_latest(root, SINGLE)
    if found is None:
        raise FileNotFoundError(f"{root} holds no checkpoint: the run has not saved one yet")
    newest = max(entry.name for entry in root.glob("step_*"))
    if newest != found.name:
        print(f"tokenkit: {root / newest} is not whole: {found.name} is taken", file=sys.stderr)
    return found, read_manifest(found)


def run_settings(name: str, manifest: Manifest, places: Places, *, trust_remote_code: bool) -> TrainConfig:
    """Return the configuration of the run, with the places where its files lie now.

    Raises:
        ConfigError: it is no run of `tokenkit train`, or its model brings code that is not trusted here.
    """
    if STUDENT not in manifest.config:
        raise ConfigError(
            f"{name} is not of `tokenkit train`: a hypernetwork is applied with `tokenkit zett --method "
            "hypernet`"
        )
    settings = from_dict(TrainConfig, manifest.config)
    if settings.run.trust_remote_code and not trust_remote_code:
        raise ConfigError(
            f"{name} was trained with trust_remote_code, and code that comes with its model or tokenizer "
            "would run: read it, then pass --trust-remote-code"
        )
    moved: dict[str, Any] = {
        "pretrained_model_name_or_path": places.base_model,
        "tokenizer_name": places.base_tokenizer,
    }
    student = dataclasses.replace(settings.student, **{k: v for k, v in moved.items() if v is not None})
    target = settings.target
    if places.target_tokenizer_name is not None:
        target = dataclasses.replace(target, target_tokenizer_name=places.target_tokenizer_name)
    settings = dataclasses.replace(settings, student=student, target=target)
    check_model_folder("base_model", settings.student.pretrained_model_name_or_path)
    return settings


def restore_student(
    folder: Path, manifest: Manifest, config: TrainConfig
) -> tuple[CausalLM, dict[str, Tensor], Tokenizer]:
    """Return the student of a checkpoint, its whole state, and the tokenizer that it ends with.

    Args:
        folder: a checkpoint that was found whole, saved by any number of ranks.
        manifest: as it was read there.
        config: of its run, perhaps with other places of the same files.

    Raises:
        CheckpointError: the base model or a tokenizer is not the one that the run had, or the tensors do not
            fit.
        ValueError, OSError: the base model or a tokenizer cannot be read.
    """
    training = dataclasses.replace(
        config.training, body=BodyOptions(), gradient_checkpointing=False
    )  # what makes steps fast needs a GPU, and changes no weight
    config = dataclasses.replace(config, training=training)
    tokenizers = load_tokenizers(config, needs_teacher=False)
    own, target = config.student, config.target.target_tokenizer_name
    old = own.tokenizer_name or own.pretrained_model_name_or_path
    for side, name in (("old", old), ("target", target or old)):
        _compare(manifest, side, tokenizers.fingerprints[side], f"{side} tokenizer than {name}")
    _compare_base(manifest, own.pretrained_model_name_or_path)
    student = build_models(config, tokenizers, needs_teacher=False).student
    _compare_base(manifest, own.pretrained_model_name_or_path, getattr(student.config, "_commit_hash", None))
    model = Distillation(student, None, {}, DTYPES[training.dtype])
    load_tensors(folder, manifest, State(module=model, optimizer=None), SINGLE, within="model/student.")
    return student, student_state(model.eval(), student), tokenizers.target


def _compare_base(manifest: Manifest, name: str, commit: str | None = None) -> None:
    """Compare the base model with that of the run: a folder at once, one of the hub once it is loaded."""
    if commit is not None or Path(name).expanduser().is_dir():
        _compare(manifest, "student model", model_fingerprint(name, commit), f"model than {name}")


def _compare(manifest: Manifest, what: str, now: str, named: str) -> None:
    if manifest.fingerprints.get(what, now) != now:
        raise CheckpointError(
            f"the checkpoint of step {manifest.step} was trained with another {named} is now, and holds only "
            "what moved: put back what the run began with, or say where it lies (base_model, base_tokenizer, "
            "target_tokenizer_name)"
        )
