"""What to know of the templates of a pair before a run: BOS on one side, what an exported one says else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from tokenkit.errors import TemplateError
from tokenkit.tokenization.chat.conversation import abilities
from tokenkit.tokenization.chat.documents import document_from_row
from tokenkit.tokenization.chat.families import FAMILIES
from tokenkit.tokenization.chat.layout import template_ids
from tokenkit.tokenization.chat.rendering import render
from tokenkit.tokenization.chat.special_tokens import lacking_of_family
from tokenkit.tokenization.chat.template import token_names
from tokenkit.tokenization.files.saving import explain_saving, exported_template
from tokenkit.tokenization.tokenizer import Tokenizer

if TYPE_CHECKING:
    from tokenkit.tokenization.tokenizer import Tokenizer

_Q, _A = {"role": "user", "content": "one two"}, {"role": "assistant", "content": "three four"}
_THINKS = {"role": "assistant", "content": "<think>\nfive\n</think>\n\nsix"}
SAMPLES: dict[str, list[dict[str, str]]] = {
    "a question and an answer": [_Q, _A],
    "a system text": [{"role": "system", "content": "seven"}, _Q, _A, _Q, _A],
    "messages with whitespace around them": [
        {"role": "user", "content": " one\n"},
        {"role": "assistant", "content": "\n two "},
    ],
    "messages that end in a mark": [
        {"role": "user", "content": "one two?"},
        {"role": "assistant", "content": "three four."},
    ],
    "an answer that thinks": [_Q, _THINKS],
    "an earlier answer that thinks": [_Q, _THINKS, _Q, _A],
    "what a tool says": [_Q, _A, {"role": "tool", "content": '{"eight": 8}'}, _A],
    "two questions in a row": [_Q, _Q, _A],
}
_DATE = re.compile(r"strftime_now|date_string")


class Difference(NamedTuple):
    """Where an exported template and training part."""

    sample: str
    """The kind of conversation, of `SAMPLES`."""
    training: str
    """What training writes from there on, or why it writes nothing."""
    template: str
    """What the template writes."""


def differences(tokenizer: Tokenizer) -> list[Difference]:
    """Compare training with the exported template on a few conversations, token by token.

    Raises:
        ValueError: no template, or one that cannot be read.
    """
    from tokenkit.tokenization.chat.encode import encode_documents

    _ = tokenizer.chat  # raises where a template cannot be read
    found = []
    for name, messages in SAMPLES.items():
        try:
            expected = template_ids(tokenizer, _apply(tokenizer, messages))
        except TemplateError:
            expected = None
        try:
            ((tokens,),) = encode_documents([document_from_row({"messages": messages})], [tokenizer])
        except ValueError as error:
            if expected is not None:
                found.append(Difference(name, f"no such row ({error})", _spell(tokenizer, expected)))
            continue
        written = tokens.ids.tolist()
        if expected is None:
            found.append(Difference(name, _spell(tokenizer, written), "an error"))
        elif written != expected:
            at = next((i for i, (a, b) in enumerate(zip(written, expected, strict=False)) if a != b), None)
            first = min(len(written), len(expected)) if at is None else at
            found.append(
                Difference(name, _spell(tokenizer, written[first:]), _spell(tokenizer, expected[first:]))
            )
    return found


def explain_template(tokenizer: Tokenizer) -> str | None:
    """Return what a user of the exported template should know; None where it says what training wrote.

    Args:
        tokenizer: the student's target.
    """
    if exported_template(tokenizer) is None:
        return None
    try:
        apart = differences(tokenizer)
    except ValueError as error:
        return f"chat template: {error}. Conversations are left out, the export has the template as it is."
    same = [name for name, training, template in apart if training == template]
    said = [f"the export cuts the same text into other tokens: {', '.join(same)}"] if same else []
    said += [
        f"{name}: training writes {_short(training)}, the exported template {_short(template)}"
        for name, training, template in apart
        if training != template
    ]
    said += _notes(tokenizer)
    if not said:
        return None
    return "\n".join([f"chat template of {tokenizer.spec}:", *(f"  {line}." for line in said)])


def _notes(tokenizer: Tokenizer) -> list[str]:
    template = exported_template(tokenizer) or ""
    notes = []
    if _DATE.search(template):
        notes.append("it writes a date: training always writes 26 July 2024, or the template's own fixed one")
    lost = [
        name for name in ("an answer that thinks", "an earlier answer that thinks") if _loses(tokenizer, name)
    ]
    if lost:
        notes.append(f"it leaves out the <think> block of {' and of '.join(lost)}, and so does training")
    missing = sorted({"tool calls", "tools", "reasoning"} - abilities(tokenizer))
    if missing:
        notes.append(f"it does not write {', '.join(missing)}: rows with these are left out and counted")
    opening = _opening(tokenizer)
    if opening is not None:
        notes.append(opening)
    return notes


def _opening(tokenizer: Tokenizer) -> str | None:
    """Compare the generation prompt with what stands in front of an answer."""
    try:
        whole = _apply(tokenizer, [_Q, _A])
        prompt = render(
            exported_template(tokenizer) or "",
            [_Q],
            names=token_names(tokenizer.family.tokens),
            add_generation_prompt=True,
        )
    except TemplateError as error:
        return f"it writes no generation prompt ({error})"
    before = whole.partition(_A["content"])[0]
    if before.startswith(prompt.rstrip(" ")):
        ids, whole_ids = (template_ids(tokenizer, text) for text in (prompt.rstrip(" "), whole))
        if whole_ids[: len(ids)] == ids:
            return None
        return "its generation prompt ends in other tokens than those in front of a trained answer"
    at = next((i for i, (a, b) in enumerate(zip(before, prompt, strict=False)) if a != b), len(before))
    return (
        f"its generation prompt ends in {_short(prompt[at:])}, where training writes "
        f"{_short(before[at:])} in front of an answer: generate with the latter"
    )


def _loses(tokenizer: Tokenizer, name: str) -> bool:
    try:
        return "five" not in _apply(tokenizer, SAMPLES[name])
    except TemplateError:
        return False


def _apply(tokenizer: Tokenizer, messages: Sequence[dict[str, Any]]) -> str:
    return render(exported_template(tokenizer) or "", messages, names=token_names(tokenizer.family.tokens))


def _spell(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return b"".join(tokenizer.token_bytes[i] for i in ids).decode(errors="replace")


def _short(text: str) -> str:
    if text == "an error" or text.startswith("no such row ("):
        return text
    return repr(text if len(text) < 60 else text[:57] + "...")


SPECS = "(docs/tokenizer_specs.md)"


def explain_pair(
    student: Tokenizer, teacher: Tokenizer | None, mode: str, *, use_chat_template: bool = True
) -> list[str]:
    """Return all there is to know of a pair before a run; see `explain_one_sided_bos` for the arguments.

    A `teacher` of None: no loss reads one.
    """
    notes: list[str | None] = []
    if teacher is not None:
        notes.append(explain_one_sided_bos(student, teacher, mode, use_chat_template=use_chat_template))
    notes += [explain_template(student)] if use_chat_template else []
    return [note for note in (*notes, explain_saving(student)) if note is not None]


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
