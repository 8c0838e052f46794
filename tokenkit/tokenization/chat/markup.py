"""Special tokens inside the text of a message: which strings they are, and where a turn is cut at them."""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenkit.tokenization.tokenizer import Tokenizer

CONTINUES = "\0"
"""Joins a role and the special tokens that stand in front of its text; a later part of a turn has no role."""


@functools.lru_cache(maxsize=16)
def special_pattern(tokenizer: Tokenizer) -> tuple[re.Pattern[str] | None, frozenset[str]]:
    """Return what finds special tokens (in its one group), and those that are markup inside messages.

    Markup, such as `<think>`, is no special token for transformers: it reads it in messages as training does.
    """
    strings = sorted(tokenizer.control, key=len, reverse=True)
    added = tokenizer.document.get("added_tokens") or []
    ordinary = {token["content"] for token in added if not token.get("special")}
    pattern = re.compile("(" + "|".join(map(re.escape, strings)) + ")") if strings else None
    return pattern, frozenset(ordinary & tokenizer.control.keys())
