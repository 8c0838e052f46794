"""What the export would refuse after the last step, tried before the first: all but the weights."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch

from tokenkit.errors import DataError, ExportError
from tokenkit.export.huggingface import set_generation
from tokenkit.export.tokenizer_folder import write_tokenizer
from tokenkit.models.causal_lm import CausalLM
from tokenkit.models.check import positions_from_padding
from tokenkit.models.reading import has_own_code, model_from_config
from tokenkit.tokenization.tokenizer import Tokenizer


def rehearse(student: CausalLM, tokenizer: Tokenizer) -> None:
    """Write what a folder holds beside weights, read it back, and see that the weights would fit.

    Args:
        student: with the rows that it ends with, without adapters.
        tokenizer: the tokenizer that it ends with.

    Raises:
        DataError: what cannot be exported, and why.
    """
    _check_padding(student, tokenizer)
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            _check_shapes(student, tokenizer, folder)
            write_tokenizer(folder, tokenizer, has_own_class=has_own_code(student.causal_lm))
    except (ExportError, ValueError) as error:
        reason = str(error).replace(f"{name}: ", "")
        raise DataError(
            f"the model cannot be exported with tokenizer {tokenizer.spec}: {reason}; nothing was trained"
        ) from error


def _check_shapes(student: CausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Compare the student's tensors with those of a model that its configuration makes."""
    from transformers import AutoConfig

    own = student.causal_lm
    if has_own_code(own) and student.expansion is not None:
        raise ExportError("expand_input_ids needs a model of transformers' own, not one that brings its code")
    with torch.device("meta"):
        model = model_from_config(own, copy.deepcopy(student.config))
    set_generation(model, student, tokenizer)
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    config = (type(student.config) if has_own_code(own) else AutoConfig).from_pretrained(folder)
    with torch.device("meta"):
        model = model_from_config(own, config)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    there = {name: tuple(tensor.shape) for name, tensor in own.state_dict().items()}
    if wrong := sorted(name for name in wanted | there if wanted.get(name) != there.get(name)):
        raise ExportError(
            f"its configuration, written and read, makes {wrong[0]} {wanted.get(wrong[0], 'absent')}, and "
            f"the model's is {there.get(wrong[0], 'absent')}"
        )


def _check_padding(student: CausalLM, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer that gives the id of padding to text, where positions depend on that id."""
    pad = getattr(student.config, "pad_token_id", None)
    rows = student.embedding.weight.shape[0]
    if positions_from_padding(student) and not pad < rows:
        raise DataError(
            f"the model's positions depend on its pad_token_id, {pad}, and it would have {rows} rows: no "
            "smaller vocabulary can be given to it"
        )
    if student.form.reads_padding and tokenizer.pad_id != pad:
        raise DataError(
            f"the model computes something else at its pad_token_id, {pad}, and in tokenizer "
            f"{tokenizer.spec} padding is {tokenizer.pad_id}: take a tokenizer that pads with {pad}"
        )
