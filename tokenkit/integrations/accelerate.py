"""One optimizer step of a distillation in a loop with Accelerate.

model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for batches in groups(loader, 4):                              # four micro-batches of each process
    values = accelerate_step(accelerator, distiller, model, batches)
    optimizer.step()
    optimizer.zero_grad()
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from tokenkit.integrations.distiller import AUTOCAST, Distiller
from tokenkit.structs import Batch

if TYPE_CHECKING:
    from accelerate import Accelerator


def accelerate_step(
    accelerator: Accelerator,
    distiller: Distiller,
    model: nn.Module,
    batches: Sequence[Batch | Mapping[str, Tensor]],
) -> dict[str, float]:
    """Run forward and backward of a whole optimizer step under Accelerate's precision and wrapper.

    Args:
        accelerator: with its own accumulation off, which would divide by a number of micro-batches.
        distiller: made of the model before `accelerator.prepare`.
        model: what `accelerator.prepare` returned.
        batches: the step's micro-batches of this process.

    Returns:
        by loss its value over the whole step, in nats; "loss": their weighted sum.
    """
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError(
            "Accelerator(gradient_accumulation_steps=...) divides by a number of micro-batches: leave it "
            "out, and give all micro-batches of a step at once"
        )
    distiller.step.compute_dtype = AUTOCAST.get(accelerator.mixed_precision)
    return distiller.backward(
        model, batches, backward=accelerator.backward, no_sync=lambda: accelerator.no_sync(model)
    )
