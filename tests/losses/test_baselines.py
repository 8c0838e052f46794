"""ULD, MinED, the side path, GOLD and X-Token against definitions written out on full logits.

Faults tried, each caught here or by the reference values: positions past the teacher's row compared; the
divergence at the token instead of the row that predicts it; one-to-one tokens counted twice; cross entropy at
temperature 1; the rest of the vocabulary left out of `kl`; `log_abs` summed instead of averaged; the
unmatched part not weighted by the teacher's mass; ids in pairs left in the unmatched part; probabilities
carried to the teacher without renormalising.
"""

import dataclasses

import pytest
import torch

from tests.losses.example import (
    NEAREST,
    STUDENT_PAIR_IDS,
    TEACHER_PAIR_IDS,
    make,
    make_batch,
    make_states,
    run_loss,
)
from tokenkit.kernels.reference.linear_divergence import divergence
from tokenkit.kernels.reference.linear_logprob import logits
from tokenkit.losses import gold_js_loss, mined_loss, side_path_loss, uld_loss, xtoken_loss
from tokenkit.losses.score import chunk_ends, chunk_starts, scored_tokens
from tokenkit.losses.side_path import DISTANCES

UNMATCHED_S = [i for i in range(40) if i not in STUDENT_PAIR_IDS.tolist()]
UNMATCHED_T = [i for i in range(50) if i not in TEACHER_PAIR_IDS.tolist()]


def full(states, temperature=1.0):
    return logits(states.hidden_BTD.flatten(0, 1), states.head, temperature)


def sorted_gap(p, q):
    p, q = p.sort(descending=True).values, q.sort(descending=True).values
    return (torch.nn.functional.pad(p, (0, max(0, len(q) - len(p)))) - q).abs().sum()


def uld_by_hand(student, teacher, batch, temperature=1.0):
    p, q = full(student, temperature).softmax(-1), full(teacher, temperature).softmax(-1).detach()
    found = []
    for b in range(len(batch.student.ids_BT)):
        answers = [stretches(side.trained_BT[b], chunks[b]) for side, chunks in both_sides(batch)]
        for own, other in zip(*answers, strict=False):
            found += [(b, i - 1, j - 1) for i, j in zip(own, other, strict=False) if i > 0 and j > 0]
            if own[0] == other[0] == 0 and len(answers[1]) == 1 and len(own) > len(other):
                found.append((b, own[len(other)] - 1, other[-1]))  # a text without prompt: the last row too
    T, S = batch.student.ids_BT.shape[1], batch.teacher.ids_BT.shape[1]
    return sum(sorted_gap(p[b * T + i], q[b * S + j]) for b, i, j in found), len(found)


def both_sides(batch):
    chunks = batch.chunks["unconstrained"]
    return (batch.student, chunks.student_BT), (batch.teacher, chunks.teacher_BS)


def stretches(trained, chunks):
    """Return the positions of each stretch of trained tokens; a start that has no partner is none."""
    positions = [
        i for i in range(len(trained)) if trained[i] and any(chunk >= 0 for chunk in chunks[: i + 1])
    ]
    result = []
    for i in positions:
        if not result or result[-1][-1] != i - 1:
            result.append([])
        result[-1].append(i)
    return result


def published_divergence(q, p, kind, skew):
    """D(q, p) of the papers, of distributions with zeros; rkl and akl: KL(q ‖ p) where q is one-hot."""
    if kind in ("rkl", "akl") and q.max() == 1:
        kind = "kl"

    def kl(a, b):
        return (torch.special.xlogy(a, a) - torch.special.xlogy(a, b)).sum()

    if kind == "akl":
        order = q.argsort(descending=True)
        head = (q[order].cumsum(0) - q[order]) < 0.5
        gaps = (q - p).abs()[order].detach()
        share = gaps[head].sum() / gaps.sum()
        return share * kl(q, p) + (1 - share) * kl(p, q)
    return {
        "kl": lambda: kl(q, p),
        "rkl": lambda: kl(p, q),
        "skl": lambda: kl(q, skew * q + (1 - skew) * p),
        "srkl": lambda: kl(p, skew * p + (1 - skew) * q),
        "js": lambda: (kl(q, (p + q) / 2) + kl(p, (p + q) / 2)) / 2,
    }[kind]()


def mined_by_hand(student, teacher, batch, temperature=1.0, teacher_temperature=1.0, kind="kl", skew=0.1):
    log_p = full(student, temperature).log_softmax(-1)
    z_t = full(teacher, temperature * teacher_temperature).detach()
    log_q = z_t[:, NEAREST].log_softmax(-1)
    rows = chunk_starts(batch, "unconstrained", one_to_one=True)
    faces = zip(log_q[rows.teacher_N].exp(), log_p[rows.student_N].exp(), strict=True)
    total = sum(published_divergence(q, p, kind, skew) for q, p in faces)
    chunks = batch.chunks["unconstrained"]
    count = len(rows.student_N)
    for b in range(2):
        for i in range(1, 8):
            in_both = chunks.student_BT[b, i] in chunks.teacher_BS[b] and chunks.student_BT[b, i] >= 0
            if scored_tokens(batch.student)[b, i] and in_both and b * 8 + i - 1 not in rows.student_N:
                p = log_p[b * 8 + i - 1].exp()
                one_hot = torch.nn.functional.one_hot(batch.student.ids_BT[b, i], len(p)).to(p.dtype)
                total = total + published_divergence(one_hot, p, kind, skew)
                count += 1
    return total, count


