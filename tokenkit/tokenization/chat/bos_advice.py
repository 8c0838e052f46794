"""What to tell a user where one of two tokenizers alone writes BOS."""

from __future__ import annotations

from contextlib import suppress

from tokenkit.tokenization.chat.families import FAMILIES
from tokenkit.tokenization.chat.special_tokens import lacking_of_family
from tokenkit.tokenization.tokenizer import Tokenizer

SPECS = "(docs/tokenizer_specs.md)"


def explain_one_sided_bos(
    student: Tokenizer, teacher: Tokenizer, mode: str, *, use_chat_template: bool = True
) -> str | None:
    """Return what follows from a BOS that one side alone writes; None where both do or neither does.

    Args:
        student: the student's target tokenizer.
        teacher: the teacher's.
        mode: `chat_template_mode`. A text may begin with BOS where a conversation does not, or the other
            way round: what the mode writes decides, plain texts first.
        use_chat_template: False: conversations are plain texts.
    """
    scopes = {
        "documents begin": "no_force_bos" not in mode,
        "conversations begin": "direct" in mode and use_chat_template,
    }
    for scope, is_written in scopes.items():
        in_chat = scope == "conversations begin" or mode == "surround_instruct"
        writes = [_writes_bos(tokenizer, in_chat=in_chat) for tokenizer in (student, teacher)]
        if is_written and set(writes) == {False, True}:
            return _explained(student, teacher, scope, in_chat=in_chat)
    return None


def _explained(student: Tokenizer, teacher: Tokenizer, scope: str, *, in_chat: bool) -> str:
    sides = {"student": student, "teacher": teacher}
    having, lacking = sides if _writes_bos(student, in_chat=in_chat) else reversed(sides)
    bos = sides[having].family.tokens["bos"]
    way_out = f"To change this, end the student's spec in {_wanted(teacher, in_chat=in_chat)} {SPECS}"
    if scope == "documents begin":
        way_out += ", or leave BOS out of plain text on both sides with chat_template_mode "
        way_out += "direct_encode_no_force_bos"
    return (
        f"BOS on one side only: {scope} with {bos!r} for the {having}, and with no BOS for the {lacking}.\n"
        f"  That token has no partner, no chunk holds it, and the {having}'s tokens stand one place later.\n"
        f"  Nothing predicts the {lacking}'s first token: the first chunk of a document is not compared.\n"
        f"  {way_out}."
    )


def explain_changed_bos(old: Tokenizer, new: Tokenizer) -> str | None:
    """Return what a model meets that moves from `old` to `new` untrained; None where BOS is no change."""
    if _writes_bos(old) == _writes_bos(new):
        return None
    if _writes_bos(old):
        bos = old.family.tokens["bos"]
        change = f"the model's own tokenizer begins documents with {bos!r}, the target with no BOS"
        follows = "The model reads text where it always read BOS, and nothing predicts a first token."
    else:
        bos = new.family.tokens["bos"]
        change = f"the target begins documents with {bos!r}, the model's own tokenizer with no BOS"
        follows = "The model has never read such a token, and its row is not one of a BOS."
    return (
        f"BOS on one side only: {change}.\n"
        f"  {follows}\n"
        f"  To change this, end the target's spec in {_wanted(old)} {SPECS}."
    )


def _writes_bos(tokenizer: Tokenizer, *, in_chat: bool = False) -> bool | None:
    """Whether a plain text, or a conversation, begins with BOS; None where no conversation can be written."""
    try:
        family = tokenizer.chat if in_chat else tokenizer.family
    except ValueError:
        return None
    return family.writes_bos and tokenizer.bos_id is not None


def _wanted(other: Tokenizer, *, in_chat: bool = False) -> str:
    """Name the families that begin a document as `other` does."""
    names = fitting_families(other, in_chat=in_chat)
    if not names:
        writes = _writes_bos(other, in_chat=in_chat)
        example = "writes BOS, such as Llama3" if writes else "writes none, such as Qwen2"
        return f"':target=' and a family that {example}"
    return " or ".join(f"':target={name}'" for name in names)


def fitting_families(tokenizer: Tokenizer, *, in_chat: bool = False) -> list[str]:
    """Return the families whose special tokens a tokenizer has, and that write BOS where it does.

    Those that write messages as it does go before all others.
    """
    if tokenizer.family.name in FAMILIES:
        return [tokenizer.family.name]
    fits = [
        family
        for family in FAMILIES.values()
        if family.writes_bos == _writes_bos(tokenizer, in_chat=in_chat)
        and not lacking_of_family(tokenizer.control, family)
        and (not family.writes_bos or family.tokens["bos"] == tokenizer.family.tokens["bos"])
    ]
    with suppress(ValueError):  # no template
        turns = tokenizer.chat.turns.items()
        fits = [family for family in fits if family.turns.items() <= turns] or fits
    return [family.name for family in fits]
