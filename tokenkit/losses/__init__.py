"""Losses: pure functions from hidden states and a batch to a sum and a count. Needs torch and triton only.

    from tokenkit.losses import alm_loss

    term = alm_loss(student, teacher, batch)
    (term.total / term.count).backward()

`base.py` says what a loss is, `options.py` holds the options of all and the table of their names. A name is
imported when it is used: the options alone load no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenkit.losses.alm import alm_loss
    from tokenkit.losses.base import Loss, Measured, make_loss
    from tokenkit.losses.clm import clm_loss
    from tokenkit.losses.dskd import dskd_loss
    from tokenkit.losses.gold import gold_loss
    from tokenkit.losses.gold_js import gold_js_loss
    from tokenkit.losses.kl import kl_loss
    from tokenkit.losses.latents import latents_loss
    from tokenkit.losses.mined import mined_loss
    from tokenkit.losses.options import LOSSES
    from tokenkit.losses.side_path import side_path_loss
    from tokenkit.losses.uld import uld_loss
    from tokenkit.losses.xtoken import xtoken_loss

PLACES = {"LOSSES": "options", "Loss": "base", "Measured": "base", "make_loss": "base"}
"""In which module a name is, where it is neither `NAME_loss` in NAME nor options."""

__all__ = [
    "LOSSES",
    "Loss",
    "Measured",
    "alm_loss",
    "clm_loss",
    "dskd_loss",
    "gold_js_loss",
    "gold_loss",
    "kl_loss",
    "latents_loss",
    "make_loss",
    "mined_loss",
    "side_path_loss",
    "uld_loss",
    "xtoken_loss",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        module = PLACES.get(name, name.removesuffix("_loss"))
    elif name.endswith("Options"):
        module = "options"
    else:
        raise AttributeError(f"tokenkit.losses has no {name!r}: it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"tokenkit.losses.{module}"), name)
