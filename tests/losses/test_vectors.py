"""Every ALM and CLM case of the reference values: value and gradients, to 1e-5 relative.

Errors are relative to the largest entry.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from tokenkit.losses import alm_loss, clm_loss
from tokenkit.structs import Batch, Chunks, Head, HiddenStates, Side

PATH = Path(
    os.environ.get("TOKENKIT_VECTORS", Path(__file__).parents[3] / "shared" / "vectors" / "losses.npz")
)
pytestmark = pytest.mark.skipif(
    not PATH.is_file(), reason="reference values are absent: set TOKENKIT_VECTORS"
)

VALUES = dict(np.load(PATH)) if PATH.is_file() else {"cases": np.array("[]")}
CASES = json.loads(str(VALUES["cases"]))
ALM = [case for case in CASES if "diff" in case]
CLM = [case for case in CASES if case.get("name") == "clm"]


def tensor(name):
    return torch.tensor(VALUES[name])


def side(name):
    ids = tensor(f"{name}_ids")
    length = (tensor(f"{name}_chunks") >= 0).sum(1)
    return Side(
        ids_BT=ids,
        length_B=length,
        trained_BT=tensor(f"{name}_chunks") >= 0,
        space_V=tensor(f"{name}_space"),
        eos_id=int(VALUES["eos"][("student", "teacher").index(name)]),
    )


def inputs():
    chunks = Chunks(tensor("student_chunks").int(), tensor("teacher_chunks").int())
    batch = Batch(side("student"), side("teacher"), {"unconstrained": chunks})
    states = [
        HiddenStates(
            tensor(f"{name}_hidden").requires_grad_(), Head(tensor(f"{name}_weight").requires_grad_())
        )
        for name in ("student", "teacher")
    ]
    return *states, batch


def close(value, truth, tolerance):
    return abs(value - truth).max() <= tolerance * abs(truth).max()


@pytest.mark.parametrize("case", ALM, ids=[f"{c['key']}-{c['diff']}-{c['mode']}-{c['sizes']}" for c in ALM])
def test_alm_case(case):
    student, teacher, batch = inputs()
    term = alm_loss(
        student, teacher, batch, diff=case["diff"], mode=case["mode"], chunk_sizes=tuple(case["sizes"]),
        numerator=case["numerator"], denominator=case["denominator"], space_threshold=0.3,
    )  # fmt: skip
    loss = term.total / term.count
    loss.backward()
    errors = [
        (loss.detach().numpy(), np.array(case["loss"]), 1e-5),
        (student.hidden_BTD.grad.numpy(), VALUES[case["key"] + "_dh"], 1e-5),
        (student.head.weight_VD.grad.numpy(), VALUES[case["key"] + "_dW"], 1e-5),
    ]
    report = [abs(value - truth).max() / abs(truth).max() for value, truth, _ in errors]
    assert all(close(*error) for error in errors), report
    assert teacher.hidden_BTD.grad is None
    assert teacher.head.weight_VD.grad is None


@pytest.mark.parametrize("case", CLM)
def test_clm_case(case):
    student, _, batch = inputs()
    term = clm_loss(student, batch)
    loss = term.total / term.count
    loss.backward()
    assert close(loss.detach().numpy(), np.array(case["loss"]), 1e-5)
    assert close(student.hidden_BTD.grad.numpy(), VALUES["clm_dh"], 1e-5)
    assert close(student.head.weight_VD.grad.numpy(), VALUES["clm_dW"], 1e-5)