def side_path_by_hand(student, teacher, batch, distance_fn="kl_subset"):
    rows = chunk_ends(batch, "unconstrained")
    p, q = full(student)[rows.student_N].softmax(-1), full(teacher)[rows.teacher_N].softmax(-1).detach()
    ps, qs = p[:, STUDENT_PAIR_IDS], q[:, TEACHER_PAIR_IDS]
    if distance_fn == "abs":
        return (ps - qs).abs().sum(), len(p)
    if distance_fn == "log_abs":
        return (ps.log() - qs.log()).abs().mean(1).sum(), len(p)
    if distance_fn.endswith("_subset"):
        ps, qs = ps / ps.sum(1, keepdim=True), qs / qs.sum(1, keepdim=True)
    else:
        ps = torch.cat([ps, p[:, UNMATCHED_S].sum(1, keepdim=True)], 1)
        qs = torch.cat([qs, q[:, UNMATCHED_T].sum(1, keepdim=True)], 1)
    kind = "rkl" if distance_fn.startswith("reverse") else "kl"
    return divergence(ps.log(), qs.log(), kind).sum(), len(p)


def gold_js_by_hand(student, teacher, batch, matched_weight=4 / 50, temperature=1.0):
    rows = chunk_starts(batch, "unconstrained")
    p = full(student, temperature)[rows.student_N].softmax(-1)
    q = full(teacher, temperature)[rows.teacher_N].softmax(-1).detach()
    total = 0.0
    for p_V, q_W in zip(p, q, strict=True):
        ps = torch.cat([p_V[STUDENT_PAIR_IDS], p_V[UNMATCHED_S].sum()[None]])
        qs = torch.cat([q_W[TEACHER_PAIR_IDS], q_W[UNMATCHED_T].sum()[None]])
        matched = divergence(ps.log()[None], qs.log()[None], "js")[0]
        a, b = p_V[UNMATCHED_S], q_W[UNMATCHED_T]
        unmatched = b.sum() * sorted_gap(a / a.sum(), b / b.sum())
        total = total + matched_weight * matched + (1 - matched_weight) * unmatched
    return total, len(p)


def xtoken_by_hand(student, teacher, batch, temperature=1.0, teacher_temperature=1.0):
    rows = chunk_starts(batch, "unconstrained")
    carry_WV = make("baseline_xtoken").projection.dense().double()
    reached = carry_WV.sum(1) > 0
    r = (full(student, temperature)[rows.student_N].softmax(-1) @ carry_WV.T)[:, reached]
    z_t = full(teacher, temperature * teacher_temperature)[rows.teacher_N].detach()[:, reached]
    return divergence((r / r.sum(1, keepdim=True)).log(), z_t.log_softmax(-1), "kl").sum(), len(r)


CASES = [
    ("baseline_uld", uld_by_hand, {"exact": True}, {}),
    ("baseline_uld", uld_by_hand, {"exact": True, "temperature": 2.0}, {"temperature": 2.0}),
    ("baseline_mined", mined_by_hand, {}, {}),
    ("baseline_mined", mined_by_hand, *[{"temperature": 2.0, "teacher_temperature": 0.5}] * 2),
    *[
        (
            "baseline_mined",
            mined_by_hand,
            {"divergence": kind, "skew": skew},
            {"kind": kind, "skew": skew},
        )
        for kind, skew in (
            ("rkl", 0.1),
            ("skl", 0.1),
            ("skl", 0.0),
            ("srkl", 0.3),
            ("srkl", 1.0),
            ("js", 0.1),
            ("akl", 0.1),
        )
    ],
    *[("alm_side_path", side_path_by_hand, *[{"distance_fn": name}] * 2) for name in DISTANCES],
    ("baseline_gold_js", gold_js_by_hand, {"exact": True}, {}),
    (
        "baseline_gold_js",
        gold_js_by_hand,
        {"exact": True, "matched_weight": 0.5, "temperature": 2.0},
        {"matched_weight": 0.5, "temperature": 2.0},
    ),
    ("baseline_xtoken", xtoken_by_hand, {}, {}),
    ("baseline_xtoken", xtoken_by_hand, *[{"temperature": 2.0, "teacher_temperature": 0.5}] * 2),
]


