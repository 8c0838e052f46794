"""`tokenkit export`: a model in Hugging Face layout out of any run or checkpoint, or in another format.

tokenkit export RUN --output FOLDER
tokenkit export RUN/checkpoints/step_00000500 --output FOLDER --dtype bfloat16
tokenkit export MODEL --format onnx --output FOLDER
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tokenkit.cli import run
from tokenkit.config import parse_command_line
from tokenkit.config.forms import with_positions
from tokenkit.errors import ConfigError, names_a_folder
from tokenkit.export.options import FormatOptions
from tokenkit.models.options import Dtype
from tokenkit.options import flat

ALIASES = {
    "model_path": "checkpoint_path",
    "checkpoint": "checkpoint_path",
    "outtype": "gguf_type",
    "quantization": "format",
    "output_path": "output",
    "expand_input_ids_model": "base_model",
    "expand_input_ids_tokenizer": "base_tokenizer",
}


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write the model of a run or checkpoint as a folder that others read, without its data or a GPU."""

    checkpoint_path: str
    """Folder of a run, of which the newest whole checkpoint is taken, or of one checkpoint, step_XXXXXXXX.
    All formats but huggingface also take a folder in Hugging Face layout, or a hub name."""

    output: str
    """Folder that is written; it must be empty or absent. Its name loses an ending .onnx or .gguf."""

    format: Literal["huggingface", "onnx", "gguf", "int8"] = "huggingface"
    """huggingface: config.json, safetensors, tokenizer, card. onnx: one graph with dynamic axes. gguf: one
    file for llama.cpp, of Llama- and Qwen-shaped models. int8: Hugging Face layout, matrices in 8 bits."""

    dtype: Dtype | None = None
    """Of the weights that are written. None: the dtype of the run; onnx: always float32."""

    options: FormatOptions = flat(FormatOptions)

    as_adapter: bool = False
    """Write LoRA adapters, and the embeddings where they moved, for PeftModel.from_pretrained on the base
    model; not merged. Their weights keep the dtype that they were trained in."""

    verify: bool = False
    """Load the folder in a fresh process too, which has transformers alone: logits, every id, 1,000 random
    strings, a pipeline. Without it the folder is loaded back in this process."""

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
        if self.as_adapter and (self.dtype is not None or self.format != "huggingface"):
            other = "dtype is set" if self.dtype is not None else f"format is {self.format}"
            raise ConfigError(f"as_adapter writes adapters as they were trained, and {other}: leave one out")
        if self.verify and (self.as_adapter or self.format != "huggingface"):
            raise ConfigError("verify is for whole models in Hugging Face layout; others are compared anyway")
        if self.format == "onnx" and self.dtype not in (None, "float32"):
            raise ConfigError(f"onnx is written in float32, got dtype {self.dtype}: leave dtype out")
        if self.options.gguf_type is not None and self.format != "gguf":
            raise ConfigError(f"gguf_type is for --format gguf, and format is {self.format}: leave one out")
        if self.format == "gguf" and self.dtype is not None:
            raise ConfigError("the types of a GGUF file are f32, f16, bf16, q8_0: set gguf_type, not dtype")
        if self.format == "int8" and self.dtype is not None:
            raise ConfigError("int8 keeps the type of what it leaves in place: leave dtype out")
        if self.options.text is not None and self.format != "int8":
            raise ConfigError(f"text is for --format int8, and format is {self.format}: leave one out")
        if self.options.text is not None and not Path(self.options.text).expanduser().exists():
            raise FileNotFoundError(f"text: {self.options.text} does not exist")
        if not self.options.dynamic_axes:
            raise ConfigError("dynamic_axes is off, and no graph of fixed sizes is written: leave it out")


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
    from tokenkit.disk import blaming_disk, check_vacant

    output = Path(config.output).expanduser()
    if config.format != "huggingface":
        from tokenkit.commands.conversions import convert

        convert(config, output.with_suffix("") if output.suffix == f".{config.format}" else output)
        return
    check_vacant(output)
    from tokenkit.export.adapter_folder import export_adapter
    from tokenkit.export.huggingface import ExportRequest, export_huggingface
    from tokenkit.models.causal_lm import DTYPES
    from tokenkit.training.exporting import Places, facts_of, restore

    places = Places(
        base_model=config.base_model,
        base_tokenizer=config.base_tokenizer,
        target_tokenizer_name=config.target_tokenizer_name,
    )
    found = restore(config.checkpoint_path, places, trust_remote_code=config.trust_remote_code)
    settings, folder, manifest = found.settings, found.folder, found.manifest
    dtype = DTYPES[config.dtype or settings.training.dtype]
    request = ExportRequest(folder=output, dtype=dtype, facts=facts_of(found), is_verified=config.verify)
    with blaming_disk(output):
        if config.as_adapter:
            is_changed = settings.target.target_tokenizer_name is not None or settings.target.tokens_to_add
            export_adapter(found.student, found.state, found.tokenizer, request, is_changed=bool(is_changed))
        else:
            export_huggingface(found.student, found.state, found.tokenizer, request)
    print(f"step {manifest.step} of {settings.schedule.steps}, {folder}: {output}")


if __name__ == "__main__":
    raise SystemExit(main())
