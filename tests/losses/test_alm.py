"""ALM against a definition written out in loops, and what must be true of it.

Faults tried, each caught here or by the reference values: the mass read one position too early; `a` of the
first member of a joined chunk; merging decided by the student; Z counted before merging; padding or
unscored tokens counted; the teacher's rows used for the student; weights of invalid chunks; row-major
targets shifted by one; sizes summed instead of kept apart.
"""

import dataclasses

import pytest
import torch

from tests.losses.example import make_batch, make_states
from tokenkit.kernels.reference import chunk_likelihood as reference
from tokenkit.kernels.reference.alm_difference import alm_difference
from tokenkit.kernels.reference.linear_logprob import logits
from tokenkit.losses import alm as module
from tokenkit.losses import alm_loss, logprobs
from tokenkit.losses.options import AlmOptions
from tokenkit.structs import Chunks, Head, HiddenStates

MODES = ["none", "append_space", "merge_by_space_prob", "merge_by_space_prob+append_space"]
MODES += [mode + "+eos_as_space" for mode in MODES[1:]]


def definition(student, teacher, batch, options):
    """Return [(Σ w d, Z)] by chunk size, one chunk after the other, differentiable."""
    terms = {size: [0.0, 0] for size in options.chunk_sizes}
    for row in range(len(batch.student.ids_BT)):
        logp, mass = zip(
            *(token_scores(states, side, row, options) for states, side in
              ((student, batch.student), (teacher, batch.teacher))),
            strict=True,
        )  # fmt: skip
        chunks = batch.chunks[options.chunks]
        scored = [
            [bool(x.trained_BT[row, i]) and 0 < i < x.length_B[row] for i in range(x.ids_BT.shape[1])]
            for x in (batch.student, batch.teacher)
        ]
        ids = chunks.student_BT[row].tolist(), chunks.teacher_BS[row].tolist()
        found = reference.lay_out(*ids, *scored, slots=sum(map(len, ids)))
        if "merge_by_space_prob" in options.mode:
            closes = [
                bool(c.teacher and mass[1][c.teacher[-1]].exp() > options.space_threshold) for c in found
            ]
            found = reference.join(found, closes)
        for size in options.chunk_sizes:
            for chunk in reference.group(found, size):
                if not chunk.valid:
                    continue
                s, t = (
                    x[list(tokens)].sum().clamp_max(0)
                    + (a[tokens[-1]] if "append_space" in options.mode else 0)
                    for x, a, tokens in zip(logp, mass, chunk[:2], strict=True)
                )
                n = len(chunk.teacher)
                weight = {
                    "chunk_count": 1,
                    "token_count": n,
                    "log1p_token_count": torch.log1p(torch.tensor(n).double()),
                }
                d = alm_difference(
                    t, s, options.diff, temperature=options.binarization_temp, renyi_alpha=options.renyi_alpha
                )
                terms[size][0] = terms[size][0] + weight[options.numerator] * d
                terms[size][1] += n if options.denominator == "token_count" else 1
    return list(terms.values())


def token_scores(states, side, row, options):
    logp_TV = logits(states.hidden_BTD[row], states.head).log_softmax(-1)
    following = side.ids_BT[row, 1:]
    logp = torch.nn.functional.pad(logp_TV[:-1].gather(1, following[:, None])[:, 0], (1, 0))
    space = torch.arange(logp_TV.shape[1]) == side.eos_id if "eos" in options.mode else side.space_V
    return logp, logp_TV[:, space].logsumexp(1)


