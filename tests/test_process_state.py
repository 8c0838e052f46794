"""A test finds its process as it was at the start, in a worker that ran others and in a fork of it."""

import logging
import os

import pytest
import torch

from tests.process_state import restored_process
from tests.ranks import run_ranks

accelerate = pytest.importorskip("accelerate")


def _precision(world):
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    return accelerator.mixed_precision, accelerator.gradient_accumulation_steps


def test_a_fork_has_an_accelerator_of_its_own():
    accelerate.Accelerator(cpu=True, mixed_precision="no", gradient_accumulation_steps=3)
    assert run_ranks(_precision, 1, always_shard=False) == [("bf16", 2)]


def test_what_libraries_change_is_put_back(monkeypatch):
    monkeypatch.setenv("KEPT", "before")
    monkeypatch.setenv("TAKEN", "before")
    make = logging.getLogRecordFactory()
    with restored_process():
        accelerate.Accelerator(cpu=True, mixed_precision="no", gradient_accumulation_steps=3)
        os.environ |= {"KEPT": "after", "ACCELERATE_DYNAMO_BACKEND": "eager"}
        del os.environ["TAKEN"]
        logging.setLogRecordFactory(lambda *args: make(*args))
        torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))
    assert (os.environ["KEPT"], os.environ["TAKEN"]) == ("before", "before")
    assert "ACCELERATE_DYNAMO_BACKEND" not in os.environ
    assert logging.getLogRecordFactory() is make
    assert not torch._dynamo.utils.counters["frames"]
    assert _precision(None) == ("bf16", 2)


def test_a_test_that_leaves_its_dtype_behind_fails():
    message = r"torch's default dtype: torch\.float32 -> torch\.float64"
    with pytest.raises(AssertionError, match=message), restored_process():
        torch.set_default_dtype(torch.float64)
    torch.set_default_dtype(torch.float32)
