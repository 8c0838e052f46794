"""Losses: pure functions from hidden states and a batch to a sum and a count. Needs torch and triton only.

    from tokenkit.losses import alm_loss

    term = alm_loss(student, teacher, batch)
    (term.total / term.count).backward()

Every loss has two halves, because the count of the whole optimizer step (all ranks, all micro-batches)
must be known before the first backward: `prepare(teacher, batch, options)` returns an object with `.count`
and whatever of the teacher the second half needs, `function(student, prepared, batch, options)` a LossTerm.
"""

from __future__ import annotations

from tokenkit.losses import alm, clm
from tokenkit.losses.alm import AlmOptions, alm_loss
from tokenkit.losses.clm import ClmOptions, clm_loss
from tokenkit.losses.registry import Loss, find, load_own

LOSSES: dict[str, Loss] = {
    "clm": Loss(clm.prepare, clm.function, ClmOptions, chunks=None, needs_teacher=False, aliases=("sft",)),
    "alm_unconstrained": Loss(
        alm.prepare, alm.function, AlmOptions, chunks="unconstrained", aliases=("alm_greedy",)
    ),
    "alm_space": Loss(alm.prepare, alm.function, AlmOptions, chunks="space"),
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


__all__ = ["LOSSES", "AlmOptions", "ClmOptions", "Loss", "alm_loss", "clm_loss", "resolve"]
