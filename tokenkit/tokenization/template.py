"""Chat templates (Jinja): reading the pieces out of one, and writing one from the pieces.

A template is rendered on conversations of marker words; what stands between the markers is the template's
own. Headers and ends are told apart by comparing a turn that another one follows with one that is last.
Nothing of a data set is ever rendered, and rendering happens in the sandbox of transformers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import replace

from tokenkit.tokenization.families import (
    AFTER_TURN,
    BOS,
    END_TURN,
    EOS,
    HEADER,
    NEXT_HEADER,
    Family,
    Piece,
    Turn,
)

_MARKERS = tuple(f"Marker{index}Word" for index in range(4))
_PADDING = "  "
_SPELLED_ROLE = re.compile(r"(\w+)(\s*)")

Render = Callable[..., list[str]]
"""(roles, padding="") -> what stands before, between and after the marker words of these roles."""


def family_of_template(family: Family, chat_template: str, control: Collection[str]) -> Family:
    """Return the family with the turns of a chat template.

    A system prompt that the template injects by itself is not a turn, and is left out. A template that
    writes system messages inside the first user turn counts as one without them.

    Raises:
        ValueError: a template that fails, or does not write a conversation turn by turn.
    """
    render = _renderer(family, chat_template)
    try:
        first, to_answer, to_user, _, end = render(("user", "assistant", "user", "assistant"))
        *_, last_user = render(("user", "assistant", "user"))
        answer_behind_padding = render(("user", "assistant"), padding=_PADDING)[1]
    except ValueError as error:
        raise ValueError(
            f"the chat template cannot be read ({error}): name a family with ':target=' in the tokenizer spec"
        ) from error
    split = _Splitter(control)
    assistant_end, user_header = split.shared_start(to_user, end)
    user_end, assistant_header = split.shared_start(to_answer, last_user)
    bos, eos = family.tokens.get(BOS, ""), family.tokens.get(EOS, "")
    repeats_bos = family.writes_bos and bool(bos) and user_header.startswith(bos) and first == user_header
    # the template alone decides: transformers writes no BOS of its own in front of a rendered conversation
    starts = bos + user_header if user_header.startswith(bos) else bos
    writes_bos = repeats_bos or (bool(bos) and first.startswith(starts))
    user_header = user_header.removeprefix(bos) if repeats_bos else user_header
    turns = {
        "user": Turn(split.header(user_header, assistant_header), split.end(user_end)),
        "assistant": Turn(split.header(assistant_header, user_header), split.end(assistant_end)),
    }
    if not assistant_header.strip(" "):
        # `[/INST] ` closes the question and opens the answer, with its space.
        closing = (Piece(user_end + assistant_header, (END_TURN, *NEXT_HEADER)),)
        turns["user"] = replace(turns["user"], end=closing)
        turns["assistant"] = replace(turns["assistant"], header=())
    system = _system_turn(render, split, bos if writes_bos else "", user_header)
    return replace(
        family,
        turns=turns | system,
        writes_bos=writes_bos,
        repeats_bos=repeats_bos,
        ends_chat_with_eos=bool(eos) and end == assistant_end + eos,
        trims_content=not answer_behind_padding.startswith(_PADDING),
    )


def tokens_by_role(family: Family, chat_template: str | None, control: Collection[str]) -> dict[str, str]:
    """Return the family's special tokens by role, and those that its turns are written with.

    Turns have the roles `start`, `end_header` and `end_turn`; a special token that is a whole header has the
    name of the message's role. A template that cannot be read says nothing.
    """
    if not family.turns and chat_template is not None:
        with suppress(ValueError):
            family = family_of_template(family, chat_template, control)
    roles = dict(family.tokens)
    if not family.turns:
        return roles
    for message_role in ("assistant", *family.turns):
        turn = family.turns[message_role]
        for piece in (*turn.header, *turn.end):
            role = message_role if piece.atoms == HEADER else piece.atoms[0]
            if piece.text.strip() in control:
                roles.setdefault(role, piece.text.strip())
    return roles


def template_of_family(family: Family) -> str:
    """Write the chat template (Jinja) whose rendering is what `encode_documents` writes for the family."""
    trim = " | trim" if family.trims_content else ""
    has_system = "system" in family.turns
    parts = [
        "{%- set conversation = messages %}{%- set system = '' %}",
        "" if has_system else _SYSTEM_TO_USER,
    ]
    if family.writes_bos:
        parts.append(_writes(_quoted(family.tokens[BOS])))
    parts.append("{%- for message in conversation %}")
    for role, turn in family.turns.items():
        header = _quoted("".join(piece.text for piece in turn.header))
        end = _quoted("".join(piece.text for piece in turn.end))
        content = "message['content']"
        if role == "user":
            content = f"((system if loop.first else '') + {content})"
            if family.repeats_bos:
                header = f"({_quoted(family.tokens[BOS])} if not loop.first else '') + {header}"
        parts.append(_when(f"message['role'] == '{role}'", _writes(f"{header} + ({content}{trim}) + {end}")))
    parts.append("{%- endfor %}")
    answer = _quoted("".join(piece.text for piece in family.turns["assistant"].header))
    parts.append(_when("add_generation_prompt", _writes(answer)))
    if family.ends_chat_with_eos:
        parts.append(_when("not add_generation_prompt", _writes(_quoted(family.tokens[EOS]))))
    return "".join(parts)


_SYSTEM_TO_USER = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] + '\\n\\n' %}"
    "{%- set conversation = messages[1:] %}{%- endif %}"
)


def _writes(expression: str) -> str:
    return f"{{{{- {expression} }}}}"


def _when(condition: str, body: str) -> str:
    return f"{{%- if {condition} %}}{body}{{%- endif %}}"


def _quoted(text: str) -> str:
    """Write a string as Jinja does: JSON's escapes are a part of Jinja's."""
    return json.dumps(text, ensure_ascii=False)


def _renderer(family: Family, chat_template: str) -> Render:
    from transformers.utils.chat_template_utils import render_jinja_template

    def render(roles: Sequence[str], padding: str = "") -> list[str]:
        markers = _MARKERS[: len(roles)]
        messages = [
            {"role": role, "content": padding + marker + padding}
            for role, marker in zip(roles, markers, strict=True)
        ]
        names = {f"{role}_token": string for role, string in family.tokens.items()}
        try:
            rendered, _ = render_jinja_template(
                conversations=[messages], chat_template=chat_template, add_generation_prompt=False, **names
            )
        except Exception as error:  # a template is a program: it may raise anything
            raise ValueError(f"it fails: {error}") from error
        pieces = re.split("|".join(markers), rendered[0])
        if re.findall("|".join(markers), rendered[0]) != list(markers):
            raise ValueError("it does not write each message once and in order")
        return pieces

    return render


def _system_turn(render: Render, split: _Splitter, bos: str, user_header: str) -> dict[str, Turn]:
    """Return how a leading system message is written; nothing where it becomes part of the user's turn."""
    try:
        before, between, *_ = render(("system", "user", "assistant"))
    except ValueError:
        return {}
    header = before.removeprefix(bos)
    if not between.endswith(user_header) or not header:
        return {}
    # What a template adds behind the header (a date, a default prompt) is not the message's.
    spelled = user_header.replace("user", "system")
    header = spelled if header.startswith(spelled) else header
    return {"system": Turn(split.header(header, user_header), split.end(between.removesuffix(user_header)))}


