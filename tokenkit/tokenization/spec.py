"""The string that names a tokenizer, and what shall be done to it.

    name_or_path[:source=Family][:target=Family][:conversion=byte|prebyteified|manual_add_prefix_space]

`docs/tokenizer_specs.md` explains each part.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Literal, get_args

from tokenkit.tokenization.chat.families import FAMILIES

Conversion = Literal["byte", "prebyteified", "manual_add_prefix_space"]
KEYS = ("source", "target", "conversion")
BYTE = "byte"

# A key starts a part; any other colon belongs to the name (`C:\\tokenizers\\gpt2`).
_PART = re.compile(r":(?=[A-Za-z_]+=)")


@dataclass(frozen=True)
class TokenizerSpec:
    """Which tokenizer, which special tokens it has and shall end with, and how its bytes are read."""

    name_or_path: str
    source: str | None = None
    target: str | None = None
    conversion: Conversion | None = None

    def __str__(self) -> str:
        """Write the spec as `parse_spec` reads it."""
        parts = [f":{key}={getattr(self, key)}" for key in KEYS if getattr(self, key) is not None]
        return self.name_or_path + "".join(parts)


def parse_spec(text: str) -> TokenizerSpec:
    """Read a tokenizer spec such as `Qwen/Qwen2.5-0.5B:source=Qwen2:target=Llama3`, a bare path, or `byte`.

    Raises:
        ValueError: no name, an unknown key, family or conversion, or a key given twice.
    """
    name, *parts = _PART.split(text.strip())
    if not name:
        raise ValueError(f"a tokenizer spec starts with a name or a path: got {text!r}")
    values: dict[str, str] = {}
    for part in parts:
        key, _, value = part.partition("=")
        if key not in KEYS:
            raise ValueError(
                f"tokenizer spec {text!r}: unknown key {key!r}{_nearest(key, KEYS)}; keys: {', '.join(KEYS)}"
            )
        if key in values:
            raise ValueError(f"tokenizer spec {text!r}: {key!r} is given twice: keep one")
        allowed = get_args(Conversion) if key == "conversion" else tuple(FAMILIES)
        if value not in allowed:
            raise ValueError(
                f"tokenizer spec {text!r}: unknown {key} {value!r}{_nearest(value, allowed)}; "
                f"one of {', '.join(allowed)}"
            )
        values[key] = value
    if name == BYTE and values.get("conversion") not in (None, "byte"):
        raise ValueError(f"tokenizer spec {text!r}: 'byte' is bytes already: leave conversion out")
    return TokenizerSpec(name, values.get("source"), values.get("target"), values.get("conversion"))  # type: ignore[arg-type]


def _nearest(name: str, valid: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
