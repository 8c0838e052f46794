"""Documents in fewer, fuller rows: both sides alike, no loss sees it, hardly any padding.

Faults tried, each caught here: positions that go on over documents; places that are off by one; padding that
goes on with the document before it.
"""

import numpy as np
import pytest
import torch

from tokenkit.config import ConfigError
from tokenkit.data.lockstep import PADDING, lay_out, packed_rows
from tokenkit.parallel import World
from tokenkit.training.build import build
from tokenkit.training.clock import Clock
from tokenkit.training.step import train_step

SINGLE = World(0, 1, torch.device("cpu"), None)
LOSSES = [
    "clm", "alm_unconstrained", "alm_side_path", "alm_latents", "baseline_uld", "baseline_dskd",
    "baseline_gold", "baseline_xtoken",
]  # fmt: skip


@pytest.mark.parametrize("most", [(512, 512), (256, 64)])
@pytest.mark.parametrize("number", [1, 7, 64])
def test_rows_hold_the_same_documents_and_little_padding(number, most):
    generator = np.random.default_rng(number)
    length_B2 = np.stack([generator.integers(1, n + 1, number) for n in most], 1)
    row_B, start_B2 = lay_out(length_B2, most)
    for side in range(2):
        length_B = length_B2[:, side]
        ids_N = np.arange(length_B.sum()) + 1
        packed = packed_rows(ids_N, length_B, most[side], row_B, start_B2[:, side], 0)
        back_BT = packed.unpack(packed.ids_RP[..., None].double())[..., 0]
        at = 0
        for b, length in enumerate(length_B):
            assert back_BT[b, :length].tolist() == list(range(at + 1, at + 1 + length))
            at += length
            place_T = packed.place_BT[b, :length]
            assert packed.position_RP.flatten()[place_T].tolist() == list(range(length))
            assert set((place_T // packed.ids_RP.shape[1]).tolist()) == {row_B[b]}
        is_padding_RP = packed.ids_RP == 0
        first_RP = is_padding_RP & (packed.position_RP == 0)
        assert (first_RP.sum(1) == is_padding_RP.any(1)).all()
        assert len(packed.ids_RP) == 1 or is_padding_RP.double().mean() <= PADDING


def measured(parts, micro_batches):
    report = train_step(parts.run, micro_batches)
    return {**report.losses, "norm": report.grad_norm}, report.counts


def test_every_loss_is_the_same_however_documents_lie(config_of, files):
    """Another teacher, several micro-batches: losses, counts and the gradient are those of a row each."""
    usual = {
        "losses": LOSSES, "train_model_mode": "full", "batch_size": 12, "gradient_accumulation_steps": 2,
        "teacher__pretrained_model_name_or_path": files / "teacher", "latents_do_project": "true",
    }  # fmt: skip
    runs = []
    for changes in ({}, {"pack_documents": "true"}, {"group_by_length": "true"}):
        torch.manual_seed(0)  # what losses train is drawn
        runs.append(build(config_of(**usual, **changes), SINGLE))
    plain, packed, sorted_ = runs
    steps = [next(parts.batches) for parts in runs]
    batch, other = steps[0][0], steps[1][0]
    assert other.student.packed.ids_RP.shape[0] < len(batch.student.length_B)
    assert other.student.num_positions < batch.student.num_positions
    assert len(other.student.packed.ids_RP) == len(other.teacher.packed.ids_RP)
    lengths = [batch.student.length_B for batch in steps[2]]
    assert lengths[0].sum() < lengths[1].sum()
    values, counts = measured(plain, steps[0])
    for parts, step in zip((packed, sorted_), steps[1:], strict=True):
        others, other_counts = measured(parts, step)
        assert other_counts == counts
        for name, value in values.items():
            assert others[name] == pytest.approx(value, rel=2e-5), name


def test_rows_are_fuller_under_adapters_in_16_bits(config_of):
    """Float32 embeddings before a body of 16 bits, when documents of one row are looked at."""
    runs = [build(config_of(dtype="bfloat16", pack_documents=packs), SINGLE) for packs in ("false", "true")]
    plain, packed = (measured(parts, next(parts.batches)) for parts in runs)
    assert packed[1] == plain[1]
    assert packed[0] == pytest.approx(plain[0], rel=1e-2)


def test_what_leaves_no_padding_is_not_packed_twice(config_of):
    with pytest.raises(ConfigError, match="pack leaves no padding"):
        config_of(losses=["clm"], pack="true", pack_documents="true", target_tokenizer_name=None)


def test_a_clock_reads_what_the_device_has_passed(monkeypatch):
    """Events that are not passed stay for the next time; nothing waits."""
    passed, now = [], [0.0]

    class Event:
        def __init__(self):
            self.at = now[0] = now[0] + 1.0

        def query(self):
            return self.at <= passed[-1]

        def elapsed_time(self, other):
            return 1000 * (other.at - self.at)

    clock = Clock()
    monkeypatch.setattr(Clock, "_now", lambda self: Event())
    passed.append(2.0)
    clock.begin(torch.device("cpu"))
    clock.mark("teacher")
    clock.mark("student")
    clock.add("data", 0.5)
    assert clock.take() == {"data": 0.5, "teacher": 1.0}
    passed.append(9.0)
    assert clock.take() == {"student": 1.0}
    assert clock.take() == {}