@pytest.mark.parametrize(("name", "by_hand", "options", "hand_options"), CASES)
def test_matches_the_definition(name, by_hand, options, hand_options):
    trained = torch.ones(2, 8, dtype=torch.bool)
    trained[0, 6] = False
    batch = make_batch(trained=trained)
    results = []
    for written_out in (False, True):
        student, teacher = make_states(batch)
        if written_out:
            total, count = by_hand(student, teacher, batch, **hand_options)
        else:
            (total, count), _ = run_loss(name, batch, student, teacher, **options)
        total.backward()
        results.append((int(count), total.detach(), student.hidden_BTD.grad, student.head.weight_VD.grad))
    assert results[0][0] == results[1][0] > 4
    for value, truth in zip(results[0][1:], results[1][1:], strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-9, atol=1e-11)


def test_uld_without_sorting_is_within_its_bound():
    batch = make_batch()
    student, teacher = make_states(batch)
    exact, fast = (float(uld_loss(student, teacher, batch, exact=x).total.detach()) for x in (True, False))
    assert abs(exact - fast) < 1e-3 * exact


@pytest.mark.parametrize("name", ["baseline_uld", "baseline_mined", "alm_side_path", "baseline_gold_js"])
def test_equal_models_sit_at_the_minimum(name):
    batch = make_batch()
    chunks = {"unconstrained": dataclasses.replace(batch.chunks["unconstrained"])}
    chunks["unconstrained"] = type(chunks["unconstrained"])(*[chunks["unconstrained"].student_BT] * 2)
    batch = dataclasses.replace(batch, teacher=batch.student, chunks=chunks)
    student, _ = make_states(batch)
    same = torch.arange(40)
    changes = {
        "baseline_uld": {},
        "baseline_mined": {"teacher_index": same},
        "alm_side_path": {"student_index": same[:20], "teacher_index": same[:20], "distance_fn": "kl"},
        "baseline_gold_js": {"student_index": same[:20], "teacher_index": same[:20]},
    }[name]
    teacher = dataclasses.replace(student, hidden_BTD=student.hidden_BTD.detach())
    functions = {
        "baseline_uld": uld_loss,
        "baseline_mined": mined_loss,
        "alm_side_path": side_path_loss,
        "baseline_gold_js": gold_js_loss,
    }
    batch = dataclasses.replace(batch, student=one_to_one(batch.student), teacher=one_to_one(batch.student))
    term = functions[name](student, teacher, batch, **changes)
    term.total.backward()
    assert abs(float(term.total.detach())) < 1e-9
    assert student.hidden_BTD.grad.abs().max() < 1e-6


def one_to_one(side):
    """Leave out of the loss the tokens of chunks with several: MinED has them learn the text instead."""
    trained = side.trained_BT.clone()
    trained[0, [1, 2, 5, 6]] = trained[1, [3, 4]] = False
    return dataclasses.replace(side, trained_BT=trained)


def test_the_drop_in_forms_run_both_halves():
    batch = make_batch()
    student, teacher = make_states(batch)
    pairs = (STUDENT_PAIR_IDS, TEACHER_PAIR_IDS)
    projection = make("baseline_xtoken").projection
    for name, term in {
        "baseline_mined": mined_loss(student, teacher, batch, NEAREST),
        "alm_side_path": side_path_loss(student, teacher, batch, *pairs),
        "baseline_gold_js": gold_js_loss(student, teacher, batch, *pairs),
        "baseline_xtoken": xtoken_loss(student, teacher, batch, projection),
    }.items():
        (total, count), _ = run_loss(name, batch, student, teacher)
        assert torch.equal(term.total, total)
        assert term.count == count


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("baseline_uld", {"temperature": 0}, "temperature must be positive, got 0"),
        ("baseline_mined", {"teacher_temperature": -1}, "teacher_temperature must be positive, got -1"),
        ("baseline_mined", {"teacher_index": torch.ones(40)}, "one int64 teacher id for each student id"),
        ("alm_side_path", {"distance_fn": "js"}, "unknown distance_fn 'js': expected one of kl, reverse_kl"),
        (
            "baseline_gold_js",
            {"student_index": torch.tensor([1, 1, 2, 3])},
            "student_index names an id twice",
        ),
        ("baseline_gold_js", {"matched_weight": 2}, r"matched_weight must lie in \[0, 1\], got 2"),
        ("baseline_xtoken", {"temperature": -1}, "temperature must be positive"),
        ("baseline_mined", {"divergence": "kk"}, "unknown divergence 'kk': expected one of kl, rkl"),
        ("baseline_mined", {"skew": 1.5}, r"skew must lie in \[0, 1\], got 1.5"),
        ("baseline_dskd", {"divergence": "kk"}, "unknown divergence 'kk': expected one of kl, rkl"),
        ("baseline_dskd", {"skew": 1.5}, r"skew must lie in \[0, 1\], got 1.5"),
        ("alm_latents", {"align": "logits"}, "unknown align 'logits'"),
        ("alm_latents", {"normalization": "l3"}, "unknown normalization 'l3'"),
    ],
)
def test_options_out_of_range_are_named(name, changes, message):
    with pytest.raises(ValueError, match=message):
        make(name, **changes)
