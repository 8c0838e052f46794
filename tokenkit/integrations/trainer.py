"""Distillation in transformers' `Trainer`, and the part of it that other trainers of its kind share.

    trainer = DistillationTrainer(model, args, teacher=teacher, losses={"clm": 1, "alm_unconstrained": 100},
                                  data_collator=AlignedCollator(tokenizer, teacher_tokenizer), ...)

The teacher's half of every micro-batch of an optimizer step runs before its first backward, because the
counts that the losses are divided by are those of the whole step: accumulation and ranks change nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from tokenkit.data.collate import AlignedCollator
from tokenkit.integrations.distiller import AUTOCAST, Counts, Distiller, FlatCollator
from tokenkit.integrations.whole_batches import filled
from tokenkit.structs import LossTerm

PARTS_FILE = "distillation_parts.safetensors"
UNUSED = {
    "compute_loss_func": "the losses are named by `losses`",
    "compute_metrics": "logits are never formed: evaluation returns every loss",
    "preprocess_logits_for_metrics": "logits are never formed",
}
"""What a `Trainer` takes, has no effect here, and is refused."""


class Prepared:
    """What a micro-batch carries from the teacher's half to the student's.

    Args:
        half: the teacher's, by loss.
        counts: of the whole optimizer step.
    """

    def __init__(self, half: dict[str, Any], counts: Counts):
        self.half, self.counts = half, counts


class Distills:
    """What makes a `Trainer` one that distills: mixed in before it.

    Args:
        args: of the trainer. `teacher`, `losses` and `loss_options` are those of `Distiller`, and
            `data_collator` is an `AlignedCollator`.
    """

    loss_is_scaled_for_ga = True
    distiller: Distiller
    args: Any
    accelerator: Any
    model: Any
    optimizer: Any
    eval_dataset: Any

    def __init__(
        self,
        *args: Any,
        teacher: Any,
        losses: Mapping[str, float],
        loss_options: Mapping[str, Mapping[str, Any]] | None = None,
        data_collator: AlignedCollator,
        **kwargs: Any,
    ):
        if not isinstance(data_collator, AlignedCollator):
            raise TypeError(
                f"data_collator must be an AlignedCollator of both tokenizers: got "
                f"{type(data_collator).__name__}"
            )
        for name, reason in UNUSED.items():
            if kwargs.get(name) is not None:
                raise ValueError(f"{name} has no effect in a distillation ({reason}): leave it out")
        kwargs["data_collator"] = FlatCollator(data_collator)
        super().__init__(*args, **kwargs)
        self._check_arguments()
        self.distiller = Distiller(
            self.model,
            teacher,
            data_collator,
            losses,
            loss_options,
            compute_dtype=AUTOCAST.get(self.accelerator.mixed_precision),
        )
        self._sums = _Sums(len(self.distiller.weights), self.args.device)
        self._evaluated: list[dict[str, LossTerm]] = []
        self._trained_anything = False

    def create_accelerator_and_postprocess(self) -> None:
        """Set what the batches need: rows as they are, and ranks that fetch batches of their own length."""
        self.args.remove_unused_columns = False
        self.args.label_names = ["labels"]
        self.args.accelerator_config.dispatch_batches = self.args.accelerator_config.dispatch_batches or False
        super().create_accelerator_and_postprocess()  # type: ignore[misc]

    def _check_arguments(self) -> None:
        if self.args.n_gpu > 1:
            raise ValueError(
                "several GPUs in one process (DataParallel) are not supported: start with torchrun"
            )
        if self.args.label_smoothing_factor:
            raise ValueError("label_smoothing_factor has no effect in a distillation: leave it out")
        config = getattr(self.accelerator, "parallelism_config", None)
        for name in ("tp_size", "cp_size", "sp_size"):
            if config is not None and getattr(config, name, 1) > 1:
                raise ValueError(
                    f"{name} above 1 is not supported: chunks and heads must be whole on each process"
                )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Collect the micro-batches of an optimizer step, and run the teacher's half on all of them."""
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]
        return self._prepared(samples) if samples else samples, items

    def _prepared(self, samples: list[Any]) -> list[Any]:
        batches = [self.distiller.batch(sample).to(self.args.device) for sample in samples]
        halves = self.distiller.prepare(self.model, batches)
        counts = self.distiller.counts(halves)
        self.distiller.parts.zero_grad()  # the Trainer's own zero_grad is the model's
        if not self._trained_anything:
            self._trained_anything = any(bool(count.any()) for count in counts.values())
            if not self._trained_anything:
                rows = sum(len(batch.student.ids_BT) for batch in batches)
                raise ValueError(self.distiller.collator.nothing_trained(rows))
        return [
            {**sample, "prepared": Prepared(half, counts)}
            for sample, half in zip(samples, halves, strict=True)
        ]

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return this micro-batch's part of the step's loss, times the processes that will average it."""
        if return_outputs:
            raise ValueError("there are no outputs to return: logits are never formed")
        batch = self.distiller.batch(inputs).to(self.args.device)
        prepared = inputs.get("prepared")
        if prepared is None:  # outside a training step: this batch is the whole
            (half,) = self.distiller.prepare(model, [batch], reduce=lambda sums: sums)
            prepared = Prepared(half, self.distiller.counts([half], reduce=lambda count: count))
            return self.distiller.loss(model, batch, prepared.half, prepared.counts).total
        loss, parts = self.distiller.loss(model, batch, prepared.half, prepared.counts)
        self._sums.add(parts)
        return loss * self.accelerator.num_processes

    @torch.no_grad()
    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """Return one batch's loss, and keep its sums: evaluation divides once, over all batches."""
        batch = self.distiller.batch(self._prepare_inputs(inputs))  # type: ignore[attr-defined]
        terms = self.distiller.sums(model, batch)
        self._evaluated.append(terms)
        loss = self.distiller.weigh({n: (t.total / t.count.clamp_min(1)).mean() for n, t in terms.items()})
        return loss.float(), None, None

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return the batches of an evaluation, in which no row is there twice; see `whole_batches`."""
        own = self.eval_dataset
        try:  # a name stays one: by it the Trainer keeps workers that persist
            self.eval_dataset = {k: self._filled(v) for k, v in own.items()} if isinstance(own, dict) else own
            if not isinstance(eval_dataset, str):
                eval_dataset = self._filled(own if eval_dataset is None else eval_dataset)
            return super().get_eval_dataloader(eval_dataset)  # type: ignore[misc]
        finally:
            self.eval_dataset = own

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """Return the batches of a prediction, as of an evaluation."""
        return super().get_test_dataloader(self._filled(test_dataset))  # type: ignore[misc]

    def _filled(self, rows: Any) -> Any:
        sorts = getattr(self.args, "train_sampling_strategy", None) == "group_by_length"
        if self.args.world_size == 1 or sorts:  # it looks for a column of lengths in the data set itself
            return rows
        return filled(rows, self.args.eval_batch_size * self.args.world_size)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Evaluate; losses are divided once, by the counts of all batches of all processes."""
        self._evaluated = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)  # type: ignore[misc]
        values = self.distiller.evaluate(self._evaluated)
        self._evaluated = []
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in values.items()})
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, beside the loss, each loss by name: unweighted, in nats, the mean over steps."""
        if "loss" in logs:
            logs.update(self._sums.means(list(self.distiller.weights), self.accelerator))
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run one micro-batch; count steps for the log."""
        self._sums.steps += bool(self.accelerator.sync_gradients)
        return super().training_step(*args, **kwargs)  # type: ignore[misc]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Make the optimizer; what losses train beside the model is in it, at the same rate."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        parts = list(self.distiller.parts.parameters())
        if is_new and parts:
            optimizer.add_param_group({"params": parts})
            self.distiller.average_parts(lambda: self.accelerator.sync_gradients)
        return optimizer

    def _save(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        super()._save(output_dir, *args, **kwargs)  # type: ignore[misc]
        state = self.distiller.parts.state_dict()
        if state and self.args.should_save:
            from safetensors.torch import save_file

            save_file(state, Path(output_dir or self.args.output_dir) / PARTS_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]
        file = Path(resume_from_checkpoint) / PARTS_FILE
        if file.is_file():
            from safetensors.torch import load_file

            self.distiller.parts.load_state_dict(load_file(file))


class _Sums:
    """Losses since the last line of the log, on the device."""

    def __init__(self, losses: int, device: torch.device):
        self.total_J = torch.zeros(losses, dtype=torch.float64, device=device)
        self.steps = 0

    def add(self, parts: Mapping[str, Tensor]) -> None:
        self.total_J += torch.stack(list(parts.values())).double()

    def means(self, names: list[str], accelerator: Any) -> dict[str, float]:
        mean_J = accelerator.reduce(self.total_J, "sum") / max(self.steps, 1)
        self.total_J, self.steps = torch.zeros_like(self.total_J), 0
        return dict(zip(names, mean_J.tolist(), strict=True))


class DistillationTrainer(Distills, Trainer):
    """A `Trainer` whose loss is any of this library's, against a teacher with another tokenizer.

    Everything else is the `Trainer`'s: LoRA models, bf16, `torch_compile`, DDP and FSDP2, streaming data,
    evaluation, checkpoints. `remove_unused_columns` is off, because the collator reads the rows as they are,
    and each rank fetches its own batches of a stream, because their lengths differ.

    Args:
        model: a `...ForCausalLM`, or one with PEFT adapters.
        args: `TrainingArguments`.
        teacher: a Hugging Face model, or the folder or name of one; neither trained nor saved.
        losses: weight of each loss, by name.
        loss_options: keyword arguments of a loss, by name.
        data_collator: an `AlignedCollator` of both tokenizers.
        kwargs: what else a `Trainer` takes.
    """

    def __init__(self, model: Any, args: TrainingArguments | None = None, **kwargs: Any):
        super().__init__(model, args or TrainingArguments(), **kwargs)
