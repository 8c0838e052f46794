"""What an operation is told: fields by name, laid out as the tensors, numbers and words that it may take.

    pack(kind="kl", skew=0.1, teacher={"weight_VD": w, "bias_V": None})
        -> [w], [0.1], "S kind kl\\nF skew\\nT teacher.weight_VD"
    unpack(*packed)
        -> {"kind": "kl", "skew": 0.1, "teacher": {"weight_VD": w}}

The schema of a custom operation has no records, and a compiler must be able to build its arguments. Names
travel along, so a field may be added anywhere and nothing moves; one that is None is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from tokenkit.structs import Head, Shard

Packed = tuple[list[Tensor], list[float], str]
"""Tensors, numbers, words."""


def pack(**fields: Any) -> Packed:
    """Lay fields out: tensors, numbers, words, bools, None, or mappings of such fields by name."""
    packed: Packed = [], [], ""
    return packed[0], packed[1], "\n".join(_lay_out(fields, "", packed[0], packed[1]))


def _lay_out(
    fields: Mapping[str, Any], prefix: str, tensors: list[Tensor], numbers: list[float]
) -> list[str]:
    lines = []
    for field, value in fields.items():
        name = prefix + field
        if value is None:
            continue
        if isinstance(value, Tensor):
            tensors.append(value.detach())
            lines.append(f"T {name}")
        elif isinstance(value, str):
            lines.append(f"S {name} {value}")
        elif isinstance(value, bool):
            lines.append(f"B {name} {'1' if value else ''}")
        elif isinstance(value, dict):
            lines += _lay_out(value, f"{name}.", tensors, numbers)
        else:  # of a compiled call an int may be symbolic, so it is a number and no word
            lines.append(f"{'F' if isinstance(value, float) else 'I'} {name}")
            numbers.append(float(value))
    return lines


def unpack(tensors: Sequence[Tensor], numbers: Sequence[float], words: str) -> dict[str, Any]:
    """Return the fields that `pack` laid out, those of mappings in dicts."""
    found: dict[str, Any] = {}
    some, floats = iter(tensors), iter(numbers)
    for kind, path, text in _parse(words):
        place = found
        for part in path[:-1]:
            place = place.setdefault(part, {})
        match kind:
            case "T":
                place[path[-1]] = next(some)
            case "F":
                place[path[-1]] = next(floats)
            case "I":
                place[path[-1]] = int(next(floats))
            case _:
                place[path[-1]] = text if kind == "S" else bool(text)
    return found


@lru_cache(maxsize=256)
def _parse(words: str) -> tuple[tuple[str, tuple[str, ...], str], ...]:
    lines = [line.split(" ", 2) for line in words.split("\n") if line]
    return tuple((kind, tuple(name.split(".")), rest[0] if rest else "") for kind, name, *rest in lines)


def head_fields(head: Head, *, tensors: bool = True) -> dict[str, Any]:
    """Return a head as fields, without its tensors where those are arguments of their own."""
    group, start = _shard_words(head)
    fields = {
        "scale": float(head.scale),
        "vocab_size": head.vocab_size,
        "group": group or None,
        "start": start,
    }
    fields["softcap"] = None if head.softcap is None else float(head.softcap)
    return fields | ({"weight_VD": head.weight_VD, "bias_V": head.bias_V} if tensors else {})


def head_of(fields: Mapping[str, Any], weight_VD: Tensor | None = None, bias_V: Tensor | None = None) -> Head:
    """Return the head of which `head_fields` gave the fields."""
    return Head(
        fields["weight_VD"] if weight_VD is None else weight_VD,
        fields.get("bias_V", bias_V),
        fields.get("softcap"),
        fields["scale"],
        fields.get("vocab_size"),
        _shard_of(fields.get("group", ""), fields["start"]),
    )


def _shard_words(head: Head) -> tuple[str, int]:
    """Return a shard as what a custom operation may take: the group's name ("": no shard), the first id."""
    return ("", 0) if head.shard is None else (head.shard.group.group_name, head.shard.start)


def _shard_of(group_name: str, start: int) -> Shard | None:
    """Return the shard of which `_shard_words` gave the words."""
    if not group_name:
        return None
    return Shard(_resolve_process_group(group_name), start)  # type: ignore[arg-type]


def wanted(*tensors: Tensor | None) -> str:
    """Return letters of those that want a gradient: x hidden states, w weight, b bias, t the teacher's."""
    if not torch.is_grad_enabled():
        return ""
    return "".join(
        letter for letter, x in zip("xwbt", tensors, strict=False) if x is not None and x.requires_grad
    )