class _Splitter:
    """Cuts template text at its special tokens."""

    def __init__(self, control: Collection[str]) -> None:
        self.control = set(control)
        strings = sorted(self.control, key=len, reverse=True)
        self._pattern = re.compile("(" + "|".join(map(re.escape, strings)) + ")") if strings else None

    def elements(self, text: str) -> list[str]:
        """Return special tokens and the texts between them."""
        return [part for part in (self._pattern.split(text) if self._pattern else [text]) if part]

    def shared_start(self, longer: str, shorter: str) -> tuple[str, str]:
        """Return what both begin with, in whole elements, and the rest of the first.

        A last element of text counts where one side's begins with the other's.
        """
        shared = []
        for mine, other in zip(self.elements(longer), self.elements(shorter), strict=False):
            if mine == other:
                shared.append(mine)
                continue
            if not {mine, other} & self.control and mine.startswith(other):
                shared.append(other)
            break
        start = "".join(shared)
        return start, longer[len(start) :]

    def header(self, header: str, other: str) -> tuple[Piece, ...]:
        """Return the pieces of a header; one piece where the role's name is not a word of its own."""
        mine, others = self.elements(header), self.elements(other)
        differing = [i for i, (a, b) in enumerate(zip(mine, others, strict=False)) if a != b]
        if len(mine) == len(others) and len(differing) == 1:
            at = differing[0]
            if mine[at] not in self.control and (match := _SPELLED_ROLE.fullmatch(mine[at])):
                texts = ("".join(mine[:at]), match[1], match[2] + "".join(mine[at + 1 :]))
                return tuple(Piece(t, (atom,)) for t, atom in zip(texts, HEADER, strict=True) if t)
        return (Piece(header, HEADER),) if header else ()

    def end(self, text: str) -> tuple[Piece, ...]:
        """Return the pieces of a turn's end: up to its first special token, and what follows."""
        elements = self.elements(text)
        at = next((i for i, element in enumerate(elements) if element in self.control), len(elements) - 1)
        texts = ("".join(elements[: at + 1]), "".join(elements[at + 1 :]))
        return tuple(Piece(t, (a,)) for t, a in zip(texts, (END_TURN, AFTER_TURN), strict=True) if t)
