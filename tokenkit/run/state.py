"""What a checkpoint holds of a run: tensors by name, and the state of the random generators as JSON.

model/<parameter>                 trainable parameters and persistent buffers
optimizer/<moment>/<parameter>    what the optimizer keeps of a parameter; rates come from the configuration
"""

from __future__ import annotations

import base64
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from tokenkit.errors import CheckpointError


@dataclass(slots=True)
class State:
    """Everything that changes while training."""

    module: nn.Module
    """Its trainable parameters and persistent buffers are saved; the frozen rest is made anew."""
    optimizer: Optimizer | None
    """None: load parameters only."""
    step: int = 0
    """Optimizer steps done."""
    extra: Any = None
    """JSON of the caller: the position in the data, a loss scale. Each rank's own."""


def saved_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return what a checkpoint holds of `module`: trainable parameters and persistent buffers, by name.

    A weight that is used in two places appears once, under its first name. Sharded parameters are
    DTensors. No gradient is asked of the caller, and none flows.
    """
    # first: it makes FSDP2 take back the whole weights that its root still holds after an evaluation
    persistent = module.state_dict().keys()
    tensors: dict[str, Tensor] = {
        name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad
    }
    return tensors | {name: buffer for name, buffer in module.named_buffers() if name in persistent}


def local_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Return the bytes of this rank's shards."""
    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors.values())


def tensors_to_save(state: State) -> dict[str, Tensor]:
    """Return the tensors of `state` under the names that they have in a checkpoint."""
    parameters = saved_tensors(state.module)
    tensors = {f"model/{name}": tensor.detach() for name, tensor in parameters.items()}
    if state.optimizer is not None:
        names = _names(state.optimizer, parameters)
        for parameter, values in state.optimizer.state.items():
            for key, value in values.items():
                if not isinstance(value, Tensor):
                    raise TypeError(f"optimizer state {key!r} must be a tensor, got {type(value).__name__}")
                tensors[f"optimizer/{key}/{names[parameter]}"] = value
    return tensors


def _names(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> dict[Tensor, str]:
    names = {parameter: name for name, parameter in parameters.items()}
    strange = sum(p not in names for group in optimizer.param_groups for p in group["params"])
    if strange:
        raise ValueError(
            f"the optimizer holds {strange} parameters that are not among the module's trainable ones: "
            "build it after sharding, from the module that the checkpoint saves"
        )
    return names


def tensors_to_load(state: State, metadata: Metadata, within: str = "model/") -> dict[str, Tensor]:
    """Return where the tensors of a checkpoint go: the module's own, and fresh room for the moments.

    Args:
        state: where they go.
        metadata: what the checkpoint holds.
        within: without an optimizer, the names that are looked at begin so; the rest is left in the file.

    Raises:
        CheckpointError: a name, a shape or a dtype differs. DCP would ignore what it does not need and
            cast what it does not like.
    """
    parameters = saved_tensors(state.module)
    targets = {f"model/{name}": tensor.detach() for name, tensor in parameters.items()}
    entries: dict[str, Any] = {
        name: entry
        for name, entry in metadata.state_dict_metadata.items()
        if state.optimizer is not None or name.startswith(within)
    }
    targets |= {
        name: _room(name, entry, parameters) for name, entry in entries.items() if name not in targets
    }
    problems = [f"{name} is not in it" for name in targets.keys() - entries.keys()]
    for name in targets.keys() & entries.keys():
        was = (tuple(entries[name].size), entries[name].properties.dtype)
        now = (tuple(targets[name].shape), targets[name].dtype)
        if was != now:
            problems.append(f"{name} was {was[0]} {was[1]} and is {now[0]} {now[1]}")
    if problems:
        shown = "; ".join(sorted(problems)[:5])
        raise CheckpointError(
            f"the checkpoint does not fit this model ({len(problems)} differences): {shown}. "
            "Use the configuration that it was saved with"
        )
    return targets


def _room(entry_name: str, entry: Any, parameters: Mapping[str, Tensor]) -> Tensor:
    """Return zeros for a moment, sharded like its parameter, one for a row or an entry; steps are scalars."""
    kind, _, rest = entry_name.partition("/")
    name = rest.partition("/")[2]
    shape = parameters[name].shape if kind == "optimizer" and name in parameters else None
    row = None if shape is None else torch.Size([*shape[:1], *[1] * (len(shape) - 1)])
    if shape is None or entry.size not in (torch.Size(), shape, row):
        raise CheckpointError(
            f"the checkpoint does not fit this model: {entry_name} of shape {tuple(entry.size)} has no place "
            "in it. Use the configuration that it was saved with"
        )
    if entry.size == shape:
        return torch.zeros_like(parameters[name].detach(), dtype=entry.properties.dtype)
    if entry.size == row:
        whole = parameters[name].detach()
        return torch.zeros_like(
            whole[(slice(None), *[slice(1)] * (whole.ndim - 1))], dtype=entry.properties.dtype
        )
    return torch.zeros((), dtype=entry.properties.dtype)


def fill_optimizer(state: State, loaded: Mapping[str, Tensor]) -> None:
    """Give the optimizer its moments; rates and decays stay those of the configuration."""
    if state.optimizer is None:
        return
    names = _names(state.optimizer, saved_tensors(state.module))
    moments: dict[str, dict[str, Tensor]] = {}
    for entry_name, tensor in loaded.items():
        kind, _, rest = entry_name.partition("/")
        if kind == "optimizer":
            key, _, name = rest.partition("/")
            moments.setdefault(name, {})[key] = tensor
    order = [names[p] for group in state.optimizer.param_groups for p in group["params"]]
    by_index = {index: moments[name] for index, name in enumerate(order) if name in moments}
    groups = state.optimizer.state_dict()["param_groups"]
    state.optimizer.load_state_dict({"state": by_index, "param_groups": groups})


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the state of every global generator as JSON: torch, this rank's GPU, Python, NumPy."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": _text(torch.get_rng_state()),
        "cuda": _text(torch.cuda.get_rng_state(device)) if device.type == "cuda" else None,
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), *rest],
    }


def set_random_state(saved: Mapping[str, Any], device: torch.device) -> None:
    """Put every generator back; KeyError, TypeError or ValueError where `saved` is not a random state."""
    torch.set_rng_state(_bytes(saved["torch"]))
    if saved["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(_bytes(saved["cuda"]), device)
    version, internal, gauss = saved["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = saved["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))


def _text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
