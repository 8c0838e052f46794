"""How often a training step makes the host wait for the device, counted on a CPU that plays one.

Faults tried, each caught here: rows found on the device, counts made of a list there, a mask split in every
batch, pairs matched in every batch, a norm read before the report.
"""

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tests.device import FakeDevice
from tests.training.test_gradients import SINGLE, WAYS
from tokenkit.training.build import build
from tokenkit.training.step import train_step

ALL = ["clm", "alm_unconstrained", "alm_side_path", "alm_latents", "baseline_uld", "baseline_mined"]
ALL += ["baseline_gold", "baseline_gold_js", "baseline_xtoken"]
MICRO_BATCHES = 2


def waits_of_a_step(config, monkeypatch):
    """Return those of the second step: the first finds what is the same in all."""
    torch.manual_seed(0)
    parts = build(config, SINGLE)
    device, run = FakeDevice(monkeypatch), parts.run
    tensors = [*run.model.parameters(), *run.model.buffers()]
    for loss in run.model.losses.values():
        tensors += [x for x in tree_leaves(vars(loss)) if isinstance(x, Tensor)]
    for tensor in tensors:
        device.put(tensor.data)
    with device:
        for _ in range(2):
            del device.waits[:]
            batches = next(parts.batches)
            assert len(batches) == MICRO_BATCHES
            train_step(run, batches)
            run.step += 1
    return device.waits


@pytest.mark.parametrize(
    ("losses", "way", "more"),
    [
        (["clm", "alm_unconstrained"], "static", 0),
        (["clm", "alm_unconstrained"], "approx_gradmag", 0),
        (["clm", "alm_unconstrained"], "balance+pcgrad", 0),
        (ALL, "static", 0),
        (
            ["baseline_dskd"],
            "static",
            3 * MICRO_BATCHES,
        ),  # rows that attend, on both sides, and those that are right
    ],
)
def test_a_step_waits_for_its_report_alone(make_config, files, monkeypatch, losses, way, more):
    settings = {name: value for name, value in WAYS[way].items() if name != "loss_weights"}
    if "baseline_mined" in losses:
        settings["mined_mapping_path"] = files / "mapping.npy"
    config = make_config(
        losses=losses,
        train_model_mode="full",
        gradient_accumulation_steps=MICRO_BATCHES,
        latents_do_project=True,
        **settings,
    )
    waits = waits_of_a_step(config, monkeypatch)
    of_bodies = [wait for wait in waits if "find_packed_sequence_indices" in wait]  # transformers' own
    passes = 3 if way == "approx_gradmag" else 2
    assert len(of_bodies) == passes * MICRO_BATCHES
    ours = [wait for wait in waits if wait not in of_bodies]
    assert [wait for wait in ours if "_report" in wait] == ours[-1:]
    assert len(ours) == 1 + more, ours
