"""What sorted_distance refuses, which mode it chooses, and what it never allocates.

Faults tried, each caught: NaN let through; a head's gradient left to the teacher; the tables kept in every
mode; dW formed where a second one does not fit.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.sorted_cases import EXECUTED, THREE_ROWS, make
from tokenkit.kernels.head.side import side_of
from tokenkit.kernels.sorted_distance import error_bound, sorted_distance
from tokenkit.kernels.sorted_distance import operation as module
from tokenkit.kernels.sorted_distance import rows as sorted_rows
from tokenkit.structs import Head


def test_nothing_reaches_the_teacher(device):
    hidden, weight, _, teacher, teacher_weight, _, _ = make(4, 33, 49, 6, device)
    for x in (hidden, teacher, teacher_weight):
        x.requires_grad_()
    sorted_distance(hidden, Head(weight), teacher, Head(teacher_weight)).sum().backward()
    assert hidden.grad is not None
    assert teacher.grad is None
    assert teacher_weight.grad is None


def test_modes_are_chosen_by_gradients_weights_and_budget(device):
    full, half = torch.zeros(100, 8, device=device), torch.zeros(100, 8, device=device).bfloat16()
    cases = {
        ("", False, True, full, 0): "values",
        ("x", False, False, full, 0): "formed",
        ("xw", False, True, full, 4 * 800): "formed",
        ("xw", False, True, full, 4 * 800 - 1): "tables",
        ("xb", False, True, full, 0): "formed",
        ("xw", False, True, half, 8 * 800): "formed",
        ("xw", False, True, half, 8 * 800 - 1): "tables",
        ("xw", False, False, full, 1 << 40): "tables",
        ("xwb", True, False, full, 1 << 40): "replay",
        ("xwb", True, True, half, 0): "formed",
    }
    assert {arguments: module._mode(*arguments) for arguments in cases} == cases


class Largest(TorchDispatchMode):
    """The most numbers that any tensor made under it holds."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return result


@pytest.mark.parametrize("mode", ["formed", "tables", "values"])
def test_all_the_logits_never_exist_at_once(mode, monkeypatch, device):
    """A small workspace holds one row of 15 000 and of 14 000 logits; 12 of them would be 180 000."""
    monkeypatch.undo()
    hidden, weight, bias, teacher, teacher_weight, teacher_bias, upstream = make(
        12, 15_000, 14_000, 3, device
    )
    student, other = (
        side_of(name, x, head)
        for name, x, head in (
            ("one", hidden, Head(weight, bias)),
            ("other", teacher, Head(teacher_weight, teacher_bias)),
        )
    )
    needs = "" if mode == "values" else "xwb"
    options = sorted_rows.Options(mode, False, needs, 0)
    with Largest() as largest:
        _, *kept = sorted_rows.run(student, other, upstream, options)
        if mode == "tables":
            sorted_rows.run_backward(student, upstream, kept, options)
    allowed = 15_000 * 4
    assert largest.numel <= allowed < 12 * 15_000


BAD = {
    "states and head differ": (dict(weight=torch.zeros(5, 9)), r"student_ND .* \(4, 8\) and \(5, 9\)"),
    "teacher's states and head differ": (
        dict(teacher_weight=torch.zeros(5, 9)),
        "teacher_NE and teacher_head",
    ),
    "rows differ": (dict(teacher=torch.zeros(3, 6)), "same rows: got 4 and 3"),
    "head's dtype": (dict(weight=torch.zeros(5, 8).half()), "cast the head once"),
    "head's device": (dict(teacher_weight=torch.zeros(7, 6, device="meta")), "on meta"),
    "float64 and float32": (
        dict(teacher=torch.zeros(4, 6).double(), teacher_weight=torch.zeros(7, 6).double()),
        "both be float64",
    ),
    "integers": (dict(hidden=torch.zeros(4, 8).long(), weight=torch.zeros(5, 8).long()), "floating point"),
    "vocab_size": (dict(vocab_size=6), r"student_head.vocab_size must be in \[1, 5\]"),
    "bias": (dict(bias=torch.zeros(4)), "student_head.bias_V"),
    "temperature": (dict(temperature=0.0), "temperature must be positive: got 0.0"),
    "temperature NaN": (dict(temperature=float("nan")), "temperature must be positive: got nan"),
    "weights per row": (dict(row_weight_N=torch.ones(3)), r"one number per row .* \(4\)"),
    "weights want gradients": (dict(row_weight_N=torch.ones(4).requires_grad_()), "detach it"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    changes, message = BAD[name]
    given = {"hidden": torch.zeros(4, 8), "weight": torch.zeros(5, 8), "bias": None, "vocab_size": None}
    given |= {"teacher": torch.zeros(4, 6), "teacher_weight": torch.zeros(7, 6)} | changes
    head = Head(given.pop("weight"), given.pop("bias"), vocab_size=given.pop("vocab_size"))
    arguments = given.pop("hidden"), head, given.pop("teacher"), Head(given.pop("teacher_weight"))
    with pytest.raises(ValueError, match=message):
        sorted_distance(*arguments, **given)
    if not any(key.startswith("row_weight") for key in given):
        with pytest.raises(ValueError, match=message):
            error_bound(*arguments, **given)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@EXECUTED
def test_what_is_not_finite_is_named_with_its_row(exact, value, executor):
    for place, name in enumerate(("student_ND", "teacher_NE")):
        hidden = [torch.zeros(7, 8), torch.zeros(7, 8)]
        hidden[place][5, 3] = value
        with pytest.raises(ValueError, match=f"{name} .*row 5"):
            sorted_distance(
                hidden[0], Head(torch.ones(5, 8)), hidden[1], Head(torch.ones(6, 8)),
                exact=exact, workspace_bytes=THREE_ROWS,
            )  # fmt: skip


@pytest.mark.parametrize("exact", [False, True])
def test_an_infinity_that_a_softcap_hides_is_named_all_the_same(exact):
    for place, name in enumerate(("student_ND", "teacher_NE")):
        hidden = [torch.zeros(7, 8), torch.zeros(7, 8)]
        hidden[place][5, 3] = torch.inf
        heads = [Head(torch.ones(V, 8), softcap=3.0) for V in (5, 6)]
        with pytest.raises(ValueError, match=f"{name} .*row 5"):
            sorted_distance(hidden[0], heads[0], hidden[1], heads[1], exact=exact)


def test_a_softcap_that_is_none_is_refused():
    head = Head(torch.ones(5, 8))
    with pytest.raises(
        ValueError, match=r"teacher_head\.softcap must be positive and finite, or None: got 0"
    ):
        sorted_distance(torch.zeros(2, 8), head, torch.zeros(2, 8), Head(torch.ones(5, 8), softcap=0.0))
