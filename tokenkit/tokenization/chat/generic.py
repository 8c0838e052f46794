"""The family of a tokenizer that nobody named: read from its own special tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenkit.tokenization.chat.families import Family
from tokenkit.tokenization.chat.special_tokens import control_strings
from tokenkit.tokenization.files.sources import TokenizerFiles

# Looked for where a tokenizer names neither BOS nor EOS; the first that it has.
_USUAL = {
    "bos": ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>"),
    "eos": ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>"),
}


def generic_family(files: TokenizerFiles) -> Family:
    """Return the family that a tokenizer's own files describe; its turns come from its chat template.

    BOS counts as written where the post-processor or `add_bos_token` writes it, and where one token
    serves as BOS and EOS (GPT-2): there it stands between documents, so in front of each.
    """
    control = control_strings(files.document)
    tokens = {role: string for role, string in files.special_strings().items() if string in control}
    if "bos" not in tokens and "eos" not in tokens:
        for role, candidates in _USUAL.items():
            found = next((string for string in candidates if string in control), None)
            if found is not None:
                tokens[role] = found
        if tokens.get("eos") == "<|endoftext|>":
            tokens.setdefault("bos", "<|endoftext|>")
    bos, eos = tokens.get("bos"), tokens.get("eos")
    if tokens.get("unk") in (bos, eos):
        tokens.pop("unk", None)
    writes_bos = bos is not None and (
        bos == eos
        or bool(files.config.get("add_bos_token"))
        or bos in leading_tokens(files.document.get("post_processor"))
    )
    return Family("generic", tokens, writes_bos=writes_bos)


def leading_tokens(post_processor: Mapping[str, Any] | None) -> set[str]:
    """Return the special tokens that the post-processor writes in front of a text."""
    if post_processor is None:
        return set()
    if post_processor["type"] == "Sequence":
        return {token for member in post_processor["processors"] for token in leading_tokens(member)}
    leading = set()
    for item in post_processor.get("single") or []:
        if "Sequence" in item:
            break
        leading.add(item["SpecialToken"]["id"])
    return leading
