"""The tables of PEER layers over several processes: each has some columns of every expert.

FSDP2 would gather each layer's tables, gigabytes, for every forward and backward. Cut by columns they never
travel; what does are tokens and their experts' products (`kernels/peer_experts_columns.py`).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.distributed.tensor import DTensor, Shard

from tokenkit.errors import ConfigError
from tokenkit.kernels.peer_experts_columns import peer_experts_columns

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh


def cut_tables(root: nn.Module, mesh: DeviceMesh) -> list[nn.Parameter]:
    """Cut all tables within `root` over the ranks of a mesh, in place; return them, each a DTensor.

    Args:
        root: holds models whose configuration may have a `peer_config`; its `sharding` decides: "columns",
            "gathered" (by FSDP2, as all else), or "auto", columns where their number divides.
        mesh: of one dimension.

    Raises:
        ConfigError: "columns", and ranks that do not divide the hidden size.
    """
    found: list[nn.Parameter] = []
    sharding: dict[Any, str] = {}
    for model in root.modules():
        peer: Any = getattr(getattr(model, "config", None), "peer_config", None)
        if isinstance(peer, dict):
            sharding |= {m: peer.get("sharding", "auto") for m in model.modules() if hasattr(m, "spread")}
    for tables, how in sharding.items():
        if is_cut(how, tables.down.shape[2], mesh.size()):
            for name in ("down", "up"):
                found.append(_cut(tables.get_parameter(name), mesh))
                setattr(tables, name, found[-1])
            tables.spread = partial(_spread, mesh=mesh)
    return found


def is_cut(how: str, width: int, ranks: int) -> bool:
    """Return whether tables of so many columns are cut over ranks; see `cut_tables`."""
    if how == "columns" and width % ranks:
        raise ConfigError(
            f"peer_config.sharding columns cuts the {width} columns of the experts' tables over {ranks} "
            "processes, which does not divide: take another number of processes, or sharding gathered"
        )
    return how != "gathered" and width % ranks == 0


def _cut(table: nn.Parameter, mesh: DeviceMesh) -> nn.Parameter:
    width = table.shape[2] // mesh.size()
    mine = table.detach()[..., mesh.get_local_rank() * width :][..., :width].to(mesh.device_type).clone()
    cut = DTensor.from_local(mine, mesh, [Shard(2)], run_check=False)
    return nn.Parameter(cut, requires_grad=table.requires_grad)


def _spread(
    flat: Tensor, down: DTensor, up: DTensor, *chosen: Any, mesh: DeviceMesh
) -> Tensor:  # fmt: skip
    return peer_experts_columns(flat, down.to_local(), up.to_local(), *chosen, group=mesh.get_group())
