"""Distillation in TRL: in place of `SFTTrainer`'s loss and of `GOLDTrainer`'s.

    DistillationSFTTrainer(model, SFTConfig(...), teacher=..., losses=..., data_collator=..., ...)
    DistillationGOLDTrainer(model, GOLDConfig(...), ...)     # the student's own completions, too

Rows reach the collator as they are: it writes both tokenizers' templates. TRL's own packing and truncation
have no place in that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import Trainer
from trl import SFTConfig, SFTTrainer
from trl.experimental.gold import GOLDConfig, GOLDTrainer
from trl.experimental.utils import DataCollatorForChatML

from tokenkit.data.collate import AlignedCollator
from tokenkit.integrations.trainer import Distills
from tokenkit.integrations.whole_batches import Filler, real_rows

NO_EFFECT = {"packing": False, "padding_free": False, "loss_type": "nll", "assistant_only_loss": False}
"""Options of `SFTConfig` that act on what the collator replaces, and their defaults."""


class DistillationSFTTrainer(Distills, SFTTrainer):
    """An `SFTTrainer` whose loss is any of this library's, against a teacher with another tokenizer.

    Args:
        model: what an `SFTTrainer` takes.
        args: `SFTConfig`. Which tokens are trained says the collator (`loss_mask_mode`).
        kwargs: `teacher`, `losses`, `loss_options` and `data_collator` as for `DistillationTrainer`; what
            else an `SFTTrainer` takes, `peft_config` among it.
    """

    def __init__(self, model: Any, args: SFTConfig | None = None, **kwargs: Any):
        args = args or SFTConfig()
        _refuse(args, kwargs)
        args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
        super().__init__(model, args, **kwargs)


class DistillationGOLDTrainer(Distills, GOLDTrainer):
    """A `GOLDTrainer` whose loss is any of this library's; its tokenizers may be SentencePiece's.

    `lmbda`, generation, vLLM and the logging of completions are GOLD's. Its loss, and what belongs to it
    (`use_uld_loss`, `beta`, the options that begin with `uld_`), are replaced.

    Args:
        model: what a `GOLDTrainer` takes.
        args: `GOLDConfig`. Generated text is cut to the collator's lengths like any other.
        kwargs: `teacher`, `losses`, `loss_options` and `data_collator` as for `DistillationTrainer`; what
            else a `GOLDTrainer` takes, beside `teacher_model`.
    """

    data_collator: Any

    def __init__(self, model: Any, args: GOLDConfig | None = None, **kwargs: Any):
        args = args or GOLDConfig()
        if kwargs.pop("teacher_model", None) is not None:
            raise ValueError("teacher_model: give the teacher as `teacher`")
        _refuse(args, kwargs)
        args.use_uld_loss = args.use_extended_uld = False  # both cut texts at offsets of byte-level BPE
        super().__init__(model, args=args, teacher_model=_Elsewhere(), **kwargs)
        self.teacher_model = self.distiller.teacher
        self._window: list[Any] = []
        chat = DataCollatorForChatML(tokenizer=self._tokenizer, max_length=args.max_length)
        self.data_collator = _WithRows(chat)

    def get_batch_samples(self, *args: Any) -> tuple[list[Any], Any]:
        """Collect batches alone: what the student will have written is not known yet."""
        found: tuple[list[Any], Any] = Trainer.get_batch_samples(self, *args)
        return found

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """Let GOLD generate for the whole step, then align what stands there now."""
        steps = self.args.gradient_accumulation_steps
        is_new = self._step % steps == 0 or self._buffered_inputs is None
        taken = super()._prepare_inputs(generation_batch)
        if not self.model.training:
            return self._aligned(taken)
        if is_new:
            own = self._buffered_on_policy
            filled = zip(self._buffered_inputs, own, strict=True)
            self._window = self._prepared([self._aligned(one, is_own) for one, is_own in filled])
        return self._window[(self._step - 1) % steps]

    def _aligned(self, inputs: Mapping[str, Any], is_own: bool = False) -> dict[str, Tensor]:
        rows = inputs["rows"]
        if is_own:
            written = [labels[labels != -100] for labels in inputs["labels"]]
            texts = self.processing_class.batch_decode(written, skip_special_tokens=True)
            rows = [_answered(row, text) for row, text in zip(rows, texts, strict=True)]
        return dict(self.distiller.collator.collate(rows))


class _Elsewhere(nn.Module):
    """Stands where GOLD looks for its teacher, whose embeddings it would cut to the student's number."""

    def resize_token_embeddings(self, size: int) -> None:
        """Do nothing."""


class _WithRows:
    """GOLD's collator, and the rows themselves."""

    def __init__(self, inner: DataCollatorForChatML):
        self.inner = inner

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        kept = [
            {name: row[name] for name in ("messages", "prompt", "completion") if row.get(name) is not None}
            for row in real_rows(examples)
        ]
        whole = [row.row if isinstance(row, Filler) else row for row in examples]
        return {**self.inner(whole), "rows": kept}


def _answered(row: Mapping[str, Any], text: str) -> dict[str, Any]:
    """Put the student's own words in place of a row's answer."""
    answer = {"role": "assistant", "content": text}
    if "messages" in row:
        last = max(i for i, message in enumerate(row["messages"]) if message["role"] == "assistant")
        return {"messages": [*row["messages"][:last], answer]}
    return {"prompt": row["prompt"], "completion": text if isinstance(row["prompt"], str) else [answer]}


def _refuse(args: Any, kwargs: Mapping[str, Any]) -> None:
    """Raise ValueError where an option would act on what the collator replaces."""
    if not isinstance(kwargs.get("data_collator"), AlignedCollator):
        found = type(kwargs.get("data_collator")).__name__
        raise TypeError(f"data_collator must be an AlignedCollator of both tokenizers: got {found}")
    for name, default in NO_EFFECT.items():
        if getattr(args, name, default) != default:
            raise ValueError(
                f"{name} has no effect in a distillation, whose collator cuts and masks: leave it out"
            )
    if kwargs.get("formatting_func") is not None:
        raise ValueError("formatting_func has no effect in a distillation: give rows that the collator reads")
