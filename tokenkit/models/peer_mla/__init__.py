"""A language model of PEER layers (product-key experts) and multi-head latent attention.

`settings.py` holds its configuration without torch. The other files named in `FILES` are a model in Hugging
Face's form: `save_pretrained` copies them into the folder, where they need torch and transformers alone, so
they import each other relatively.
"""

from __future__ import annotations

import importlib
from typing import Any

PLACES = {"PeerMlaConfig": "configuration_peer_mla", "PeerMlaForCausalLM": "modeling_peer_mla"}
FILES = ("attention", "configuration_peer_mla", "experts", "modeling_peer_mla", "settings")
"""The modules that travel with a folder."""


def register() -> None:
    """Let transformers' Auto classes know the model, once."""
    importlib.import_module(f"{__name__}.modeling_peer_mla")


def __getattr__(name: str) -> Any:
    if name not in PLACES:
        raise AttributeError(f"{__name__} has no {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{PLACES[name]}"), name)
