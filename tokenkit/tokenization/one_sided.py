"""What to tell a user whose student or teacher alone writes BOS."""

from __future__ import annotations

from tokenkit.tokenization.byteify import Tokenizer


def explain_one_sided_bos(student: Tokenizer, teacher: Tokenizer, mode: str) -> str | None:
    """Return what follows from a BOS that one side alone writes; None where both do or neither does.

    Args:
        student: the student's target tokenizer.
        teacher: the teacher's.
        mode: `chat_template_mode`.
    """
    sides = {"student": student, "teacher": teacher}
    writes = {name: _writes_bos(tokenizer) for name, tokenizer in sides.items()}
    if writes["student"] == writes["teacher"]:
        return None
    (having,) = (name for name, does in writes.items() if does)
    (lacking,) = (name for name, does in writes.items() if not does)
    bos = sides[having].family.tokens["bos"]
    scope = "conversations begin" if "no_force_bos" in mode else "documents begin"
    way_out = (
        f"To change this, end the student's spec in ':target=' and a family {_wanted(lacking == 'student')} "
        "(docs/tokenizer_specs.md)"
    )
    if "no_force_bos" not in mode:
        way_out += ", or leave BOS out of plain text on both sides with chat_template_mode "
        way_out += "direct_encode_no_force_bos"
    return (
        f"BOS on one side only: {scope} with {bos!r} for the {having}, and with no BOS for the {lacking}.\n"
        f"  That token has no partner, no chunk holds it, and the {having}'s tokens stand one place later.\n"
        f"  Nothing predicts the {lacking}'s first token: the first chunk of a document is not compared.\n"
        f"  {way_out}."
    )


def _writes_bos(tokenizer: Tokenizer) -> bool:
    return tokenizer.family.writes_bos and tokenizer.bos_id is not None


def _wanted(needs_bos: bool) -> str:
    return "that writes BOS, such as Llama3" if needs_bos else "that writes none, such as Qwen2"
