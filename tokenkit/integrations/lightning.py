"""A distillation as a `LightningModule`.

    module = DistillationModule(model, teacher, collator, {"clm": 1, "alm_unconstrained": 100},
                                lambda parameters: torch.optim.AdamW(parameters, 1e-5), accumulate=4)
    Trainer(max_steps=1000).fit(module, DataLoader(rows, 8, collate_fn=collator.collate))

Accumulation is the module's, not the Trainer's, which would divide by a number of micro-batches what the
losses divide by the count of the whole step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from tokenkit.data.collate import AlignedCollator
from tokenkit.integrations.distiller import Distiller
from tokenkit.structs import Batch, LossTerm


class DistillationModule(LightningModule):
    """Any of this library's losses against a teacher with another tokenizer; DDP and mixed precision work.

    Checkpoints hold the student under `student.`, and what losses train beside it; never the teacher.

    Args:
        student: a `...ForCausalLM`, or one with PEFT adapters.
        teacher: a Hugging Face model, or the folder or name of one.
        collator: of both tokenizers; give its `collate` to the data loaders.
        losses: weight of each loss, by name.
        optimizer: from the trained parameters to an optimizer, or to what else `configure_optimizers` may
            return; schedulers are stepped once per optimizer step.
        more: `loss_options`, keyword arguments of a loss by name; `accumulate`, micro-batches per optimizer
            step; `gradient_clip_val`, largest norm of the gradient.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | str,
        collator: AlignedCollator,
        losses: Mapping[str, float],
        optimizer: Callable[[Iterator[nn.Parameter]], Any],
        **more: Any,
    ):
        super().__init__()
        self.automatic_optimization = False  # the counts of a step are known when its last batch is here
        self.student = student.train()  # transformers loads for inference, and Lightning leaves it so
        self.distiller = Distiller(student, teacher, collator, losses, more.pop("loss_options", None))
        self.parts = self.distiller.parts
        self.make_optimizer = optimizer
        self.accumulate = int(more.pop("accumulate", 1))
        self.gradient_clip_val = more.pop("gradient_clip_val", None)
        if more or self.accumulate < 1:
            raise ValueError(
                f"accumulate must be at least 1, and there is no {', '.join(more) or 'other option'}"
            )
        self._held: list[Batch | Mapping[str, Tensor]] = []
        self._evaluated: list[dict[str, LossTerm]] = []

    def configure_optimizers(self) -> Any:
        """Make the optimizer of all that is trained."""
        return self.make_optimizer(parameter for parameter in self.parameters() if parameter.requires_grad)

    def on_fit_start(self) -> None:
        """Bring the teacher to where the student is."""
        self.distiller.to(self.device)

    on_validation_start = on_fit_start

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Hold micro-batches until those of an optimizer step are here, then take it."""
        self._held.append(batch)
        if len(self._held) < self.accumulate and not self.trainer.is_last_batch:
            return
        held, self._held = self._held, []
        values = self.distiller.backward(
            self.student, held, backward=self.manual_backward, no_sync=self._no_sync
        )
        optimizer = self.optimizers()
        if self.gradient_clip_val is not None:
            self.clip_gradients(optimizer, self.gradient_clip_val, "norm")
        optimizer.step()
        optimizer.zero_grad()
        schedulers = self.lr_schedulers()
        for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
            if scheduler is not None:
                scheduler.step()
        self.log_dict({f"train_{name}": value for name, value in values.items()}, batch_size=1)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Keep what one batch adds up."""
        taken = self.distiller.batch(batch).to(self.device)
        self._evaluated.append(self.distiller.sums(self.student, taken))

    def on_validation_epoch_end(self) -> None:
        """Divide once, by the counts of all batches of all processes."""
        values = self.distiller.evaluate(self._evaluated)
        self._evaluated = []
        self.log_dict({f"val_{name}": value for name, value in values.items()}, batch_size=1)

    def _no_sync(self) -> AbstractContextManager[Any]:
        model = self.trainer.strategy.model
        return model.no_sync() if isinstance(model, nn.parallel.DistributedDataParallel) else nullcontext()
