"""Families of special tokens and chat templates, as plain data.

A document is written along a sequence of *atoms*: what a template says, not how. Every family writes
some of them, each with its own *pieces* (special tokens or ordinary text), so that two tokenizers
can be laid along one axis and the pieces that say the same thing are paired:

    BOS  { START ROLE END_HEADER  text  END_TURN AFTER_TURN }*  EOS
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

BOS, EOS = "bos", "eos"
START, ROLE, END_HEADER = "start", "role", "end_header"
END_TURN, AFTER_TURN = "end_turn", "after_turn"
OPENS = "opens"  # what a template writes in front of an answer, and leaves to the model when it generates
HEADER = (START, ROLE, END_HEADER)
NEXT = "next."  # the atom belongs to the turn that follows, and is written only where there is one
NEXT_HEADER = tuple(NEXT + atom for atom in HEADER)


@dataclass(frozen=True)
class Piece:
    """A string of a template and the atoms that it says; several atoms: it cannot be cut between them."""

    text: str
    atoms: tuple[str, ...]


@dataclass(frozen=True)
class Turn:
    """What a family writes before and after the text of one message."""

    header: tuple[Piece, ...]
    end: tuple[Piece, ...]


@dataclass(frozen=True)
class Family:
    """Special tokens by role, and how messages are written with them."""

    name: str
    tokens: Mapping[str, str]
    """Role (`bos`, `eos`, `pad`, `unk`, `start`, `end_turn`, ...) to the special token's string."""
    turns: Mapping[str, Turn] = field(default_factory=dict)
    """Message role to its pieces. Without `system`, its text goes in front of the first user message."""
    writes_bos: bool = False
    """BOS is written in front of every document."""
    repeats_bos: bool = False
    """BOS is written again in front of each later user turn."""
    ends_chat_with_eos: bool = False
    """EOS is written after the last turn of a conversation."""
    trims_content: bool = False
    """The template strips whitespace around each message."""
    joins_system: str = "\n\n"
    """Stands between a system text and the user's message that takes it in, where `system` is no turn."""


def _turns(header: Mapping[str, tuple[Piece, ...]], end: tuple[Piece, ...]) -> dict[str, Turn]:
    return {role: Turn(pieces, end) for role, pieces in header.items()}


def _named_headers(start: str, end: str, names: Mapping[str, str]) -> dict[str, tuple[Piece, ...]]:
    """Headers that spell the role: `<|im_start|>` `user` `\\n`."""
    return {
        role: (Piece(start, (START,)), Piece(name, (ROLE,)), Piece(end, (END_HEADER,)))
        for role, name in names.items()
    }


_ROLES = ("system", "user", "assistant")
_SPELLED = {role: role for role in _ROLES}
_MARKED = {role: (Piece(f"<|{role}|>\n", HEADER),) for role in _ROLES}
_NEWLINE = Piece("\n", (AFTER_TURN,))

CHATML_TURNS = _turns(
    _named_headers("<|im_start|>", "\n", _SPELLED), (Piece("<|im_end|>", (END_TURN,)), _NEWLINE)
)
_QWEN_TOKENS = {
    "eos": "<|endoftext|>",
    "pad": "<|endoftext|>",
    "start": "<|im_start|>",
    "end_turn": "<|im_end|>",
}
_GEMMA_TOKENS = {
    "bos": "<bos>",
    "eos": "<eos>",
    "pad": "<pad>",
    "unk": "<unk>",
    "start": "<start_of_turn>",
    "end_turn": "<end_of_turn>",
}
_GEMMA_TURNS = _turns(
    _named_headers("<start_of_turn>", "\n", {"user": "user", "assistant": "model"}),
    (Piece("<end_of_turn>", (END_TURN,)), _NEWLINE),
)
_SENTENCEPIECE_TOKENS = {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}


def _instruct_turns(end_of_answer: str) -> dict[str, Turn]:
    """`[INST] question [/INST] answer`: closing the question opens the answer."""
    return {
        "user": Turn((Piece("[INST] ", HEADER),), (Piece(" [/INST] ", (END_TURN, *NEXT_HEADER)),)),
        "assistant": Turn((), (Piece(end_of_answer, (END_TURN,)),)),
    }


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("Qwen2", _QWEN_TOKENS, CHATML_TURNS),
        Family("Qwen3", _QWEN_TOKENS, CHATML_TURNS),
        Family(
            "Llama2",
            _SENTENCEPIECE_TOKENS,
            _instruct_turns(" </s>"),
            writes_bos=True,
            repeats_bos=True,
            trims_content=True,
        ),
        Family(
            "Llama3",
            {
                "bos": "<|begin_of_text|>",
                "eos": "<|end_of_text|>",
                "start": "<|start_header_id|>",
                "end_header": "<|end_header_id|>",
                "end_turn": "<|eot_id|>",
            },
            _turns(
                _named_headers("<|start_header_id|>", "<|end_header_id|>\n\n", _SPELLED),
                (Piece("<|eot_id|>", (END_TURN,)),),
            ),
            writes_bos=True,
            trims_content=True,
        ),
        Family("Gemma2", _GEMMA_TOKENS, _GEMMA_TURNS, writes_bos=True, trims_content=True),
        Family("Gemma3", _GEMMA_TOKENS, _GEMMA_TURNS, writes_bos=True, trims_content=True),
        Family(
            "Phi3",
            {
                "bos": "<s>",
                "eos": "<|endoftext|>",
                "pad": "<|endoftext|>",
                "unk": "<unk>",
                "end_turn": "<|end|>",
                **{role: f"<|{role}|>" for role in _ROLES},
            },
            _turns(_MARKED, (Piece("<|end|>", (END_TURN,)), _NEWLINE)),
            ends_chat_with_eos=True,
        ),
        Family(
            "GPT2",
            {"bos": "<|endoftext|>", "eos": "<|endoftext|>"},
            {
                role: Turn(
                    (Piece(role.capitalize(), (ROLE,)), Piece(":\n", (END_HEADER,))),
                    (Piece("<|endoftext|>" if role == "assistant" else "\n", (END_TURN,)),),
                )
                for role in _ROLES
            },
            writes_bos=True,
        ),
        Family(
            "TinyLlama",
            _SENTENCEPIECE_TOKENS,
            _turns(_MARKED, (Piece("</s>", (END_TURN,)), _NEWLINE)),
            writes_bos=True,
        ),
        Family(
            "Mistral", _SENTENCEPIECE_TOKENS, _instruct_turns("</s>"), writes_bos=True, trims_content=True
        ),
    )
}

# `byte` without a family: nothing to inherit, so the shortest complete set.
BYTE_FAMILY = Family(
    "byte",
    {"pad": "<pad>", "bos": "<bos>", "eos": "<eos>", "start": "<|im_start|>", "end_turn": "<|im_end|>"},
    CHATML_TURNS,
    writes_bos=True,
)
