"""The loss of TRL's GOLDTrainer on inputs of ours: `python -m tests.losses.published` freezes what it gives.

Answers behind prompts of other lengths, with tokens cut at random bytes, an EOS of their own, and texts that
are cut off on one side or both. numpy's old generator gives the same numbers in every version.
"""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from tokenkit.losses.options import GoldOptions
from tokenkit.pairing.align import align_batch
from tokenkit.structs import Batch, Chunks, Head, HiddenStates, Side, Tokens

FROZEN = Path(__file__).parent / "gold_trl.json"
VOCAB, TEACHER_VOCAB, WIDTH, TEACHER_WIDTH = 19, 23, 4, 5
SHARED = {"a": (3, 4), "b": (0, 1), "c": (11, 22), "d": (18, 9), "e": (7, 2)}

DEFAULTS = {
    name: getattr(GoldOptions(), name) for name in GoldOptions.__dataclass_fields__
    if name not in ("chunks", "workspace_bytes", "exact")
}  # fmt: skip
HYBRID = {"uld_use_hybrid_loss": True}
FREE = {**HYBRID, "uld_hybrid_matched_weight": 0.9, "uld_hybrid_unmatched_weight": 0.3}
APART = {"uld_student_temperature": 1.5, "uld_teacher_temperature": 0.7}
KEEP_EOS = {"uld_skip_student_eos": False, "uld_skip_teacher_eos": False}
CASES = [
    {**forms, "uld_token_merge_strategy": strategy, **options}
    for forms, strategy, options in itertools.product(
        ({}, {"use_extended_uld": False}),
        ("observed", "bayesian"),
        (
            {},
            HYBRID,
            {**HYBRID, "beta": 0.0},
            {**HYBRID, "beta": 1.0},
            {**FREE, "beta": 0.1},
            {**FREE, "uld_hybrid_unmatched_weight": 0.0, **APART},
            {**APART, **KEEP_EOS},
            {"uld_skip_student_eos": False, "uld_crossentropy_weight": 0.5, "uld_distillation_weight": 2.0},
            {**HYBRID, "uld_skip_teacher_eos": False, "uld_crossentropy_weight": 1.0},
        ),
    )
]


def name_of(case):
    return ",".join(f"{key.removeprefix('uld_')}={value}" for key, value in case.items())


def _side(random, prompt, bytes_, cut, vocab):
    """Return (ids, ends on the shared axis, place of the answer) of one document."""
    ends = []
    for start, stop in ((0, prompt), (prompt, prompt + bytes_)):
        inner = np.flatnonzero(random.rand(stop - start - 1) < 0.55) + start + 1
        ends.append([*inner.tolist(), stop])
    first = len(ends[0])
    flat = [*ends[0], *ends[1], prompt + bytes_ + 1]  # EOS takes a unit of its own
    flat = flat[: len(flat) - cut]
    return random.randint(0, vocab, len(flat)), flat, first


def documents(seed=0, count=5):
    """Return of each document both sides; prompts of the teacher are cut otherwise."""
    random = np.random.RandomState(seed)
    result = []
    for _ in range(count):
        prompt, bytes_ = random.randint(2, 7), random.randint(3, 12)
        cuts = random.choice([0, 0, 1, 2], 2)
        sides = [
            _side(random, prompt, bytes_, int(cut), vocab)
            for cut, vocab in zip(cuts, (VOCAB, TEACHER_VOCAB), strict=True)
        ]
        result.append((prompt, sides))
    return result


def states(seed=0, lengths=(0, 0), count=5):
    """Return random hidden states [count, length, width] and heads of both models, float64."""
    random = np.random.RandomState(seed + 1)
    result = []
    for length, width, vocab in zip(lengths, (WIDTH, TEACHER_WIDTH), (VOCAB, TEACHER_VOCAB), strict=True):
        hidden, weight = (
            torch.tensor(random.randn(*size)) for size in ((count, length, width), (vocab, width))
        )
        result.append(HiddenStates(hidden.requires_grad_(), Head(weight.requires_grad_())))
    return result


