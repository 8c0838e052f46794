"""Tokenizers before a run: every id's bytes, special tokens, and what differs between the two sides."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from tokenkit.tokenization.chat.advice import SAMPLES, explain_one_sided_bos, explain_template
from tokenkit.tokenization.chat.documents import document_from_row
from tokenkit.tokenization.chat.encode import encode_documents
from tokenkit.tokenization.files.saving import explain_saving
from tokenkit.tokenization.tokenizer import Tokenizer
from tokenkit.training.doctor.findings import Findings

_SHOWN = 3
_FEW = 0.001  # of the ids: what a tokenizer may leave out without anybody noticing


def check_vocabulary(tokenizer: Tokenizer, side: str, found: Findings) -> None:
    """Compare the bytes of every id with what the tokenizers library writes for it, and read them back.

    Args:
        tokenizer: of `side`.
        side: what messages call it.
        found: is filled.
    """
    texts, ids = [], []
    for token_id in np.flatnonzero(~tokenizer.is_special_V).tolist():
        try:
            texts.append(tokenizer.token_bytes[token_id].decode())
            ids.append(token_id)
        except UnicodeDecodeError:  # a part of a character has no text of its own
            continue
    written = tokenizer.to_huggingface()._tokenizer.decode_batch(
        [[i] for i in ids], skip_special_tokens=False
    )
    strips = tokenizer.prefix.scheme != "never"
    wrong = [
        (i, text, other)
        for i, text, other in zip(ids, texts, written, strict=True)
        if text != other and not (strips and text.startswith(" ") and text[1:] == other)
    ]
    name = f"{side} {tokenizer.spec}"
    if wrong:
        shown = ", ".join(f"id {i} is {text!r} here and {other!r} there" for i, text, other in wrong[:_SHOWN])
        found.warning(
            "vocabulary",
            f"{name}: {len(wrong):,} of {len(ids):,} ids are other text for the tokenizers library: {shown}",
            "alignments follow the bytes here; look at the decoder in tokenizer.json",
        )
    spelled_K = tokenizer.encode_texts(texts).is_spelled_K
    lost = [ids[k] for k in np.flatnonzero(~spelled_K).tolist()]
    if len(lost) > _SHOWN:  # a lone space, mostly
        shown = ", ".join(f"{i} ({tokenizer.token_bytes[i].decode()!r})" for i in lost[:_SHOWN])
        is_usual = len(lost) <= _FEW * len(ids) or tokenizer.document.get("normalizer") is not None
        add = found.note if is_usual else found.warning
        add(
            "vocabulary",
            f"{name}: the text of {len(lost):,} of {len(ids):,} ids is changed before it is read, so no text "
            f"gives them: {shown}",
            "nothing, where a normalizer composes characters; else the vocabulary is not this tokenizer's",
        )
    if tokenizer.unk_id is not None:
        found.warning(
            "vocabulary",
            f"{name}: it lacks bytes, which become its unknown token (id {tokenizer.unk_id})",
            "such rows are left out and counted; data.bad_rows.unencodable drops or replaces the characters",
        )
    holes = sum(not raw for raw in tokenizer.token_bytes)
    if holes:
        found.note("vocabulary", f"{name}: {holes:,} ids below {tokenizer.vocab_size:,} belong to no token")


def check_special(tokenizer: Tokenizer, side: str, ends: Collection[int], found: Findings) -> None:
    """Look at padding and at the ends of documents.

    Args:
        tokenizer: of `side`.
        side: what messages call it.
        ends: ids that its model stops at; empty where no model says any.
        found: is filled.
    """
    name = f"{side} {tokenizer.spec}"
    family = "end its spec in ':target=' and a family that has one (docs/tokenizer_specs.md)"
    if tokenizer.eos_id is None:
        found.warning(
            "special",
            f"{name}: it has no EOS, so nothing says that a text ends, and nothing learns to end",
            family,
        )
    if tokenizer.pad_id is not None and tokenizer.pad_id == tokenizer.eos_id:
        found.warning(
            "special",
            f"{name}: padding is EOS (id {tokenizer.pad_id}). Losses here mask by length, so EOS is "
            "trained all the same; trainers that mask by id never train it, and their models do not stop",
            f"nothing for this run; to mend it for later ones, {family}",
        )
    stops = {tokenizer.special_ids.get(role) for role in ("eos", "end_turn")} - {None}
    if len(ends) > 1:
        listed = ", ".join(_named(tokenizer, i) for i in sorted(ends))
        found.note(
            "special",
            f"{name}: its model stops at {len(ends)} tokens: {listed}. Training writes "
            f"{_named(tokenizer, tokenizer.eos_id)} behind a text, and a template its own end of a turn",
            "nothing, where the one that training writes is the one you stop at",
        )
    if ends and tokenizer.eos_id is not None and not stops & set(ends):
        listed = ", ".join(_named(tokenizer, i) for i in sorted(ends))
        found.warning(
            "special",
            f"{name}: its model stops at {listed}, and the tokenizer ends documents with "
            f"{_named(tokenizer, tokenizer.eos_id)}",
            "name the family that the model was trained with: ':source=' in its tokenizer_name",
        )


def _named(tokenizer: Tokenizer, token_id: int | None) -> str:
    if token_id is None:
        return "nothing"
    if token_id >= tokenizer.vocab_size:
        return f"{token_id} (no token of the tokenizer)"
    return f"{token_id} ({tokenizer.token_bytes[token_id].decode(errors='replace')!r})"


def check_pair(
    student: Tokenizer, teacher: Tokenizer, text: Any, needs_teacher: bool, found: Findings
) -> None:
    """Compare both sides.

    Args:
        student: the student's target tokenizer.
        teacher: the teacher's.
        text: `config.text`.
        needs_teacher: something of the training reads a teacher.
        found: is filled.
    """
    if needs_teacher and (student is teacher or student.fingerprint() == teacher.fingerprint()):
        found.note(
            "pair",
            "student and teacher have the same tokenizer: every chunk is one token",
            "the loss kl compares whole distributions then, which says more than chunks do (docs/losses.md)",
        )
    mode, uses_template = text.chat_template_mode, text.use_chat_template
    if needs_teacher and student is not teacher:
        bos = explain_one_sided_bos(student, teacher, mode, use_chat_template=uses_template)
        if bos is not None:
            found.warning("pair", bos)
        if uses_template:
            _check_templates(student, teacher, found)
    if uses_template and (said := explain_template(student)) is not None:
        found.note("pair", said)
    if (said := explain_saving(student)) is not None:
        found.note("pair", said)


def _check_templates(student: Tokenizer, teacher: Tokenizer, found: Findings) -> None:
    """Write conversations on both sides; say which one side cannot write, and what has no partner."""
    sides = {"student": student, "teacher": teacher}
    for name, tokenizer in sides.items():
        try:
            _ = tokenizer.chat
        except ValueError as error:
            found.note(
                "pair", f"the {name} writes no conversations: {error}", "nothing, for plain text alone"
            )
            return
    unpaired: dict[str, list[str]] = {}
    for sample, messages in SAMPLES.items():
        document = document_from_row({"messages": messages})
        cannot = {name: why for name, one in sides.items() if (why := _why_not(document, one)) is not None}
        if len(cannot) == 1:
            ((name, why),) = cannot.items()
            found.warning(
                "pair",
                f"conversations with {sample}: the {name}'s template does not write them ({why}), so they "
                "are left out and counted, though the other side's does",
                "leave such rows out of the data, or name another family with ':target='",
            )
        if cannot:
            continue
        ((left, right),) = encode_documents([document], [student, teacher])
        for (name, tokenizer), tokens in zip(sides.items(), (left, right), strict=True):
            alone = tokens.ids[tokens.byte_ends < 0].tolist()
            if alone:
                written = b"".join(tokenizer.token_bytes[i] for i in alone).decode(errors="replace")
                unpaired.setdefault(f"the {name} alone writes {written!r}", []).append(sample)
    for what, samples in unpaired.items():
        found.note(
            "pair",
            f"chat templates differ: {what} in {', '.join(samples)}: in no chunk, compared with nothing",
        )


def _why_not(document: Any, tokenizer: Tokenizer) -> str | None:
    try:
        encode_documents([document], [tokenizer])
    except ValueError as error:
        return str(error)
    return None
