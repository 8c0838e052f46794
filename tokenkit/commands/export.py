"""`tokenkit export`: a model in Hugging Face layout out of any run or checkpoint.

tokenkit export RUN --output FOLDER
tokenkit export RUN/checkpoints/step_00000500 --output FOLDER --dtype bfloat16
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tokenkit.cli import run
from tokenkit.config import TrainConfig, from_dict, parse_command_line
from tokenkit.config.forms import with_positions
from tokenkit.errors import ConfigError, blaming_data, names_a_folder
from tokenkit.models.options import Dtype

if TYPE_CHECKING:
    from tokenkit.run.safe_dcp import Manifest

ALIASES = {
    "model_path": "checkpoint_path",
    "checkpoint": "checkpoint_path",
    "output_path": "output",
    "expand_input_ids_model": "base_model",
    "expand_input_ids_tokenizer": "base_tokenizer",
}
STUDENT = "student.pretrained_model_name_or_path"


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write the model of a run or checkpoint as a Hugging Face folder, without its data or a GPU."""

    checkpoint_path: str
    """Folder of a run, of which the newest whole checkpoint is taken, or of one checkpoint, step_XXXXXXXX."""

    output: str
    """Folder that is written; it must be empty or absent."""

    format: Literal["huggingface", "onnx", "int8"] = "huggingface"
    """huggingface: config.json, safetensors, tokenizer, card. onnx and int8 are not here yet."""

    dtype: Dtype | None = None
    """Of the weights that are written. None: the dtype of the run."""

    as_adapter: bool = False
    """Write LoRA adapters, and the embeddings where they moved, for PeftModel.from_pretrained on the base
    model; not merged. Their weights keep the dtype that they were trained in."""

    base_model: str | None = None
    """Where the model that the run began with lies now. None: where the run found it."""

    base_tokenizer: str | None = None
    """Spec of the tokenizer of that model. None: as in the run."""

    target_tokenizer_name: str | None = None
    """Where the tokenizer that the model ends with lies now. None: where the run found it."""

    with_pt: bool = False
    """Without effect: the weights are safetensors, which PyTorch reads."""

    trust_remote_code: bool = False
    """Run code that comes with the base model or a tokenizer, as the run did."""

    def __post_init__(self) -> None:
        """Check what can be checked before anything is read."""
        names_a_folder("checkpoint_path", self.checkpoint_path)
        names_a_folder("output", self.output)
        if self.format != "huggingface":
            raise ConfigError(f"format {self.format} is not here yet: leave it out, or set it to huggingface")
        if self.as_adapter and self.dtype is not None:
            raise ConfigError(
                "as_adapter writes adapters as they were trained, and dtype is set: leave one out"
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    words = with_positions(sys.argv[1:] if argv is None else argv, "checkpoint-path")
    return run(
        lambda: export(parse_command_line(ExportConfig, words, program="tokenkit export", aliases=ALIASES))
    )


def export(config: ExportConfig) -> None:
    """Find the checkpoint, make its model, write it, load it back and compare.

    Raises:
        FileNotFoundError: there is no run or checkpoint.
        CheckpointError: it is torn, or its base model or tokenizers are others now.
        FileExistsError: the output is not empty.
    """
    from tokenkit.disk import check_vacant

    output = Path(config.output).expanduser()
    check_vacant(output)
    folder, manifest = find_checkpoint(config.checkpoint_path)
    settings = run_settings(config, manifest)

    from tokenkit.disk import blaming_disk
    from tokenkit.export.adapter_folder import export_adapter
    from tokenkit.export.huggingface import ExportRequest, export_huggingface
    from tokenkit.models.causal_lm import DTYPES
    from tokenkit.training.exporting import restore_student, run_facts
    from tokenkit.training.reports import measurements

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
    measured = measurements(folder.parent.parent) if folder.parent.name == "checkpoints" else {}
    facts = run_facts(settings, manifest.step, measured.get(manifest.step))
    dtype = DTYPES[config.dtype or settings.training.dtype]
    request = ExportRequest(folder=output, dtype=dtype, facts=facts)
    with blaming_disk(output):
        if config.as_adapter:
            is_changed = settings.target.target_tokenizer_name is not None or settings.target.tokens_to_add
            export_adapter(student, state, tokenizer, request, is_changed=bool(is_changed))
        else:
            export_huggingface(student, state, tokenizer, request)
    print(f"step {manifest.step} of {settings.schedule.steps}, {folder}: {output}")


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
    from tokenkit.run.checkpoint import check_whole, find_latest
    from tokenkit.run.safe_dcp import read_manifest
    from tokenkit.training.exporting import SINGLE

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


def run_settings(config: ExportConfig, manifest: Manifest) -> TrainConfig:
    """Return the configuration of the run, with the places where its files lie now.

    Raises:
        ConfigError: it is no run of `tokenkit train`, or its model brings code that is not trusted here.
    """
    if STUDENT not in manifest.config:
        raise ConfigError(
            f"{config.checkpoint_path} is not of `tokenkit train`: a hypernetwork is applied with `tokenkit "
            "zett --method hypernet`"
        )
    settings = from_dict(TrainConfig, manifest.config)
    if settings.run.trust_remote_code and not config.trust_remote_code:
        raise ConfigError(
            f"{config.checkpoint_path} was trained with trust_remote_code, and code that comes with its "
            "model or tokenizer would run: read it, then pass --trust-remote-code"
        )
    moved = {
        "pretrained_model_name_or_path": config.base_model,
        "tokenizer_name": config.base_tokenizer,
    }
    student = dataclasses.replace(settings.student, **{k: v for k, v in moved.items() if v is not None})
    target = settings.target
    if config.target_tokenizer_name is not None:
        target = dataclasses.replace(target, target_tokenizer_name=config.target_tokenizer_name)
    settings = dataclasses.replace(settings, student=student, target=target)

    from tokenkit.config.paths import check_model_folder

    check_model_folder("base_model", settings.student.pretrained_model_name_or_path)
    return settings


if __name__ == "__main__":
    raise SystemExit(main())
