"""A batch as other trainers handle it: flat tensors, moved, sliced, pinned, and back."""

import pytest
import torch
from torch.utils.data import DataLoader

from tests.losses.example import make_batch
from tokenkit.structs import Batch, Head


def test_flat_tensors_and_back():
    batch = make_batch()
    flat = dict(batch)
    assert set(flat) == set(batch.keys()) >= {"input_ids", "attention_mask", "labels", "teacher_labels"}
    assert all(len(tensor) == 2 for tensor in flat.values())
    assert (flat["labels"][1, 6:] == -100).all()
    again = Batch.from_tensors(flat, batch)
    for name, tensor in dict(again).items():
        assert torch.equal(tensor, flat[name]), name
    assert torch.equal(again.student.length_B, batch.student.length_B)
    assert torch.equal(again.teacher.trained_BT, batch.teacher.trained_BT)
    assert again.student.space_V is batch.student.space_V
    assert again.teacher.eos_id == batch.teacher.eos_id


def test_a_slice_of_the_flat_tensors_is_a_batch():
    batch = make_batch()
    second = Batch.from_tensors({name: tensor[1:] for name, tensor in dict(batch).items()}, batch)
    assert torch.equal(second.student.ids_BT, batch.student.ids_BT[1:])
    with pytest.raises(KeyError, match="teacher_input_ids"):
        Batch.from_tensors({**dict(batch.student.tensors())}, batch)


def test_it_prints_in_one_short_line():
    text = repr(make_batch())
    assert text == "Batch(2 rows, 8 student and 9 teacher positions, unconstrained, space, unbiased chunks)"


def test_a_data_loader_can_pin_it(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor.shape) or tensor)
    batch = make_batch().pin_memory()
    assert isinstance(batch, Batch)
    assert len(pinned) == 2 * 4 + 3 * 2
    loader = DataLoader([0, 1], batch_size=2, collate_fn=lambda rows: make_batch())
    assert repr(next(iter(loader))) == repr(batch)


def test_it_moves_without_waiting_or_waiting():
    batch = make_batch()
    assert batch.to("meta").student.ids_BT.device.type == "meta"
    assert batch.to("cpu", non_blocking=False).chunks["space"].student_BT.device.type == "cpu"


def test_a_head_is_a_matrix():
    with pytest.raises(
        TypeError, match=r"got Linear; of a linear layer write Head\(layer.weight, layer.bias\)"
    ):
        Head(torch.nn.Linear(4, 8))
