"""A CPU that plays a device: what would make the host wait for it is written down.

Tensors that were put there, and whatever is computed from them, are the device's. Inside a custom operation
nothing is seen: on a GPU `gpu_checks.py` holds those to it. What a tensor is made of on the host and moved
there, other than through pinned memory, counts too.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tokenkit.kernels import deferred, launch
from tokenkit.structs import Batch

aten: Any = torch.ops.aten
READS = {
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.bincount, aten._unique2,
    aten.unique_dim, aten.unique_consecutive, aten.repeat_interleave,
}  # fmt: skip
"""Operations whose size or value the host must know."""
INDEXED = {aten.index, aten.index_put, aten.index_put_}
COPIES = {Tensor.tolist, Tensor.numpy, Tensor.cpu}


class FakeDevice(TorchDispatchMode):
    """Write down in `waits`, while it is entered, where the host would wait."""

    def __init__(self, monkeypatch: Any):
        super().__init__()
        self.waits: list[str] = []
        self._held: dict[int, Any] = {}
        self._functions = _Functions(self)
        to = Batch.to

        def moved(batch: Batch, device: Any, non_blocking: bool = True) -> Batch:
            copy = to(batch, device, non_blocking).map(Tensor.clone)
            object.__setattr__(copy, "host", batch)
            copy.map(self.put)
            return copy

        def uploaded(value: Any, device: Any) -> Any:
            if isinstance(value, Tensor):
                return value if self.holds(value) else self.put(value.clone())
            return value._make(uploaded(part, device) for part in value)

        monkeypatch.setattr(Batch, "to", moved)
        for module in list(sys.modules.values()):
            if getattr(module, "upload", None) is launch.upload:
                monkeypatch.setattr(module, "upload", uploaded)
        monkeypatch.setattr(deferred, "waits", lambda tensor: not self.holds(tensor))

    def __enter__(self) -> FakeDevice:
        self._functions.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._functions.__exit__(*error)

    def put(self, tensor: Tensor) -> Tensor:
        """Say that a tensor is the device's."""
        storage = tensor.untyped_storage()
        self._held[storage._cdata] = storage  # held: another may not take its address
        return tensor

    def holds(self, tensor: Tensor) -> bool:
        """Whether it is the device's."""
        return tensor.untyped_storage()._cdata in self._held

    def note(self, what: str) -> None:
        """Write a wait down, with the line of this package, or else of another, that made it."""
        frames = [f for f in traceback.extract_stack() if Path(f.filename).name != Path(__file__).name]
        ours = [f for f in frames if "tokenkit" in f.filename or "/kernels/" in f.filename]
        near = next((f for f in reversed(frames) if "/torch/" not in f.filename), frames[-1])
        last = near if "transformers" in near.filename else (ours or frames)[-1]
        self.waits.append(f"{what} in {last.name}, {Path(last.filename).name}:{last.lineno}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation; mark what it returns."""
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        is_ours = any(self.holds(x) for x in given)
        packet = func.overloadpacket
        if is_ours and packet in READS:
            self.note(str(packet))
        elif is_ours and packet in INDEXED and any(x is not None and x.dtype == torch.bool for x in args[1]):
            self.note(f"{packet} by a mask")
        found = func(*args, **(kwargs or {}))
        if is_ours:
            for tensor in tree_leaves(found):
                if isinstance(tensor, Tensor):
                    self.put(tensor)
        return found


class _Functions(TorchFunctionMode):
    """What does not reach the dispatcher on a CPU, or does nothing there."""

    def __init__(self, device: FakeDevice):
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in COPIES and self.device.holds(args[0]):
            self.device.note(func.__name__)
        elif func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            self.device.note("torch.tensor(..., device)")
        elif func is Tensor.new_tensor and self.device.holds(args[0]):
            self.device.note("new_tensor")
        elif func is Tensor.to and not self.device.holds(args[0]) and _moves(args, kwargs):
            self.device.note("a copy of pageable memory")
        found = func(*args, **kwargs)
        if isinstance(found, Tensor) and "transformers" in sys._getframe(1).f_code.co_filename:
            self.device.put(found)  # positions that a body makes are where its states are
        return found


def _moves(args: Any, kwargs: Any) -> bool:
    given = (*args, *kwargs.values())
    return not kwargs.get("non_blocking") and any(isinstance(x, torch.device) for x in given)