def both(options, batch=None):
    """Return (loss, gradients) of the library and of the definition."""
    batch = batch or make_batch()
    results = []
    for function in ("library", "definition"):
        student, teacher = make_states(batch)
        if function == "library":
            kwargs = {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}
            term = alm_loss(student, teacher, batch, **kwargs)
            loss = (term.total / term.count).mean()
        else:
            terms = definition(student, teacher, batch, options)
            loss = sum(total / count for total, count in terms) / len(terms)
        loss.backward()
        assert function == "definition" or teacher.hidden_BTD.grad is None
        results.append((loss.detach(), student.hidden_BTD.grad, student.head.weight_VD.grad))
    return results


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"diff": "abs", "numerator": "token_count", "denominator": "token_count"},
        {"diff": "joschu_k2", "numerator": "log1p_token_count", "chunk_sizes": (1, 2, 3)},
        {"binarization_temp": 2.0, "space_threshold": 0.4},
    ],
    ids=["default", "token counts", "sizes", "cold"],
)
def test_matches_the_definition(mode, options):
    library, definition = both(AlmOptions(mode=mode, **options))
    for value, truth in zip(library, definition, strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-9, atol=1e-12)


def test_equal_models_sit_at_the_minimum():
    batch = make_batch()
    batch = dataclasses.replace(
        batch, teacher=batch.student,
        chunks={"unconstrained": Chunks(*[batch.chunks["unconstrained"].student_BT] * 2)},
    )  # fmt: skip
    student, _ = make_states(batch)
    teacher = HiddenStates(student.hidden_BTD.detach(), Head(student.head.weight_VD.detach()))
    term = alm_loss(student, teacher, batch)
    term.total.backward()
    torch.testing.assert_close(student.hidden_BTD.grad, torch.zeros(2, 8, 6).double(), atol=1e-12, rtol=0)


def test_a_batch_without_a_valid_chunk_is_zero_and_pulls_nothing():
    batch = make_batch(trained=torch.zeros(2, 8, dtype=torch.bool))
    student, teacher = make_states(batch)
    term = alm_loss(student, teacher, batch)
    (term.total / term.count).backward()
    assert term.total == 0
    assert term.count == 1
    assert not student.hidden_BTD.grad.any()
    assert not student.head.weight_VD.grad.any()
    assert module.Alm(AlmOptions()).prepare(teacher, batch).count == 0


def test_ignored_tokens_pull_nothing():
    trained = torch.ones(2, 8, dtype=torch.bool)
    trained[0, 3:] = False
    batch = make_batch(trained=trained)
    student, teacher = make_states(batch)
    alm_loss(student, teacher, batch, mode="append_space").total.backward()
    assert student.hidden_BTD.grad[0, :3].any()
    assert not student.hidden_BTD.grad[
        0, 3:
    ].any()  # position 2 predicts whitespace after the last valid chunk


def test_more_padding_and_another_row_order_change_nothing():
    batch = make_batch()
    student, teacher = make_states(batch)
    before = alm_loss(student, teacher, batch)
    pad = torch.nn.functional.pad
    padded = dataclasses.replace(
        batch,
        student=dataclasses.replace(
            batch.student, ids_BT=pad(batch.student.ids_BT, (0, 3)).flip(0),
            length_B=batch.student.length_B.flip(0), trained_BT=pad(batch.student.trained_BT, (0, 3)).flip(0),
        ),
        teacher=dataclasses.replace(
            batch.teacher, ids_BT=batch.teacher.ids_BT.flip(0), length_B=batch.teacher.length_B.flip(0),
            trained_BT=batch.teacher.trained_BT.flip(0),
        ),
        chunks={
            "unconstrained": Chunks(
                pad(batch.chunks["unconstrained"].student_BT, (0, 3), value=-1).flip(0),
                batch.chunks["unconstrained"].teacher_BS.flip(0),
            )
        },
    )  # fmt: skip
    student = HiddenStates(pad(student.hidden_BTD, (0, 0, 0, 3)).flip(0), student.head)
    teacher = HiddenStates(teacher.hidden_BTD.flip(0), teacher.head)
    after = alm_loss(student, teacher, padded)
    assert before.count == after.count
    torch.testing.assert_close(before.total, after.total)


