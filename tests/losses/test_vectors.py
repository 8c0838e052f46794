"""Every case of the reference values: value and gradients, to 1e-5 relative.

Errors are relative to the largest entry.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.conftest import VECTORS
from tokenkit.losses import alm_loss, clm_loss, dskd_loss, latents_loss, uld_loss
from tokenkit.losses.dskd import Projections
from tokenkit.structs import Batch, Chunks, Head, HiddenStates, Side, Widths

VALUES = dict(np.load(VECTORS))
CASES = json.loads(str(VALUES["cases"]))
ALM = [case for case in CASES if "diff" in case]
CLM = [case for case in CASES if case.get("name") == "clm"]
DSKD = [case for case in CASES if case.get("name") == "dskd"]
LATENTS = [case for case in CASES if case.get("name") == "latents"]


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


def projections():
    modules = Projections(Widths(16, 16, 1), Widths(24, 24, 1)).double()
    with torch.no_grad():
        for name, linear in modules.named_children():
            linear.weight.copy_(tensor(f"projector_{name}_kernel").T)
            linear.bias.copy_(tensor(f"projector_{name}_bias"))
    return modules


@pytest.mark.parametrize("case", DSKD, ids=[case["divergence"] for case in DSKD])
def test_dskd_case(case):
    """Scales are those of the whole tensors there, padding too."""
    student, teacher, batch = inputs()
    batch = replace(batch, teacher=replace(batch.teacher, length_B=torch.tensor([20, 20, 20])))
    student = replace(student, embedded_BTD=tensor("dskd_emb_s").requires_grad_())
    teacher = replace(teacher, embedded_BTD=tensor("dskd_emb_t").requires_grad_())
    term = dskd_loss(
        student, teacher, batch, projections(), divergence=case["divergence"], temperature=2.0, causal=False
    )
    loss = (term.total / term.count).mean()
    loss.backward()
    assert close(loss.detach().numpy(), np.array(case["loss"]), 1e-5)
    assert close(student.hidden_BTD.grad.numpy(), VALUES[f"dskd_{case['divergence']}_dh"], 1e-5)
    for frozen in (student.embedded_BTD, teacher.embedded_BTD, teacher.hidden_BTD, teacher.head.weight_VD):
        assert frozen.grad is None


@pytest.mark.parametrize("case", LATENTS, ids=[case["norm"] for case in LATENTS])
def test_latents_case(case):
    student, teacher, batch = inputs()
    teacher = replace(teacher, hidden_BTD=tensor("lat_t").requires_grad_())
    term = latents_loss(student, teacher, batch, normalization=case["norm"])
    loss = term.total / term.count
    loss.backward()
    assert close(loss.detach().numpy(), np.array(case["loss"]), 1e-5)
    assert close(student.hidden_BTD.grad.numpy(), VALUES[f"lat_{case['norm']}_dh"], 1e-5)
    assert teacher.hidden_BTD.grad is None


def test_uld_values_and_gradient():
    """Every position counts there: also those of padding, whose next token nobody scores."""
    student, teacher, batch = inputs()
    everywhere = [
        replace(
            side, length_B=torch.full_like(side.length_B, T), trained_BT=torch.ones(3, T, dtype=torch.bool)
        )
        for side, T in ((batch.student, 24), (batch.teacher, 20))
    ]
    term = uld_loss(student, teacher, Batch(*everywhere, batch.chunks), exact=True)
    term.total.backward()
    assert term.count == 3 * 20
    assert close(term.total.detach().numpy(), VALUES["uld_per_row"].sum(), 1e-5)
    assert close(student.hidden_BTD.grad.numpy(), VALUES["uld_dh"], 1e-5)
