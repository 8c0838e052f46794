"""`tokenkit merge-lora`: a base model and a folder of PEFT adapters become one plain model.

tokenkit merge-lora MODEL ADAPTER --output FOLDER
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenkit.cli import run
from tokenkit.config import parse_command_line
from tokenkit.config.forms import with_positions
from tokenkit.config.paths import check_model_folder, check_opened
from tokenkit.errors import ConfigError, blaming_data, names_a_folder
from tokenkit.models.options import Dtype

if TYPE_CHECKING:
    from tokenkit.export.adapters import Adapter
    from tokenkit.models.causal_lm import CausalLM
    from tokenkit.tokenization.tokenizer import Tokenizer

ALIASES = {"output_path": "output", "model": "base_model", "adapter": "lora_model"}


@dataclass(frozen=True, kw_only=True)
class MergeLoraConfig:
    """Add adapters to the weights that they were trained for, and write a model that needs no PEFT."""

    base_model: str
    """Folder or hub name of the model that the adapters were trained on."""

    lora_model: str
    """Folder of the adapters, with adapter_config.json and adapter_model.safetensors."""

    output: str
    """Folder that is written; it must be empty or absent."""

    dtype: Dtype | None = None
    """Of the weights that are written; they are merged in float32. None: as the base model's are stored."""

    tokenizer_name: str | None = None
    """Spec of the tokenizer of the merged model. None: the adapters' own, else the base model's."""

    trust_remote_code: bool = False
    """Run code that comes with the model or tokenizer."""

    def __post_init__(self) -> None:
        """Check what can be checked before anything is read."""
        for name in ("base_model", "lora_model", "output"):
            names_a_folder(name, getattr(self, name))
        check_model_folder("base_model", self.base_model)
        adapter = Path(self.lora_model).expanduser()
        if (adapter / "checkpoints").is_dir():
            raise ConfigError(
                f"lora_model: {adapter} is the folder of a run: `tokenkit export` merges what it trained"
            )
        if not (adapter / "adapter_config.json").is_file():
            raise FileNotFoundError(
                f"lora_model: {adapter} has no adapter_config.json: name the folder of a PEFT adapter"
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    words = with_positions(sys.argv[1:] if argv is None else argv, "base-model", "lora-model")

    def merged() -> None:
        merge(parse_command_line(MergeLoraConfig, words, program="tokenkit merge-lora", aliases=ALIASES))

    return run(merged)


def merge(config: MergeLoraConfig) -> None:
    """Read both, compare them, merge, write, load back and compare.

    Raises:
        DataError: a quantised base, adapters of another model, or a tokenizer that does not fit.
        FileExistsError: the output is not empty.
    """
    from tokenkit.disk import blaming_disk, check_vacant

    output = Path(config.output).expanduser()
    check_vacant(output)
    check_opened("base_model", config.base_model)
    from tokenkit.export.adapters import put_on, read_adapter
    from tokenkit.export.card import CardFacts, told
    from tokenkit.export.huggingface import ExportRequest, export_huggingface
    from tokenkit.models.causal_lm import DTYPES

    with blaming_data():
        adapter = read_adapter(Path(config.lora_model).expanduser())
        tokenizer = _tokenizer(config)
        student, stored = _base(config, adapter, tokenizer)
        student.model = put_on(student.model, adapter, config.lora_model, config.base_model)
    _untie_if_apart(student)
    facts = CardFacts(
        base=config.base_model,
        sources={"adapters": [config.lora_model]},
        lines=told(config.lora_model)[1],
        is_moved=False,
    )
    dtype = stored if config.dtype is None else DTYPES[config.dtype]
    with blaming_disk(output):
        request = ExportRequest(folder=output, dtype=dtype, facts=facts)
        export_huggingface(student, None, tokenizer, request)
    print(f"{config.base_model} with {config.lora_model}: {output}")


def _tokenizer(config: MergeLoraConfig) -> Tokenizer:
    from tokenkit.tokenization.tokenizer import load_tokenizer

    adapter = Path(config.lora_model).expanduser()
    has_own = (adapter / "tokenizer_config.json").is_file()
    name = config.tokenizer_name or (str(adapter) if has_own else config.base_model)
    return load_tokenizer(name, trust_remote_code=config.trust_remote_code)


def _base(config: MergeLoraConfig, adapter: Adapter, tokenizer: Tokenizer) -> tuple[CausalLM, Any]:
    """Return the base model in float32, with as many rows as the adapters have, and its stored dtype."""
    import torch

    from tokenkit.models.causal_lm import CausalLM, LoadOptions
    from tokenkit.models.check import settle
    from tokenkit.models.reading import read_model, stored_dtype

    options = LoadOptions(dtype=torch.float32, trust_remote_code=config.trust_remote_code)
    model = read_model(config.base_model, options)
    rows = adapter.rows(model)
    if rows is not None and rows != model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)
    student = CausalLM(model, tokenizer.vocab_size)
    settle(student, config.base_model)
    return student, stored_dtype(config.base_model, options)


def _untie_if_apart(student: CausalLM) -> None:
    """Where adapters hold embedding and head, and the base has one matrix for both, keep what they hold."""
    from tokenkit.models.causal_lm import effective_weight

    if not getattr(student.config, "tie_word_embeddings", False):
        return
    embedding, head = effective_weight(student.embedding), effective_weight(student.output)
    if embedding is not head and not bool((embedding == head).all()):
        student.config.tie_word_embeddings = False


if __name__ == "__main__":
    raise SystemExit(main())
