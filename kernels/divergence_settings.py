"""What a call of `linear_divergence` asks for: its options, and the mode they lead to.

An operation of torch takes tensors, numbers and words, so options become lists of them; inside the operation
they become a `Problem`. Dimensions: N rows, V columns, P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from tokenkit.kernels.divergence_checks import check_rest
from tokenkit.kernels.divergence_passes import CPU_CHUNK_BYTES
from tokenkit.kernels.divergence_rows import Problem, Side
from tokenkit.kernels.outcomes import Outcomes, match_outcomes
from tokenkit.kernels.row_chunks import Rows
from tokenkit.kernels.vocabulary_parallel import shard_of, shard_words
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
    """What an operation is told besides tensors; of pairs, the student's comes first."""

    mode: str
    kind: str
    groups: tuple[str, str]
    """Names of the groups that share the heads; "": none."""
    constants: tuple[str, ...]
    """Names of the tensors that no gradient flows to."""
    needs: tuple[bool, ...]
    """Whether a gradient is wanted of student, weight, bias, teacher."""
    rest_as_outcome: bool
    skew: float
    tail_mass: float
    workspace_bytes: int
    temperatures: tuple[float, float]
    scales: tuple[float, float]
    softcaps: tuple[float, float]
    """0: none."""
    vocab_sizes: tuple[float, float]
    """0: every row."""
    starts: tuple[float, float]
    """First ids of the shards."""
    outcomes: tuple[float, ...]
    """`pairs`, `unpaired`, `repeats`, and the stretches of rows, -1 where they are tensors; or nothing."""


Packed = tuple[list[float], str]
"""Settings as an operation of torch takes them, and a compiler can make them."""


def pack(settings: Settings) -> Packed:
    """Write settings as numbers and words."""
    words = [settings.mode, settings.kind, *settings.groups, ",".join(settings.constants)]
    numbers = [*settings.needs, settings.rest_as_outcome, settings.skew, settings.tail_mass]
    numbers += [settings.workspace_bytes, *settings.temperatures, *settings.scales, *settings.softcaps]
    numbers += [*settings.vocab_sizes, *settings.starts, *settings.outcomes]
    return [float(number) for number in numbers], "\n".join(words)


def unpack(numbers: Sequence[float], words: str) -> Settings:
    """Read what `pack` wrote."""
    return _unpack(tuple(numbers), words)


@lru_cache(maxsize=256)
def _unpack(numbers: tuple[float, ...], words: str) -> Settings:
    mode, kind, student_group, teacher_group, constants = words.split("\n")
    pairs = [(numbers[i], numbers[i + 1]) for i in range(8, 18, 2)]
    return Settings(
        mode=mode,
        kind=kind,
        groups=(student_group, teacher_group),
        constants=tuple(constants.split(",")),
        needs=tuple(map(bool, numbers[:4])),
        rest_as_outcome=bool(numbers[4]),
        skew=numbers[5],
        tail_mass=numbers[6],
        workspace_bytes=int(numbers[7]),
        temperatures=pairs[0],
        scales=pairs[1],
        softcaps=pairs[2],
        vocab_sizes=pairs[3],
        starts=pairs[4],
        outcomes=numbers[18:],
    )


def problem_of(
    inputs: tuple[Tensor, Tensor, Tensor | None, Tensor], tensors: dict[str, Tensor], settings: Settings
) -> Problem:
    """Put together what an operation was given, and check what needs the data of the indices."""
    student_ND, weight_VD, bias_V, teacher_NE = inputs
    heads = [
        Head(
            weight,
            bias,
            settings.softcaps[i] or None,
            settings.scales[i],
            int(settings.vocab_sizes[i]) or None,
            shard_of(settings.groups[i], int(settings.starts[i])),
        )
        for i, (weight, bias) in enumerate(((weight_VD, bias_V), (tensors["weight"], tensors.get("bias"))))
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
    if not settings.outcomes:
        return None
    pairs, *unpaired, repeats, start, stop, teacher_start, teacher_stop = map(int, settings.outcomes)
    return Outcomes(
        student_rows=tensors["student_rows"] if start < 0 else slice(start, stop),
        teacher_rows=tensors["teacher_rows"] if teacher_start < 0 else slice(teacher_start, teacher_stop),
        pairs=pairs,
        student_share_P=tensors.get("student_share"),
        teacher_share_P=tensors.get("teacher_share"),
        unpaired=(unpaired[0], unpaired[1]),
        repeats=bool(repeats),
        whole=settings.rest_as_outcome or settings.kind in WHOLE_KINDS,
    )


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


def prepare(
    kind: str, heads: tuple[Head, Head], settled: dict[str, Any], mode: str, needs: tuple[bool, ...]
) -> tuple[list[Tensor], list[float], str]:
    """Return what an operation takes beside what may need gradients: tensors, numbers and words."""
    student_head, teacher_head = heads
    outcomes = settled["outcomes"]
    indices = {name: settled[name] for name in ("teacher_index", "student_index")}
    whole = settled["rest_as_outcome"] or kind in WHOLE_KINDS
    matches_here = whole or indices["student_index"] is not None
    if outcomes is None and matches_here and not torch.compiler.is_compiling():
        outcomes = match_outcomes(*heads, **indices, whole=whole and indices["teacher_index"] is not None)
    elif outcomes is not None and outcomes.whole is not None and outcomes.whole != whole:
        raise ValueError(
            f"outcomes must be matched with whole={whole} where kind is {kind!r} and rest_as_outcome is "
            f"{settled['rest_as_outcome']}: got whole={outcomes.whole}"
        )
    tensors = {
        "weight": teacher_head.weight_VD,
        "bias": teacher_head.bias_V,
        "row_weight": settled["row_weight_N"],
    }
    stretches = []
    if outcomes is None:
        tensors |= indices
    else:
        tensors |= {"student_share": outcomes.student_share_P, "teacher_share": outcomes.teacher_share_P}
        for name, rows in (("student_rows", outcomes.student_rows), ("teacher_rows", outcomes.teacher_rows)):
            if isinstance(rows, slice):
                stretches += [rows.start, rows.stop]
            else:
                tensors[name] = rows
                stretches += [-1, -1]
    tensors = {name: tensor.detach() for name, tensor in tensors.items() if tensor is not None}
    temperature, shards = settled["temperature"], [shard_words(head) for head in heads]
    settings = Settings(
        mode=mode,
        kind=kind,
        groups=(shards[0][0], shards[1][0]),
        constants=tuple(tensors),
        needs=needs,
        rest_as_outcome=settled["rest_as_outcome"],
        skew=0.5 if kind == "js" else settled["skew"],
        tail_mass=settled["alpha"],
        workspace_bytes=settled["workspace_bytes"],
        temperatures=(temperature, temperature * settled["teacher_temperature"]),
        scales=(student_head.scale, teacher_head.scale),
        softcaps=(student_head.softcap or 0, teacher_head.softcap or 0),
        vocab_sizes=(student_head.vocab_size or 0, teacher_head.vocab_size or 0),
        starts=(shards[0][1], shards[1][1]),
        outcomes=()
        if outcomes is None
        else (outcomes.pairs, *outcomes.unpaired, outcomes.repeats, *stretches),
    )
    return list(tensors.values()), *pack(settings)
