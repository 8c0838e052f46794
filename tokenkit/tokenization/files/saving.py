"""A `Tokenizer` as a Hugging Face tokenizer, so that a trained model can be used without tokenkit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenkit.tokenization.backend import build
from tokenkit.tokenization.chat.family_template import exported_template
from tokenkit.tokenization.chat.generic import leading_tokens
from tokenkit.tokenization.dummy_space import with_prepended_space
from tokenkit.tokenization.vocabulary import with_entries

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from tokenkit.tokenization.tokenizer import Tokenizer

_ROLES = ("bos", "eos", "pad", "unk")


def to_huggingface(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Return the transformers tokenizer with the same ids, special tokens and chat template.

    It writes BOS in front of a text where `encode_documents` does.

    Raises:
        ValueError: the tokenizers library would number a special token differently, or cannot express
            the manual prefix.
    """
    from transformers import PreTrainedTokenizerFast

    document = {**tokenizer.document, "post_processor": _post_processor(tokenizer)}
    document |= {"truncation": None, "padding": None, "model": {**document["model"]}}
    if document["model"].get("dropout"):
        document["model"]["dropout"] = None  # ids of training were read without it: see `explain_saving`
    if tokenizer.prefix.is_manual:
        if tokenizer.vocabulary.text_added:
            raise ValueError(
                f"tokenizer {tokenizer.spec} has added tokens that are text: a saved one would put a space "
                "behind each, so leave ':conversion=manual_add_prefix_space' out"
            )
        document = with_prepended_space(document)
    backend = build(document)
    added = document.get("added_tokens") or []
    if _misnumbered(backend, added):
        # the library numbers added tokens behind a hole anew, unless the model has them
        backend = build({**document, "model": with_entries(document["model"], added)})
    for string, token_id in _misnumbered(backend, added).items():
        raise ValueError(
            f"added token {string!r} has id {token_id} but would be saved as "
            f"{backend.token_to_id(string)}: the vocabulary has a hole before it"
        )
    tokens = tokenizer.family.tokens
    names = {f"{role}_token": tokens[role] for role in _ROLES if tokens.get(role) in tokenizer.control}
    result = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **names)
    result.chat_template = exported_template(tokenizer)
    return result


def _misnumbered(backend: Any, added: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    return {
        token["content"]: token["id"]
        for token in added
        if backend.token_to_id(token["content"]) != token["id"]
    }


def explain_saving(tokenizer: Tokenizer) -> str | None:
    """Return how the saved tokenizer reads text otherwise than its files or training do; None: as they do."""
    notes = []
    if dropout := tokenizer.document["model"].get("dropout"):
        notes.append(f"BPE dropout of {dropout} is off while training, and in the tokenizer that is saved")
    words = [string for string in tokenizer.control if string.isalnum()]
    if words:
        named = ", ".join(map(repr, words[:5])) + (", ..." if len(words) > 5 else "")
        notes.append(
            f"special tokens that are words ({named}): in training a text spells them out, while the "
            "saved tokenizer reads them as special wherever they stand, as all do in transformers"
        )
    return f"tokenizer {tokenizer.spec}: {'; '.join(notes)}" if notes else None


def save(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template for `AutoTokenizer`.

    Raises:
        FileExistsError: the folder holds a tokenizer already.
    """
    folder = Path(folder)
    if (folder / "tokenizer.json").exists():
        raise FileExistsError(f"{folder} already holds a tokenizer.json: choose another folder")
    to_huggingface(tokenizer).save_pretrained(str(folder))
    # The class that every transformers with fast tokenizers has; newer ones write the name of its successor.
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in ("is_local", "local_files_only"):
        config.pop(key, None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _post_processor(tokenizer: Tokenizer) -> dict[str, Any] | None:
    """Return what writes BOS: the tokenizer's own where it does that, or a template."""
    own = tokenizer.document.get("post_processor")
    bos = tokenizer.family.tokens.get("bos")
    writes_bos = tokenizer.family.writes_bos and bos is not None and bos in tokenizer.control
    is_own = tokenizer.spec.target is None and tokenizer.spec.conversion != "byte"
    if is_own and (not writes_bos or bos in leading_tokens(own)):
        return own
    if not writes_bos or bos is None:
        return None
    token = {"SpecialToken": {"id": bos, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [token, first],
        "pair": [token, first, second],
        "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}},
    }
