"""Whether an exported chat template says what training wrote, told before a run begins."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from tokenkit.errors import TemplateError
from tokenkit.tokenization.chat.conversation import abilities
from tokenkit.tokenization.chat.documents import document_from_row
from tokenkit.tokenization.chat.family_template import exported_template
from tokenkit.tokenization.chat.layout import template_ids
from tokenkit.tokenization.chat.rendering import render
from tokenkit.tokenization.chat.template import token_names

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
