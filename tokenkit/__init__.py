"""Language models under another tokenizer, and losses that never hold their logits.

    import torch
    import tokenkit

    collator = tokenkit.AlignedCollator(tokenizer, teacher_tokenizer)  # paths, names, Hugging Face objects
    batch = collator([{"text": "Once upon a time."}])
    with torch.no_grad():
        taught = tokenkit.hidden_states(teacher, batch.teacher)
    tokenkit.alm_loss(tokenkit.hidden_states(model, batch.student), taught, batch).mean.backward()

The names below are found when they are asked for: importing this package imports nothing else, and the
operations and losses need torch and triton alone. What is in `__all__` is stable; other modules may move.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from tokenkit.data.collate import AlignedCollator
    from tokenkit.integrations import DistillationTrainer, Distiller, hidden_states
    from tokenkit.integrations.plain import bits_per_byte, export_huggingface, make_loss, transfer_vocabulary
    from tokenkit.kernels.linear_divergence import linear_divergence
    from tokenkit.kernels.linear_logprob import linear_logprob
    from tokenkit.kernels.projected_divergence import projected_divergence
    from tokenkit.kernels.sorted_distance import sorted_distance
    from tokenkit.losses.alm import alm_loss
    from tokenkit.losses.clm import clm_loss
    from tokenkit.losses.dskd import dskd_loss
    from tokenkit.losses.fused import (
        fused_linear_cross_entropy,
        fused_linear_jsd,
        fused_linear_kl_div,
        linear_cross_entropy,
    )
    from tokenkit.losses.gold import gold_loss
    from tokenkit.losses.gold_js import gold_js_loss
    from tokenkit.losses.kl import kl_loss
    from tokenkit.losses.latents import latents_loss
    from tokenkit.losses.mined import mined_loss
    from tokenkit.losses.side_path import side_path_loss
    from tokenkit.losses.uld import uld_loss
    from tokenkit.losses.xtoken import xtoken_loss
    from tokenkit.models.causal_lm import load_causal_lm
    from tokenkit.structs import Batch, Head, HiddenStates, LossTerm
    from tokenkit.tokenization.tokenizer import load_tokenizer

PLACES = {
    "AlignedCollator": "data.collate",
    "Batch": "structs",
    "DistillationTrainer": "integrations",
    "Distiller": "integrations",
    "Head": "structs",
    "HiddenStates": "structs",
    "LossTerm": "structs",
    "alm_loss": "losses.alm",
    "bits_per_byte": "integrations.plain",
    "clm_loss": "losses.clm",
    "dskd_loss": "losses.dskd",
    "export_huggingface": "integrations.plain",
    "fused_linear_cross_entropy": "losses.fused",
    "fused_linear_jsd": "losses.fused",
    "fused_linear_kl_div": "losses.fused",
    "gold_js_loss": "losses.gold_js",
    "gold_loss": "losses.gold",
    "hidden_states": "integrations",
    "kl_loss": "losses.kl",
    "latents_loss": "losses.latents",
    "linear_cross_entropy": "losses.fused",
    "linear_divergence": "kernels.linear_divergence",
    "linear_logprob": "kernels.linear_logprob",
    "load_causal_lm": "models.causal_lm",
    "load_tokenizer": "tokenization.tokenizer",
    "make_loss": "integrations.plain",
    "mined_loss": "losses.mined",
    "projected_divergence": "kernels.projected_divergence",
    "side_path_loss": "losses.side_path",
    "sorted_distance": "kernels.sorted_distance",
    "transfer_vocabulary": "integrations.plain",
    "uld_loss": "losses.uld",
    "xtoken_loss": "losses.xtoken",
}
"""In which module each name is."""

__all__ = [
    "AlignedCollator",
    "Batch",
    "DistillationTrainer",
    "Distiller",
    "Head",
    "HiddenStates",
    "LossTerm",
    "__version__",
    "alm_loss",
    "bits_per_byte",
    "clm_loss",
    "dskd_loss",
    "export_huggingface",
    "fused_linear_cross_entropy",
    "fused_linear_jsd",
    "fused_linear_kl_div",
    "gold_js_loss",
    "gold_loss",
    "hidden_states",
    "kl_loss",
    "latents_loss",
    "linear_cross_entropy",
    "linear_divergence",
    "linear_logprob",
    "load_causal_lm",
    "load_tokenizer",
    "make_loss",
    "mined_loss",
    "projected_divergence",
    "side_path_loss",
    "sorted_distance",
    "transfer_vocabulary",
    "uld_loss",
    "xtoken_loss",
]


def __getattr__(name: str) -> Any:
    if name not in PLACES:
        near = _nearest(name)
        raise AttributeError(f"tokenkit has no {name!r}{near}; it has {', '.join(sorted(PLACES))}")
    try:
        found = getattr(importlib.import_module(f"tokenkit.{PLACES[name]}"), name)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "tokenkit":
            raise
        raise ModuleNotFoundError(
            f"tokenkit.{name} needs the package {error.name!r}, which is not installed: "
            "pip install the extra `train`",
            name=error.name,
        ) from error
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _nearest(name: str) -> str:
    import difflib

    close = difflib.get_close_matches(name, PLACES, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
