"""What a call of `linear_divergence` asks for: options, the mode they lead to, their way into the operation.

Dimensions: N rows, V columns, P pairs.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from tokenkit.kernels.head.call import Packed, head_fields, head_of, pack, unpack
from tokenkit.kernels.head.side import Side, side_of
from tokenkit.kernels.kinds import WHOLE_KINDS
from tokenkit.kernels.linear_divergence.checks import check_rest
from tokenkit.kernels.linear_divergence.outcomes import Outcomes, match_outcomes
from tokenkit.structs import Head

DEFAULT_WORKSPACE_BYTES = 5 * 2**28  # 1.25 GiB: 1024 rows of 2 × 152k float32 logits
CPU_CHUNK_BYTES = 256 * 2**20


class Options(TypedDict, total=False):
    """Keyword arguments of `linear_divergence`; it says what they mean."""

    teacher_index: Tensor | None
    student_index: Tensor | None
    outcomes: Outcomes | None
    rest_as_outcome: bool
    temperature: float
    teacher_temperature: float
    skew: float
    alpha: float
    row_weight_N: Tensor | None
    workspace_bytes: int


DEFAULTS: Options = {
    "teacher_index": None,
    "student_index": None,
    "outcomes": None,
    "rest_as_outcome": False,
    "temperature": 1.0,
    "teacher_temperature": 1.0,
    "skew": 0.1,
    "alpha": 0.5,
    "row_weight_N": None,
    "workspace_bytes": DEFAULT_WORKSPACE_BYTES,
}


class Problem(NamedTuple):
    """A divergence to be computed."""

    student: Side
    teacher: Side
    shares: tuple[Tensor | None, Tensor | None]
    """Of either model, −log of how many columns an id of P has under its full vocabulary; None: one each."""
    pairs: int
    """P, columns that face each other; those after them are ids in no pair."""
    has_rest: bool
    """Whether the ids in no pair are an outcome."""
    repeats: bool
    """Whether a row of the student's head may have several columns."""
    kind: str
    skew: float
    tail_mass: float
    """alpha of akl."""
    dtype: torch.dtype
    """Of logits and sums: float32 or float64."""


def is_whole(kind: str, rest_as_outcome: bool) -> bool:
    """Say whether probabilities are those under the full vocabularies."""
    return rest_as_outcome or kind in WHOLE_KINDS


def problem_of(inputs: tuple[Any, ...], packed: Packed) -> tuple[Problem, dict[str, Any]]:
    """Return the divergence, checked where that needs the data of indices, and the fields of the call.

    Args:
        inputs: student's states, weight, bias, teacher's states.
        packed: what `prepare` returned.
    """
    student_ND, weight_VD, bias_V, teacher_NE = inputs
    call = unpack(*packed)
    heads = head_of(call["student_head"], weight_VD, bias_V), head_of(call["teacher_head"])
    outcomes = _outcomes_of(call)
    if outcomes is None:
        indices = call.get("index", {})
        whole = is_whole(call["kind"], call["rest_as_outcome"]) and "teacher_index" in indices
        outcomes = match_outcomes(*heads, **indices, whole=whole)
    has_rest = call["rest_as_outcome"] and any(outcomes.unpaired)
    if has_rest:
        check_rest(outcomes, call["kind"])
    dtype = torch.promote_types(student_ND.dtype, torch.float32)
    temperature = call["temperature"]
    shares = outcomes.student_share_P, outcomes.teacher_share_P
    problem = Problem(
        student=side_of("student_ND", student_ND, heads[0], temperature, outcomes.student_rows),
        teacher=side_of(
            "teacher_NE",
            teacher_NE,
            heads[1],
            temperature * call["teacher_temperature"],
            outcomes.teacher_rows,
        )._replace(dtype=dtype),
        shares=(_to(shares[0], dtype), _to(shares[1], dtype)),
        pairs=outcomes.pairs,
        has_rest=has_rest,
        repeats=outcomes.repeats,
        kind=call["kind"],
        skew=call["skew"],
        tail_mass=call["alpha"],
        dtype=dtype,
    )
    return problem, call


def _to(share_P: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if share_P is None else share_P.to(dtype)


def _fields_of(outcomes: Outcomes) -> dict[str, Any]:
    """Return outcomes as fields; a stretch of rows as its ends."""
    fields: dict[str, Any] = outcomes._asdict()
    for name in ("student_rows", "teacher_rows"):
        rows = fields[name]
        if isinstance(rows, slice):
            fields[name] = {"start": rows.start, "stop": rows.stop}
    fields["unpaired"] = {"student": outcomes.unpaired[0], "teacher": outcomes.unpaired[1]}
    return fields


def _outcomes_of(call: dict[str, Any]) -> Outcomes | None:
    if "outcomes" not in call:
        return None
    fields = dict.fromkeys(Outcomes._fields) | call["outcomes"]
    for name in ("student_rows", "teacher_rows"):
        if isinstance(fields[name], dict):
            fields[name] = slice(fields[name]["start"], fields[name]["stop"])
    fields["unpaired"] = fields["unpaired"]["student"], fields["unpaired"]["teacher"]
    return Outcomes(**fields)


def mode_of(inputs: tuple[Any, ...], teacher_rows: int, needs: str, settled: dict[str, Any]) -> str:
    """Return the mode, by which gradients are wanted (x, w, b, t) and what fits the budget."""
    student_ND, weight_VD = inputs[:2]
    if not needs:
        return "value"
    if not ("w" in needs or "b" in needs):
        return "rows"
    if settled["row_weight_N"] is None:
        return "recompute"
    fits = weight_VD.itemsize >= 4 or 4 * weight_VD.numel() <= settled["workspace_bytes"]
    if not fits and not torch.compiler.is_compiling():  # under a compiler N may be unknown
        row_bytes = 12 * max(len(weight_VD), teacher_rows)  # both models' logits and a dz, or less
        fits = row_bytes * len(student_ND) <= min(settled["workspace_bytes"], CPU_CHUNK_BYTES)
    return "weighted" if fits or "w" not in needs else "recompute"


def prepare(kind: str, heads: tuple[Head, Head], settled: dict[str, Any], mode: str, needs: str) -> Packed:
    """Return what an operation takes beside what may need gradients."""
    outcomes = settled["outcomes"]
    indices = {name: settled[name] for name in ("teacher_index", "student_index")}
    whole = is_whole(kind, settled["rest_as_outcome"])
    matches_here = whole or indices["student_index"] is not None
    if outcomes is None and matches_here and not torch.compiler.is_compiling():
        outcomes = match_outcomes(*heads, **indices, whole=whole and indices["teacher_index"] is not None)
    elif outcomes is not None and outcomes.whole is not None and outcomes.whole != whole:
        raise ValueError(
            f"outcomes must be matched with whole={whole} where kind is {kind!r} and rest_as_outcome is "
            f"{settled['rest_as_outcome']}: got whole={outcomes.whole}"
        )
    numbers = {name: float(settled[name]) for name in ("alpha", "temperature", "teacher_temperature")}
    return pack(
        mode=mode,
        kind=kind,
        needs=needs,
        rest_as_outcome=settled["rest_as_outcome"],
        skew=0.5 if kind == "js" else float(settled["skew"]),
        workspace_bytes=settled["workspace_bytes"],
        row_weight=settled["row_weight_N"],
        student_head=head_fields(heads[0], tensors=False),
        teacher_head=head_fields(heads[1]),
        index=indices if outcomes is None else None,
        outcomes=None if outcomes is None else _fields_of(outcomes),
        **numbers,
    )