def batch_of(given):
    """Return our batch of such documents."""
    sides, tokens = [], []
    for number, vocab in enumerate((VOCAB, TEACHER_VOCAB)):
        rows = [sides_of[number] for _, sides_of in given]
        longest = max(len(ids) for ids, _, _ in rows)
        ids_BL, trained_BL = (
            torch.zeros(len(rows), longest, dtype=torch.int64),
            torch.zeros(len(rows), longest) > 0,
        )
        of_side = []
        for b, (ids, ends, first) in enumerate(rows):
            ids_BL[b, : len(ids)] = torch.tensor(ids)
            trained_BL[b, first : len(ids)] = True
            none = np.zeros(len(ids), bool)
            of_side.append(Tokens(np.array(ids, np.int32), np.array(ends, np.int64), none, ~none))
        tokens.append(of_side)
        length_B = torch.tensor([len(ids) for ids, _, _ in rows])
        sides.append(Side(ids_BL, length_B, trained_BL, torch.zeros(vocab, dtype=torch.bool)))
    alignment = align_batch(*tokens)
    chunks = []
    for side, flat in zip(sides, (alignment.student_N, alignment.teacher_M), strict=True):
        chunk_BL = torch.full(side.ids_BT.shape, -1, dtype=torch.int32)
        start = 0
        for b, length in enumerate(side.length_B.tolist()):
            own = torch.tensor(flat[start : start + length])
            chunk_BL[b, :length] = torch.where(own < 0, own, own - int(alignment.offset_B[b]))
            start += length
        chunks.append(chunk_BL)
    return Batch(*sides, {"unconstrained": Chunks(*chunks)})


def pair_ids():
    """Return int64 student and teacher ids of the strings that both vocabularies have, in TRL's order."""
    return tuple(torch.tensor(x) for x in zip(*SHARED.values(), strict=True))


def published(given, batch, student, teacher, case):
    """Return what TRL's loss gives, differentiable."""
    from trl.experimental.gold.gold_trainer import ULDLoss

    vocabularies = []
    for number, size in enumerate((VOCAB, TEACHER_VOCAB)):
        words = {pair[number]: word for word, pair in SHARED.items()}
        words = {words.get(i, f"{number}:{i}"): i for i in range(size)}
        vocabularies.append(SimpleNamespace(get_vocab=lambda words=words: words))
    loss = ULDLoss(SimpleNamespace(**{**DEFAULTS, **case}), *vocabularies)
    labels, offsets = [], []
    for number, side in enumerate((batch.student, batch.teacher)):
        labels.append(side.ids_BT.where(side.trained_BT, -100))
        offset_BL2 = torch.zeros((*side.ids_BT.shape, 2), dtype=torch.int64)
        for b, (prompt, sides_of) in enumerate(given):
            _, ends, first = sides_of[number]
            for i in range(first, len(ends)):
                offset_BL2[b, i] = torch.tensor([ends[i - 1] - prompt, ends[i] - prompt])
        offsets.append(offset_BL2)
    logits = [x.hidden_BTD @ x.head.weight_VD.T for x in (student, teacher)]
    return loss(*logits, *labels, batch.student.ids_BT, batch.teacher.ids_BT, *offsets)


def summary(loss, student):
    """Return the value and products of the gradients with fixed directions."""
    loss.sum().backward()
    random = np.random.RandomState(7)
    result = [float(loss.detach().sum())]
    for gradient in (student.hidden_BTD.grad, student.head.weight_VD.grad):
        directions = torch.tensor(random.randn(3, gradient.numel()))
        result += [float(gradient.norm()), *(directions @ gradient.flatten()).tolist()]
    return result


def inputs(seed=0, count=5):
    """Return (documents, batch, student, teacher)."""
    given = documents(seed, count)
    batch = batch_of(given)
    lengths = (batch.student.ids_BT.shape[1], batch.teacher.ids_BT.shape[1])
    return given, batch, *states(seed, lengths, len(given))


def main():
    """Write the frozen values."""
    import trl

    values = {}
    for case in CASES:
        given, batch, student, teacher = inputs()
        values[name_of(case)] = summary(published(given, batch, student, teacher, case), student)
    FROZEN.write_text(json.dumps({"trl": trl.__version__, "values": values}, indent=1) + "\n")


if __name__ == "__main__":
    main()