def test_only_needed_rows_reach_the_head(monkeypatch):
    rows = []
    original = logprobs.score
    monkeypatch.setattr(
        logprobs,
        "score",
        lambda states, r, *rest: (rows.append(len(r.row_N)), original(states, r, *rest))[1],
    )
    batch = make_batch()
    student, teacher = make_states(batch)
    alm_loss(student, teacher, batch, mode="none")
    # valid chunks: row 0 has 1 to 5 (7 student tokens, 7 of the teacher), row 1 has 1, 2 and 4 (4 and 4)
    assert rows == [11, 11]


def test_the_trainers_halves_equal_the_drop_in_form():
    batch, loss = make_batch(), module.Alm(AlmOptions(chunks="space"))
    student, teacher = make_states(batch)
    prepared = loss.prepare(teacher, batch)
    term = loss.loss(student, prepared, batch)
    whole = alm_loss(student, teacher, batch, chunks="space")
    assert term.count == prepared.count == whole.count
    assert torch.equal(term.total, whole.total)
    assert not any(t.requires_grad for sized in prepared.sizes for t in (sized.teacher_BC, sized.weight_BC))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_total_is_float32_and_a_head_of_another_type_is_cast(dtype):
    batch = make_batch()
    student, teacher = make_states(batch, dtype=dtype, head_dtype=torch.float32)
    term = alm_loss(student, teacher, batch)
    term.total.backward()
    assert term.total.dtype == torch.float32
    assert student.head.weight_VD.grad.dtype == torch.float32
    assert student.hidden_BTD.grad.dtype == dtype


def test_under_autocast_nothing_is_rounded():
    batch = make_batch()
    gradients = []
    for enabled in (False, True):
        student, teacher = make_states(batch, dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            alm_loss(student, teacher, batch).total.backward()
        gradients.append((student.hidden_BTD.grad, student.head.weight_VD.grad))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"mode": "append_spaces"},
            "mode: 'append_spaces' is unknown, did you mean append_space",
        ),
        ({"diff": "kl"}, "unknown diff 'kl'"),
        ({"numerator": "tokens"}, "expected one of chunk_count, token_count, log1p_token_count"),
        ({"denominator": "log1p_token_count"}, "unknown denominator"),
        ({"chunk_sizes": (0,)}, "at least 1"),
        ({"chunks": "unbiased"}, r"no 'unbiased' chunks, only \['space', 'unconstrained'\]"),
    ],
)
def test_unknown_options_are_named(options, message):
    batch = make_batch()
    del batch.chunks["unbiased"]
    with pytest.raises(ValueError, match=message):
        alm_loss(*make_states(batch), batch, **options)


def test_missing_masks_and_mixed_up_sides_are_named():
    batch = make_batch()
    student, teacher = make_states(batch)
    bare = dataclasses.replace(batch, teacher=dataclasses.replace(batch.teacher, space_V=None, eos_id=None))
    with pytest.raises(ValueError, match=r"needs Side\.space_V"):
        alm_loss(student, teacher, bare)
    with pytest.raises(ValueError, match=r"needs Side\.eos_id"):
        alm_loss(student, teacher, bare, mode="append_space+eos_as_space")
    with pytest.raises(ValueError, match="swapped"):
        alm_loss(teacher, student, batch)
    with pytest.raises(ValueError, match="got none"):
        module.Alm(AlmOptions()).prepare(None, batch)


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("mode", ["append_space", "merge_by_space_prob"])
def test_a_tokenizer_without_whitespace_is_named(side, mode):
    batch = make_batch()
    student, teacher = make_states(batch)
    bare = dataclasses.replace(getattr(batch, side), space_V=torch.zeros_like(getattr(batch, side).space_V))
    batch = dataclasses.replace(batch, **{side: bare})
    if (side, mode) == ("student", "merge_by_space_prob"):  # asks the teacher alone
        assert alm_loss(student, teacher, batch, mode=mode).total.isfinite()
        return
    with pytest.raises(ValueError, match=f"alm_mode {mode} asks for the mass of whitespace"):
        alm_loss(student, teacher, batch, mode=mode)
