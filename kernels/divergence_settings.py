"""What a call of `linear_divergence` asks for: its options, and the mode they lead to.

An operation of torch takes tensors and words, so options become tensors in a list and JSON; inside the
operation they become a `Problem`. Dimensions: N rows, V columns, P pairs.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from tokenkit.kernels.divergence_checks import check_rest
from tokenkit.kernels.divergence_passes import CPU_CHUNK_BYTES
from tokenkit.kernels.divergence_rows import Problem, Side
from tokenkit.kernels.outcomes import Outcomes, match_outcomes
from tokenkit.kernels.row_chunks import Rows
from tokenkit.kernels.vocabulary_parallel import shard_of, shard_words, vocab_size
from tokenkit.structs import Head

DEFAULT_WORKSPACE_BYTES = 5 * 2**28  # 1.25 GiB: 1024 rows of 2 × 152k float32 logits
WHOLE_KINDS = ("abs", "log_abs")
"""Kinds that compare probabilities under the full vocabularies, whatever is paired."""


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


class Settings(NamedTuple):
    """What an operation is told besides tensors. Travels as JSON: an operator's schema knows no records."""

    mode: str
    kind: str
    rest_as_outcome: bool
    skew: float
    tail_mass: float
    temperatures: tuple[float, float]
    student: tuple[float, float | None, int, str, int]
    """Scale, softcap, vocabulary, name of the shard's group, first id."""
    teacher: tuple[float, float | None, int, str, int]
    outcomes: tuple[int, tuple[int, int], bool] | None
    """`pairs`, `unpaired`, `repeats`; None: to be matched."""
    row_stretches: tuple[tuple[int, int] | None, tuple[int, int] | None]
    """Rows of both heads where they are stretches."""
    constants: tuple[str, ...]
    """Names of the tensors that no gradient flows to."""
    needs: tuple[bool, bool, bool, bool]
    workspace_bytes: int


@lru_cache(maxsize=256)
def read(words: str) -> Settings:
    """Return the settings that `words_of` wrote."""
    return Settings(**json.loads(words))


def problem_of(
    inputs: tuple[Tensor, Tensor, Tensor | None, Tensor], tensors: dict[str, Tensor], settings: Settings
) -> Problem:
    """Put together what an operation was given, and check what needs the data of the indices."""
    student_ND, weight_VD, bias_V, teacher_NE = inputs
    heads = [
        Head(weight, bias, softcap, scale, size, shard_of(group, start))
        for weight, bias, (scale, softcap, size, group, start) in (
            (weight_VD, bias_V, settings.student),
            (tensors["weight"], tensors.get("bias"), settings.teacher),
        )
    ]
    whole = settings.rest_as_outcome or settings.kind in WHOLE_KINDS
    outcomes = _given_outcomes(tensors, settings)
    if outcomes is None:
        teacher_index = tensors.get("teacher_index")
        outcomes = match_outcomes(
            heads[0],
            heads[1],
            teacher_index=teacher_index,
            student_index=tensors.get("student_index"),
            whole=whole and teacher_index is not None,
        )
    has_rest = settings.rest_as_outcome and any(outcomes.unpaired)
    if has_rest:
        check_rest(outcomes, settings.kind)
    dtype = torch.promote_types(student_ND.dtype, torch.float32)
    rows, shares = outcomes[:2], (outcomes.student_share_P, outcomes.teacher_share_P)
    student, teacher = (
        _side(hidden, heads[i], rows[i], shares[i], settings.temperatures[i], dtype)
        for i, hidden in enumerate((student_ND, teacher_NE))
    )
    return Problem(
        student=student,
        teacher=teacher,
        pairs=outcomes.pairs,
        has_rest=has_rest,
        repeats=outcomes.repeats,
        kind=settings.kind,
        skew=settings.skew,
        tail_mass=settings.tail_mass,
        dtype=dtype,
    )


def _side(
    hidden: Tensor, head: Head, rows: Rows, share_P: Tensor | None, temperature: float, dtype: torch.dtype
) -> Side:
    return Side(
        hidden_ND=hidden,
        head=head,
        rows=rows,
        bias_V=None if head.bias_V is None else head.bias_V[rows],
        share_P=None if share_P is None else share_P.to(dtype),
        alpha=head.scale / temperature,
        cap=None if head.softcap is None else head.softcap / temperature,
    )


