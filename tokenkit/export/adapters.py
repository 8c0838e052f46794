"""Adapters of PEFT on a model and in a folder: put on, taken out, written, read.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenkit.errors import DataError
from tokenkit.models.causal_lm import CausalLM
from tokenkit.models.reading import model_from_config

if TYPE_CHECKING:
    from tokenkit.tokenization.tokenizer import Tokenizer

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class Adapter:
    """What an adapter's folder holds."""

    config: Any
    """A PEFT configuration."""
    tensors: Mapping[str, Tensor]
    """By PEFT's names."""

    def rows(self, model: Any) -> int | None:
        """Return how many rows of the vocabulary the adapter holds whole; None: it holds none."""
        names = {module: name for name, module in model.named_modules()}
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            weight = self.tensors.get(f"{_PREFIX}{names[module]}.weight")
            if weight is not None:
                return len(weight)
        return None


def with_adapters(model: Any, config: Any) -> Any:
    """Return `model` with fresh adapters, in place."""
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers about a name that peft uses, of peft about ties
        return get_peft_model(model, config).eval()


def put_on(model: Any, adapter: Adapter, what: str, base: str) -> Any:
    """Return `model` with the adapter, in place.

    Args:
        model: the base, with as many rows as the adapter has where it has rows.
        adapter: as it was read.
        what: names the adapter in errors.
        base: names the model in errors.

    Raises:
        DataError: the adapter was made for another model: other names, or other shapes.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    try:
        wrapped = with_adapters(model, adapter.config)
    except ValueError as error:
        raise DataError(f"{what} does not fit {base}: {str(error).splitlines()[0]}") from error
    own = {name: tuple(t.shape) for name, t in get_peft_model_state_dict(wrapped, **_ROWS_APART).items()}
    given = {name: tuple(t.shape) for name, t in adapter.tensors.items()}
    if wrong := sorted(name for name in own | given if own.get(name) != given.get(name)):
        raise DataError(
            f"{what} is an adapter of another model than {base}: {wrong[0]} is "
            f"{given.get(wrong[0], 'absent')} there, and {own.get(wrong[0], 'absent')} here ({len(wrong)} "
            "differences); name its own base model"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        set_peft_model_state_dict(wrapped, dict(adapter.tensors))
    return wrapped


_ROWS_APART = {"save_embedding_layers": False}  # what modules_to_save names is saved all the same


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter's folder.

    Raises:
        FileNotFoundError: it holds none.
        DataError: it is damaged, in a form that may hold code, or of a kind that cannot be merged.
    """
    from peft import PeftConfig
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG}: name the folder of a PEFT adapter")
    if not (folder / WEIGHTS).is_file():
        raise DataError(
            f"{folder} has no {WEIGHTS}: adapters are read as safetensors alone (peft writes them with "
            "save_pretrained)"
        )
    try:
        config = PeftConfig.from_pretrained(str(folder))
        tensors = load_file(folder / WEIGHTS)
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise DataError(f"{folder} holds no adapter that can be read: {error}") from error
    if config.peft_type != "LORA":
        raise DataError(f"{folder} is an adapter of kind {config.peft_type}: LoRA alone is merged here")
    config.inference_mode = True
    return Adapter(config, tensors)


def taken_out(
    student: CausalLM, state: Mapping[str, Tensor], tokenizer: Tokenizer, rows: int | None
) -> Adapter:
    """Return a student's adapters, and its embeddings as whole modules beside them.

    Args:
        student: with adapters.
        state: its whole state, see `training.exporting.student_state`.
        tokenizer: the one that it ends with.
        rows: of embedding and head in the folder; None: they are those of the base, and left out.

    Raises:
        DataError: what the student learned is more than an adapter can hold.
    """
    from peft import get_peft_model_state_dict

    _refuse(student)
    (config,) = copy.deepcopy(student.model.peft_config).values()
    config.inference_mode = True
    state = {name: tensor for name, tensor in state.items() if name.startswith(_PREFIX)}
    tensors = dict(get_peft_model_state_dict(student.model, state_dict=dict(state), **_ROWS_APART))
    if rows is not None:
        with torch.device("meta"):
            plain = model_from_config(student.causal_lm, copy.deepcopy(student.config))
        names = {module: name for name, module in plain.named_modules()}
        embedding, head = names[plain.get_input_embeddings()], names[plain.get_output_embeddings()]
        for name, source in ((embedding, embedding), (head, embedding if student.is_tied else head)):
            tensors |= {
                f"{_PREFIX}{name}.{part}": _cut(state[f"{_PREFIX}{key}.{part}"], tokenizer.vocab_size, rows)
                for part, key in (("weight", source), ("bias", head))
                if f"{_PREFIX}{key}.{part}" in state and not (part == "bias" and name != head)
            }
        config.modules_to_save = [*(config.modules_to_save or ()), embedding, head]
    return Adapter(config, {name: tensor.contiguous().clone() for name, tensor in tensors.items()})


def _cut(matrix: Tensor, vocab_size: int, rows: int) -> Tensor:
    """Return so many rows; those behind the last token are the mean of all others, as in every export."""
    kept = matrix[:rows].clone()
    kept[vocab_size:] = matrix[:vocab_size].mean(0)
    return kept


def _refuse(student: CausalLM) -> None:
    if not hasattr(student.model, "peft_config"):
        raise DataError("the run trained no adapters (train_model_mode): leave as_adapter out")
    if student.expansion is not None:
        raise DataError("input-id expansion is code, and no adapter holds code: leave as_adapter out")
    if student.layer_table is not None:
        raise DataError(
            "every layer of this model has rows for the vocabulary, which no adapter holds: leave as_adapter "
            "out"
        )
    for module in (student.embedding, student.output):
        if hasattr(module, "base_layer") or hasattr(module, "modules_to_save"):
            raise DataError(
                "the embeddings have an adapter of their own (model_lora_targets, "
                "model_lora_modules_to_save) on rows that the base model has not: leave as_adapter out"
            )


def write_adapter(folder: Path, adapter: Adapter, base: str) -> None:
    """Write an adapter as PEFT does, for the model `base`."""
    from safetensors.torch import save_file

    adapter.config.base_model_name_or_path = base
    adapter.config.save_pretrained(str(folder))
    written = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    written["base_model_name_or_path"] = base
    (folder / CONFIG).write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_file(dict(adapter.tensors), folder / WEIGHTS, metadata={"format": "pt"})


def load_as_peft(folder: Path, base: Any, rows: int | None) -> Any:
    """Load an adapter's folder as its user does: the base model, its rows, `PeftModel.from_pretrained`."""
    from peft import PeftModel

    if rows is not None and rows != base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(rows, mean_resizing=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(base, str(folder)).eval()
