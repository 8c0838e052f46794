"""Distillation as a plugin of Axolotl.

    plugins:
      - tokenkit.integrations.axolotl.DistillationPlugin
    distillation_teacher: path/or/name
    distillation_losses: {clm: 1.0, alm_unconstrained: 100.0}

Rows go to the collator as they are, so `datasets` names files or data sets with `text`, `messages`, or
prompt and completion; Axolotl's prompt strategies, packing and cache of token ids have no part in it.
"""

from __future__ import annotations

import functools
import math
from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from tokenkit.data.collate import AlignedCollator
from tokenkit.integrations.distiller import FlatCollator
from tokenkit.integrations.trainer import Distills
from tokenkit.tokenization.options import LossMaskMode

NO_EFFECT = (
    "sample_packing",
    "eval_sample_packing",
    "pretraining_dataset",
    "train_on_inputs",
    "skip_prepare_dataset",
)
"""Settings of Axolotl that act on what the collator replaces."""


class DistillationArgs(BaseModel):
    """What the plugin adds to a configuration of Axolotl."""

    distillation_teacher: str | None = None
    """Folder or name of the teacher; unset: the plugin does nothing."""
    distillation_teacher_tokenizer: str | None = None
    """Its tokenizer; unset: that of its folder."""
    distillation_losses: dict[str, float] | None = None
    """Weight of each loss, by name; see docs/losses.md."""
    distillation_loss_options: dict[str, dict[str, Any]] | None = None
    """Keyword arguments of a loss, by name."""
    distillation_loss_mask_mode: LossMaskMode | None = None
    """Which tokens are trained; see `AlignedCollator`."""


class DistillationPlugin(BasePlugin):
    """What Axolotl asks of a plugin."""

    def get_input_args(self) -> str:
        """Return where the plugin's settings are declared."""
        return "tokenkit.integrations.axolotl.DistillationArgs"

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> Any:
        """Return the rows as they are, in place of Axolotl's token ids."""
        if not cfg.distillation_teacher:
            return None
        from axolotl.common.datasets import TrainDatasetMeta

        check_settings(cfg)
        train = _rows(cfg.datasets, "datasets")
        held_out = _rows(cfg.test_datasets, "test_datasets") if cfg.test_datasets else None
        if cfg.val_set_size and held_out is None:
            parts = train.train_test_split(test_size=cfg.val_set_size, seed=cfg.seed or 0)
            train, held_out = parts["train"], parts["test"]
        steps = cfg.max_steps
        if not steps or steps < 0:
            size = cfg.micro_batch_size * cfg.gradient_accumulation_steps * max(cfg.world_size or 1, 1)
            steps = math.ceil(len(train) / size) * (cfg.num_epochs or 1)
        return TrainDatasetMeta(train_dataset=train, eval_dataset=held_out, total_num_steps=int(steps))

    def get_trainer_cls(self, cfg: Any) -> type | None:
        """Return Axolotl's trainer with the losses of `cfg` in it."""
        if not cfg.distillation_teacher:
            return None
        from axolotl.core.trainers.base import AxolotlTrainer

        class AxolotlDistillationTrainer(Distills, AxolotlTrainer):
            """Axolotl's trainer, distilling; it hands over what it built its collator of."""

            def __init__(self, *args: Any, **kwargs: Any):
                kwargs["eval_data_collator"] = FlatCollator(kwargs["data_collator"])
                super().__init__(
                    *args,
                    teacher=cfg.distillation_teacher,
                    losses=dict(cfg.distillation_losses),
                    loss_options=dict(cfg.distillation_loss_options or {}),
                    **kwargs,
                )

        return AxolotlDistillationTrainer

    def get_collator_cls_and_kwargs(
        self, cfg: Any, is_eval: bool = False
    ) -> tuple[Any, dict[str, Any]] | None:
        """Return what makes the collator of Axolotl's tokenizer and the teacher's."""
        if not cfg.distillation_teacher:
            return None
        make = functools.partial(
            make_collator,
            teacher=cfg.distillation_teacher_tokenizer or cfg.distillation_teacher,
            length=cfg.sequence_len,
            loss_mask_mode=cfg.distillation_loss_mask_mode,
        )
        return make, {}


def make_collator(
    tokenizer: Any, *, teacher: str, length: int, loss_mask_mode: LossMaskMode | None, **_: Any
) -> AlignedCollator:
    """Make the collator; what else Axolotl gives its own (`padding`, `pad_to_multiple_of`) is passed over."""
    return AlignedCollator(
        tokenizer,
        teacher,  # type: ignore[arg-type]
        max_length_student=length,
        max_length_teacher=2 * length,
        loss_mask_mode=loss_mask_mode,
    )


def check_settings(cfg: Any) -> None:
    """Raise ValueError where a setting is missing, or would act on what the collator replaces."""
    if not cfg.distillation_losses:
        raise ValueError("distillation_losses must give a weight by name, such as {clm: 1.0}")
    acting = [name for name in NO_EFFECT if cfg.get(name)]
    if acting:
        raise ValueError(f"{', '.join(acting)} has no effect in a distillation: leave it out")


def _rows(entries: Any, field: str) -> Any:
    """Read data sets whole; each entry's `path`, `name`, `split`, `data_files` and `ds_type` count."""
    from datasets import concatenate_datasets, load_dataset

    if not entries:
        raise ValueError(f"{field} names no data")
    found = []
    for entry in entries:
        files = entry.get("data_files") or entry["path"]
        is_file = entry.get("ds_type") or str(entry["path"]).endswith((".json", ".jsonl"))
        kind = (entry.get("ds_type") or "json") if is_file else entry["path"]
        more = {"data_files": files} if is_file or entry.get("data_files") else {}
        found.append(load_dataset(kind, entry.get("name"), split=entry.get("split") or "train", **more))
    return concatenate_datasets(found) if len(found) > 1 else found[0]
