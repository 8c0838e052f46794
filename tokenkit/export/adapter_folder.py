"""A trained student as a folder of PEFT adapters: what it learned, without the weights of its base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from tokenkit.disk import check_vacant
from tokenkit.errors import ExportError
from tokenkit.export.adapters import load_as_peft, taken_out, write_adapter
from tokenkit.export.card import model_card
from tokenkit.export.huggingface import ExportRequest, merged_model, quiet_padding, sample_batch
from tokenkit.export.tokenizer_folder import write_tokenizer
from tokenkit.models.causal_lm import CausalLM, LoadOptions
from tokenkit.models.reading import has_own_code, read_model
from tokenkit.run.folder import staging_folder
from tokenkit.tokenization.tokenizer import Tokenizer


def export_adapter(
    student: CausalLM,
    state: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    request: ExportRequest,
    *,
    is_changed: bool,
) -> Path:
    """Write what `PeftModel.from_pretrained` puts on the base model, and compare the two.

    The folder holds adapters, embedding and head where they moved, tokenizer and card. A base with another
    number of rows must be given that number first (`resize_token_embeddings`).

    Args:
        student: with adapters.
        state: its whole state.
        tokenizer: the one that it ends with.
        request: `facts.base` names the base model.
        is_changed: its tokenizer is not that of the base.

    Raises:
        FileExistsError: the folder exists and is not empty.
        DataError: an adapter cannot hold what the student learned.
        ExportError: put on its base, the adapter gives other logits than the student.
    """
    check_vacant(request.folder)
    own_rows = student.embedding.weight.shape[0]
    moved = is_changed or any(module.weight.requires_grad for module in student.vocabulary_modules)
    rows = None if not moved else tokenizer.vocab_size if is_changed else own_rows
    adapter = taken_out(student, state, tokenizer, rows)
    with staging_folder(request.folder) as staging:
        write_adapter(staging, adapter, request.facts.base)
        write_tokenizer(staging, tokenizer, has_own_class=has_own_code(student.causal_lm))
        card = model_card(request.facts, adapter_rows=rows or own_rows)
        (staging / "README.md").write_text(card, encoding="utf-8")
        _check(staging, student, state, tokenizer, (request.facts.base, rows))
    return request.folder


@torch.no_grad()
def _check(
    folder: Path,
    student: CausalLM,
    state: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    base: tuple[str, int | None],
) -> None:
    model = merged_model(student, state, tokenizer)
    quiet_padding(model, tokenizer.vocab_size)
    ids_BT = sample_batch(model, tokenizer)
    expected_TV = model(input_ids=ids_BT, use_cache=False).logits[0, :, : tokenizer.vocab_size]
    del model
    trusts = has_own_code(student.causal_lm)
    whole = read_model(base[0], LoadOptions(dtype=torch.float32, trust_remote_code=trusts))
    loaded = load_as_peft(folder, whole, base[1])
    got_TV = loaded(input_ids=ids_BT, use_cache=False).logits[0, :, : tokenizer.vocab_size]
    error = float((got_TV - expected_TV).abs().max())
    if not error <= 1e-3 * max(1.0, float(expected_TV.abs().max())):
        raise ExportError(
            f"the adapter, put on {base[0]}, is off by {error:.2e}: the run computed with other base weights "
            "(its dtype rounds them); leave as_adapter out"
        )