def _given_outcomes(tensors: dict[str, Tensor], settings: Settings) -> Outcomes | None:
    if settings.outcomes is None:
        return None
    pairs, unpaired, repeats = settings.outcomes
    rows = [
        tensors[name] if stretch is None else slice(*stretch)
        for name, stretch in zip(("student_rows", "teacher_rows"), settings.row_stretches, strict=True)
    ]
    shares = tensors.get("student_share"), tensors.get("teacher_share")
    return Outcomes(rows[0], rows[1], pairs, *shares, (unpaired[0], unpaired[1]), repeats)


def mode_of(
    inputs: tuple[Any, ...], teacher_rows: int, needs: tuple[bool, ...], settled: dict[str, Any]
) -> str:
    """Return the mode, by which gradients are wanted and what fits the budget."""
    student_ND, weight_VD = inputs[:2]
    if not any(needs):
        return "value"
    if not (needs[1] or needs[2]):
        return "rows"
    if settled["row_weight_N"] is None:
        return "recompute"
    fits = weight_VD.itemsize >= 4 or 4 * weight_VD.numel() <= settled["workspace_bytes"]
    if not fits and not torch.compiler.is_compiling():  # under a compiler N may be unknown
        row_bytes = 12 * max(len(weight_VD), teacher_rows)  # both models' logits and a dz, or less
        fits = row_bytes * len(student_ND) <= min(settled["workspace_bytes"], CPU_CHUNK_BYTES)
    return "weighted" if fits or not needs[1] else "recompute"


def words_of(
    kind: str, heads: tuple[Head, Head], settled: dict[str, Any], mode: str, needs: tuple[bool, ...]
) -> tuple[list[Tensor], str]:
    """Return an operation's constant tensors and its settings."""
    student_head, teacher_head = heads
    whole = settled["rest_as_outcome"] or kind in WHOLE_KINDS
    outcomes = settled["outcomes"]
    if (
        outcomes is None
        and not torch.compiler.is_compiling()
        and (whole or settled["student_index"] is not None)
    ):
        indices = {name: settled[name] for name in ("teacher_index", "student_index")}
        outcomes = match_outcomes(*heads, **indices, whole=whole and settled["teacher_index"] is not None)
    tensors = {
        "weight": teacher_head.weight_VD,
        "bias": teacher_head.bias_V,
        "row_weight": settled["row_weight_N"],
        "teacher_index": settled["teacher_index"],
        "student_index": settled["student_index"],
    }
    stretches: list[tuple[int, int] | None] = [None, None]
    if outcomes is not None:
        rows = outcomes[:2]
        stretches = [(x.start, x.stop) if isinstance(x, slice) else None for x in rows]
        tensors |= {"teacher_index": None, "student_index": None}
        tensors |= {
            name: None if isinstance(x, slice) else x
            for name, x in zip(("student_rows", "teacher_rows"), rows, strict=True)
        }
        tensors |= {"student_share": outcomes.student_share_P, "teacher_share": outcomes.teacher_share_P}
    tensors = {name: tensor.detach() for name, tensor in tensors.items() if tensor is not None}
    T = settled["temperature"]
    settings = Settings(
        mode=mode,
        kind=kind,
        rest_as_outcome=settled["rest_as_outcome"],
        skew=0.5 if kind == "js" else settled["skew"],
        tail_mass=settled["alpha"],
        temperatures=(T, T * settled["teacher_temperature"]),
        student=(
            student_head.scale,
            student_head.softcap,
            vocab_size(student_head),
            *shard_words(student_head),
        ),
        teacher=(
            teacher_head.scale,
            teacher_head.softcap,
            vocab_size(teacher_head),
            *shard_words(teacher_head),
        ),
        outcomes=None if outcomes is None else (outcomes.pairs, outcomes.unpaired, outcomes.repeats),
        row_stretches=(stretches[0], stretches[1]),
        constants=tuple(tensors),
        needs=(needs[0], needs[1], needs[2], needs[3]),
        workspace_bytes=settled["workspace_bytes"],
    )
    return list(tensors.values()), json.dumps(settings._asdict())
