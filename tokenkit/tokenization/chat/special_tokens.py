"""Special tokens of a tokenizer.json: the family they make, renaming them to another, adding some; bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tokenkit.tokenization.chat.families import Family
from tokenkit.tokenization.files.sources import TokenizerFiles
from tokenkit.tokenization.vocabulary import BYTE_ALPHABET, is_control, vocabulary_strings

_OPTIONAL = ("pad", "unk")  # many tokenizers of a family leave these out


def check_has_family(control: Mapping[str, int], family: Family, name: str) -> None:
    """Refuse a tokenizer that lacks the special tokens of the family that it is said to have.

    Raises:
        ValueError: names the strings that are missing.
    """
    if missing := lacking_of_family(control, family):
        raise ValueError(
            f"tokenizer {name!r} is said to have the special tokens of {family.name} but lacks "
            f"{', '.join(map(repr, missing))}: leave ':source=' out or name its own family"
        )


def lacking_of_family(control: Mapping[str, int], family: Family) -> list[str]:
    """Return the strings of a family that are no special tokens here, but for those that many leave out."""
    return [
        string for role, string in family.tokens.items() if role not in _OPTIONAL and string not in control
    ]


def to_family(document: Mapping[str, Any], source: Family, target: Family) -> dict[str, Any]:
    """Give the tokenizer the target family's special tokens: renamed in place by role, appended where new."""
    for role, string in target.tokens.items():
        controls = control_strings(document)
        if string in controls:
            continue
        old = source.tokens.get(role)
        # A string that the target family has too keeps its own role.
        if old in controls and old not in target.tokens.values() and string not in _all_strings(document):
            document = _renamed(document, old, string)
        else:
            document = with_special_tokens(document, [string])
    return dict(document)


def check_tokens_to_add(strings: Iterable[str]) -> None:
    """Refuse control tokens that ordinary text would hold: whoever reads a saved tokenizer finds them there.

    Raises:
        ValueError: an empty string, one with whitespace at an end, a single character or a word.
    """
    for string in strings:
        if not string or string != string.strip():
            raise ValueError(f"a token to add is a string without whitespace around it: got {string!r}")
        if len(string) == 1 or string.isalnum():
            raise ValueError(
                f"tokens_to_add are control tokens, and {string!r} occurs in ordinary text, which they would "
                f"cut: give it marks that text does not have, such as '<|{string}|>'"
            )


def with_special_tokens(document: Mapping[str, Any], strings: Iterable[str]) -> dict[str, Any]:
    """Append control tokens; a string that the vocabulary has already keeps its id and becomes control."""
    added = list(document.get("added_tokens") or [])
    known = _all_strings(document)
    for string in strings:
        by_string = {token["content"]: index for index, token in enumerate(added)}
        if string in by_string:
            index = by_string[string]
            added[index] = {**added[index], "special": True}
            continue
        token_id = known.setdefault(string, 1 + max(known.values(), default=-1))
        added.append(_control_token(token_id, string))
    return {**document, "added_tokens": added}


def byte_document(strings: Iterable[str]) -> dict[str, Any]:
    """Return the tokenizer.json whose ids 0 to 255 are the bytes themselves, followed by control tokens."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _control_token(256 + index, string) for index, string in enumerate(dict.fromkeys(strings))
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {character: byte for byte, character in enumerate(BYTE_ALPHABET)},
            "merges": [],
        },
    }


def control_strings(document: Mapping[str, Any]) -> dict[str, int]:
    """Return the control tokens of a tokenizer.json in the order of their ids."""
    added = sorted(document.get("added_tokens") or [], key=lambda token: token["id"])
    return {token["content"]: token["id"] for token in added if is_control(token)}


def _all_strings(document: Mapping[str, Any]) -> dict[str, int]:
    strings = dict(vocabulary_strings(document["model"]))
    return strings | {token["content"]: token["id"] for token in document.get("added_tokens") or []}


def _renamed(document: Mapping[str, Any], old: str, string: str) -> dict[str, Any]:
    added = [
        _control_token(token["id"], string) if token["content"] == old else token
        for token in document["added_tokens"]
    ]
    model = dict(document["model"])
    if old in vocabulary_strings(model):
        if isinstance(model["vocab"], dict):
            model["vocab"] = {string if name == old else name: i for name, i in model["vocab"].items()}
        else:
            model["vocab"] = [[string if name == old else name, score] for name, score in model["vocab"]]
    if model.get("unk_token") == old:
        model["unk_token"] = string
    return {**document, "added_tokens": added, "model": model}


def _control_token(token_id: int, string: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": string, **flags, "special": True}


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
