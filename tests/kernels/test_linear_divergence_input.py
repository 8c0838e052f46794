"""What linear_divergence refuses, and which mode it chooses."""

import math

import pytest
import torch

from tests.kernels.divergence_cases import NAMES as GRADIENTS
from tests.kernels.divergence_cases import index_set, make, run
from tokenkit.kernels.head.call import pack, unpack
from tokenkit.kernels.linear_divergence import linear_divergence, match_outcomes, settings
from tokenkit.structs import Head

HEAD = Head(torch.zeros(5, 8))
BAD = {
    "kind": ({"kind": "KL"}, "kind must be one of kl, rkl.*'KL'"),
    "temperature": ({"temperature": 0.0}, "temperature must be positive.*0.0"),
    "teacher temperature": ({"teacher_temperature": -1.0}, "teacher_temperature must be positive.*-1.0"),
    "skew": ({"skew": 1.5}, r"skew must be in \[0, 1\]: got 1.5"),
    "alpha": ({"alpha": -0.1}, r"alpha must be in \[0, 1\]: got -0.1"),
    "akl without a head": ({"kind": "akl", "alpha": 1.0}, "alpha must be below 1 for akl.*use rkl"),
    "map outside": ({"teacher_index": torch.tensor([0, 1, 2, 3, 5])}, r"ids in \[0, 5\): got 0 to 5"),
    "map length": ({"teacher_index": torch.tensor([0, 1])}, r"one id per student id \(5\): got shape \(2,\)"),
    "empty map": ({"teacher_index": torch.zeros(0, dtype=torch.long)}, "at least one"),
    "map dtype": ({"teacher_index": torch.zeros(5)}, "int64 ids.*float32"),
    "student outside": (
        {"student_index": torch.tensor([-1]), "teacher_index": torch.tensor([0])},
        r"student_index must hold ids in \[0, 5\): got -1",
    ),
    "pair lengths": (
        {"student_index": torch.tensor([0, 1]), "teacher_index": torch.tensor([0])},
        r"one id per pair, as student_index does \(2\)",
    ),
    "no teacher index": ({"student_index": torch.tensor([0])}, "teacher_index must be given"),
    "rest without pairs": ({"rest_as_outcome": True}, "rest_as_outcome needs pairs"),
    "rest of one model": (
        {"student_index": torch.arange(5), "teacher_index": torch.arange(5) * 0, "rest_as_outcome": True},
        "every id of the student is in a pair but 4 ids of the teacher are not, so kl is infinite",
    ),
    "other vocabulary": ({"teacher_head": Head(torch.zeros(6, 8))}, "same vocab_size.*got 5 and 6"),
    "shapes": ({"student_head": Head(torch.zeros(5, 9))}, r"\(4, 8\) and \(5, 9\)"),
    "rows": ({"teacher": torch.zeros(3, 8)}, r"rows of student_ND \(4\): got 3"),
    "dtype": ({"student_head": Head(torch.zeros(5, 8).half())}, "cast the head once"),
    "float64": (
        {"teacher": torch.zeros(4, 8).double(), "teacher_head": Head(torch.zeros(5, 8).double())},
        "both models in float64",
    ),
    "device": ({"student_head": Head(torch.zeros(5, 8, device="meta"))}, "cpu but .*weight_VD on meta"),
    "trained teacher": ({"teacher_head": Head(torch.zeros(5, 8, requires_grad=True))}, "must be frozen"),
    "row weights": ({"row_weight_N": torch.ones(3)}, r"row of student_ND \(4\), on cpu: got shape \(3,\)"),
    "row weights elsewhere": ({"row_weight_N": torch.ones(4, device="meta")}, "on cpu: got .* on meta"),
    "trained row weights": ({"row_weight_N": torch.ones(4, requires_grad=True)}, "detach it"),
    "not finite": ({"student": torch.full((4, 8), torch.nan)}, "student_ND .* row 0 it holds NaN"),
    "infinite head": ({"student_head": Head(torch.ones(5, 8) * torch.inf)}, "row 0 its log-sum"),
    "infinity under a softcap": (
        {"student": torch.full((4, 8), torch.inf), "student_head": Head(torch.ones(5, 8), softcap=3.0)},
        "student_ND and its head .* row 0",
    ),
    "softcap": ({"teacher_head": Head(torch.zeros(5, 8), softcap=0.0)}, "teacher_head.softcap must be pos"),
    "scale": ({"student_head": Head(torch.zeros(5, 8), scale=math.nan)}, "student_head.scale must be finite"),
    "bias dtype": ({"student_head": Head(torch.zeros(5, 8), torch.zeros(5).half())}, "bias_V is .*float16"),
    "whole numbers": (
        {"student": torch.zeros(4, 8).long(), "student_head": Head(torch.zeros(5, 8).long())}, "floating",
    ),
    "workspace": ({"workspace_bytes": -1}, "workspace_bytes must be at least 0: got -1"),
    "skew 1, other vocabulary": (
        {"kind": "skl", "skew": 1.0, "teacher_head": Head(torch.zeros(6, 8))}, "same vocab_size.*got 5 and 6",
    ),
    "skew 1, infinity": ({"kind": "srkl", "skew": 1.0, "student": torch.full((4, 8), torch.inf)}, "finite"),
    "infinite teacher": (
        {"teacher": torch.tensor([[0.0], [0.0], [torch.inf], [0.0]]).expand(4, 8)}, "teacher_NE .*row 2 it",
    ),
    "vocabulary": ({"student_head": Head(torch.zeros(5, 8), vocab_size=6)}, r"vocab_size .*\[1, 5\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    change, words = BAD[name]
    given_ = {
        "student": torch.zeros(4, 8), "student_head": HEAD, "teacher": torch.zeros(4, 8), "teacher_head": HEAD
    } | change  # fmt: skip
    positional = [given_.pop(key) for key in ("student", "student_head", "teacher", "teacher_head")]
    with pytest.raises(ValueError, match=words):
        linear_divergence(*positional, given_.pop("kind", "kl"), **given_)


def test_an_unknown_argument_is_named():
    with pytest.raises(TypeError, match="no argument 'temprature'"):
        linear_divergence(torch.zeros(4, 8), HEAD, torch.zeros(4, 8), HEAD, temprature=2.0)


def test_skew_of_0_and_1_are_the_limits():
    inputs = make(3, 20, 20)
    for kind, limit in (("skl", "kl"), ("srkl", "rkl")):
        found = [
            run(linear_divergence, torch.float32, inputs, which, sizes=(20, 20), skew=skew)
            for which, skew in ((kind, 0.0), (limit, 0.5), (kind, 1.0))
        ]
        assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
        assert not found[2]["value"].any()
        assert all(found[2][name] is not None and not found[2][name].any() for name in GRADIENTS)


def test_settings_survive_their_journey():
    settled = dict(settings.DEFAULTS) | {"teacher_index": torch.arange(5), "skew": 0.3}
    head = Head(HEAD.weight_VD, softcap=2.0, vocab_size=5)
    tensors, numbers, words = settings.prepare("abs", (HEAD, head), settled, "rows", "xb")
    call = unpack(tensors, numbers, words)
    assert pack(**call)[1:] == (numbers, words)
    assert call["teacher_head"]["weight_VD"] is tensors[0]
    assert call["outcomes"].keys() >= {"student_rows", "teacher_rows"}
    assert len(tensors) == 3
    assert [call[f"{side}_head"].get("softcap") for side in ("student", "teacher")] == [None, 2]
    assert [call[f"{side}_head"].get("vocab_size") for side in ("student", "teacher")] == [None, 5]
    assert (call["mode"], call["needs"], call["skew"]) == ("rows", "xb", 0.3)


def test_modes_are_chosen_by_gradients_weights_and_budget():
    student, weight, teacher = torch.ones(4, 8), torch.ones(20, 8), torch.ones(4, 8)
    low = student.bfloat16(), weight.bfloat16()
    budget = {"row_weight_N": None, "workspace_bytes": 1 << 30}
    weights = budget | {"row_weight_N": torch.ones(4)}
    cases = [
        ((student, weight), "", weights, "value"),
        ((student, weight), "xt", weights, "rows"),
        ((student, weight), "xw", budget, "recompute"),
        ((student, weight), "xw", weights, "weighted"),
        (low, "xw", weights | {"workspace_bytes": 640}, "weighted"),
        (low, "xw", weights | {"workspace_bytes": 639}, "recompute"),
    ]
    for inputs, needs, settled, mode in cases:
        assert settings.mode_of((*inputs, None, teacher), 20, needs, settled) == mode


def test_outcomes_may_be_matched_beforehand():
    inputs = make(4, 30, 35, bias=False)
    student, weight, _, teacher, teacher_weight, _, _ = inputs
    heads = Head(weight, vocab_size=30), Head(teacher_weight, vocab_size=35)
    for name, whole in (("map", False), ("pairs", False), ("rest", True)):
        index = index_set(name, 30, 35)
        rest = {"rest_as_outcome": index.pop("rest_as_outcome", False)}
        outcomes = match_outcomes(*heads, **index, whole=whole)
        values = [
            linear_divergence(student, heads[0], teacher, heads[1], **rest, **which)
            for which in (index, {"outcomes": outcomes})
        ]
        assert torch.equal(*values)


@pytest.mark.parametrize(
    ("kind", "rest", "whole"), [("kl", True, False), ("kl", False, True), ("abs", False, False)]
)
def test_outcomes_matched_for_other_probabilities_are_refused(kind, rest, whole):
    pairs = {"student_index": torch.arange(3), "teacher_index": torch.arange(3)}
    outcomes = match_outcomes(HEAD, HEAD, **pairs, whole=whole)
    states = torch.zeros(4, 8)
    with pytest.raises(ValueError, match=f"whole={not whole} where kind is '{kind}'.* got whole={whole}"):
        linear_divergence(states, HEAD, states, HEAD, kind, outcomes=outcomes, rest_as_outcome=rest)


def test_outcomes_go_with_no_index():
    outcomes = match_outcomes(HEAD, HEAD)
    states = torch.zeros(4, 8)
    linear_divergence(states, HEAD, states, HEAD, "abs", outcomes=outcomes)
    for index in ("student_index", "teacher_index"):
        with pytest.raises(ValueError, match="one or the other"):
            linear_divergence(states, HEAD, states, HEAD, outcomes=outcomes, **{index: torch.arange(5)})


@pytest.mark.parametrize("weighted", [False, True])
def test_a_second_derivative_is_refused(weighted):
    student = torch.ones(4, 8, requires_grad=True)
    weights = {"row_weight_N": torch.ones(4)} if weighted else {}
    value = linear_divergence(student, HEAD, torch.ones(4, 8), HEAD, **weights)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(value.sum(), student, create_graph=True)
