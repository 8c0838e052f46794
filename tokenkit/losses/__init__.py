"""Losses: pure functions from hidden states and a batch to a sum and a count. Needs torch and triton only.

    from tokenkit.losses import alm_loss

    term = alm_loss(student, teacher, batch)
    (term.total / term.count).backward()

Every loss has two halves, because the count of the whole optimizer step (all ranks, all micro-batches)
must be known before the first backward: `prepare(teacher, batch, options, context)` returns an object with
`.count` and whatever of the teacher the second half needs, `function(student, prepared, batch, options,
context)` a LossTerm. `context` holds the heads as they are to be read now, and the loss's own trained parts.
Two losses divide by a scale of the teacher's before they count (`Loss.measure` is not None): of these,
`measure(teacher, batch, options, context)` comes first, its `.sum_K` is added over the whole step too, and
`settle(measured, sum_K, batch, options, context)` returns what `prepare` would.
"""

from __future__ import annotations

from tokenkit.losses import alm, clm, dskd, gold, gold_js, latents, mined, side_path, uld, xtoken
from tokenkit.losses.alm import AlmOptions, alm_loss
from tokenkit.losses.clm import ClmOptions, clm_loss
from tokenkit.losses.dskd import DskdOptions, dskd_loss
from tokenkit.losses.gold import GoldOptions, GoldRules, gold_loss
from tokenkit.losses.gold_js import GoldJsOptions, gold_js_loss
from tokenkit.losses.latents import LatentsOptions, latents_loss
from tokenkit.losses.mined import MinedOptions, mined_loss
from tokenkit.losses.registry import Loss, find, load_own
from tokenkit.losses.side_path import SidePathOptions, side_path_loss
from tokenkit.losses.uld import UldOptions, uld_loss
from tokenkit.losses.xtoken import XTokenOptions, xtoken_loss

LOSSES: dict[str, Loss] = {
    "clm": Loss(clm.prepare, clm.function, ClmOptions, chunks=None, needs_teacher=False, aliases=("sft",)),
    "alm_unconstrained": Loss(
        alm.prepare, alm.function, AlmOptions, chunks="unconstrained", aliases=("alm_greedy",)
    ),
    "alm_space": Loss(alm.prepare, alm.function, AlmOptions, chunks="space"),
    "alm_unbiased": Loss(alm.prepare, alm.function, AlmOptions, chunks="unbiased", aliases=("alm",)),
    "alm_side_path": side_path.LOSS,
    "alm_latents": latents.LOSS,
    "baseline_uld": uld.LOSS,
    "baseline_mined": mined.LOSS,
    "baseline_dskd": dskd.LOSS,
    "baseline_gold": gold.LOSS,
    "baseline_gold_js": gold_js.LOSS,
    "baseline_xtoken": xtoken.LOSS,
}


def resolve(name: str) -> Loss:
    """Return the loss of that name or alias, or a user's own, written `module:function`.

    A user's function takes (student, teacher, batch), two HiddenStates and a Batch, and returns a LossTerm.
    Its count must be known before the student runs: `function.count(teacher, batch)` where the function
    has that attribute, else the number of scored student tokens. Further attributes, each optional:
    `chunks` (the kind of chunks it reads; "unconstrained") and `needs_teacher` (True).

    Raises:
        ValueError: no loss of that name (the message names the valid ones and the nearest), or nothing
            callable at module:function.
    """
    return load_own(name) if ":" in name else find(name, LOSSES)


__all__ = [
    "LOSSES",
    "AlmOptions",
    "ClmOptions",
    "DskdOptions",
    "GoldJsOptions",
    "GoldOptions",
    "GoldRules",
    "LatentsOptions",
    "Loss",
    "MinedOptions",
    "SidePathOptions",
    "UldOptions",
    "XTokenOptions",
    "alm_loss",
    "clm_loss",
    "dskd_loss",
    "gold_js_loss",
    "gold_loss",
    "latents_loss",
    "mined_loss",
    "resolve",
    "side_path_loss",
    "uld_loss",
    "xtoken_loss",
]
