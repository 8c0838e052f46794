"""What a test leaves behind in its process: put back, or refused. No outcome depends on what ran before."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

# What no test needs to leave: the one that does fails.
HELD: dict[str, Callable[[], object]] = {
    "the working directory": os.getcwd,
    "the handler of SIGTERM": lambda: signal.getsignal(signal.SIGTERM),
    "the handler of SIGINT": lambda: signal.getsignal(signal.SIGINT),
    "torch's default dtype": torch.get_default_dtype,
    "torch's threads": torch.get_num_threads,
    "torch's gradient mode": torch.is_grad_enabled,
    "torch's deterministic mode": torch.are_deterministic_algorithms_enabled,
    "torch's precision of products": torch.get_float32_matmul_precision,
    "a process group": dist.is_initialized,
    "the kernels' interpreter": lambda: getattr(
        sys.modules.get("tokenkit.kernels.launch"), "INTERPRET", False
    ),
}


@contextmanager
def restored_process() -> Iterator[None]:
    """Put back what libraries change without being asked, and refuse what a test changed itself.

    A `TrainingArguments` sets environment variables that a later Accelerator obeys; compiled code of earlier
    tests counts against Dynamo's limit of recompilations; a door of this library redacts all later logs.

    Raises:
        AssertionError: what of `HELD` is not as it was.
    """
    environment, factory = dict(os.environ), logging.getLogRecordFactory()
    before = {name: read() for name, read in HELD.items()}
    yield
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update({name: value for name, value in environment.items() if os.environ.get(name) != value})
    logging.setLogRecordFactory(factory)
    forget_accelerate()
    _forget_compiled()
    changed = [f"{name}: {before[name]} -> {read()}" for name, read in HELD.items() if read() != before[name]]
    assert not changed, f"the test left behind {', '.join(changed)}"


def forget_accelerate() -> None:
    """Let the next Accelerator choose precision and ranks anew: the first of a process decides for all."""
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()


def _forget_compiled() -> None:
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and dynamo.utils.counters["frames"]:
        dynamo.reset()
        dynamo.utils.counters.clear()
