"""What a run knows of the model that it hands on: the student's whole state, and what its card says.

A run uses both at its end; `tokenkit export` makes both of a checkpoint, without data and without a teacher.
"""

from __future__ import annotations

import dataclasses
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from tokenkit import __version__
from tokenkit.config import TrainConfig
from tokenkit.errors import CheckpointError
from tokenkit.evaluation.bits_per_byte import BitsPerByte
from tokenkit.export.card import CardFacts, public_name
from tokenkit.export.huggingface import EXPANSION
from tokenkit.models.causal_lm import DTYPES, CausalLM
from tokenkit.models.fingerprint import model_fingerprint
from tokenkit.parallel import World
from tokenkit.run.checkpoint import State, load_tensors
from tokenkit.run.safe_dcp import Manifest
from tokenkit.run.trackers import UNNAMED
from tokenkit.training.build import build_models, load_tokenizers
from tokenkit.training.distillation import Distillation
from tokenkit.training.requests import WrittenRows, ask

if TYPE_CHECKING:
    from tokenkit.tokenization.tokenizer import Tokenizer

SINGLE = World(rank=0, world_size=1, device=torch.device("cpu"), mesh=None)


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


def run_facts(config: TrainConfig, step: int, measured: BitsPerByte | None) -> CardFacts:
    """Return what the card of a run's model says after `step` steps."""
    lines = {
        "tokenizer": public_name(config.target.target_tokenizer_name or "unchanged"),
        "steps": str(step) if step == config.schedule.steps else f"{step} of {config.schedule.steps}",
        "versions": f"tokenkit {__version__}, torch {torch.__version__}, "
        f"transformers {version('transformers')}",
    }
    if measured is not None:
        teacher = "" if measured.teacher is None else f", teacher {measured.teacher:.4f}"
        lines["bits per byte, held out"] = f"student {measured.student:.4f}{teacher}"
    return CardFacts(
        base=config.student.pretrained_model_name_or_path,
        teacher=config.teacher.pretrained_model_name_or_path if config.teacher is not None else None,
        losses=config.objective.losses,
        lines=lines,
        title=None if config.run.name == UNNAMED else config.run.name,
        bits_per_byte=None if measured is None else measured.student,
    )


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
        config.training, use_flash_attention=False, attn_implementation=None, gradient_checkpointing=False
    )  # what makes steps fast needs a GPU, and changes no weight
    config = dataclasses.replace(config, training=training)
    tokenizers = load_tokenizers(config, needs_teacher=False)
    own, target = config.student, config.target.target_tokenizer_name
    old = own.tokenizer_name or own.pretrained_model_name_or_path
    for side, name in (("old", old), ("target", target or old)):
        _compare(manifest, side, tokenizers.fingerprints()[side], f"{side} tokenizer than {name}")
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
