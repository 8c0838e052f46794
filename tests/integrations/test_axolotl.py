"""Axolotl's plugin, called as Axolotl 0.19 calls it: inside it where it is installed, else on a stand-in."""

import dataclasses
import importlib.util
import sys
import types

import pytest
import torch
from transformers import AutoTokenizer, Trainer, TrainingArguments

from tests.integrations.test_trainer import KeepGradients

INSTALLED = importlib.util.find_spec("axolotl") is not None


class StandIn(Trainer):
    """What Axolotl's trainer adds to the constructor, and where it takes the collator of evaluation from."""

    def __init__(self, *args, bench_data_collator=None, eval_data_collator=None, dataset_tags=None, **kwargs):
        self.eval_data_collator = eval_data_collator
        super().__init__(*args, **kwargs)

    def get_eval_dataloader(self, eval_dataset=None):
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        return torch.utils.data.DataLoader(rows, 2, collate_fn=self.eval_data_collator)


@dataclasses.dataclass
class Meta:
    train_dataset: object
    eval_dataset: object = None
    total_num_steps: int | None = None


class Settings(dict):
    """Like Axolotl's: what is not set is None."""

    def __getattr__(self, name):
        return self.get(name)


@pytest.fixture
def plugin(monkeypatch):
    if not INSTALLED:
        contents = {
            "axolotl": {},
            "axolotl.integrations": {},
            "axolotl.integrations.base": {"BasePlugin": object},
            "axolotl.common": {},
            "axolotl.common.datasets": {"TrainDatasetMeta": Meta},
            "axolotl.core": {},
            "axolotl.core.trainers": {},
            "axolotl.core.trainers.base": {"AxolotlTrainer": StandIn},
        }
        for name, inside in contents.items():
            module = types.ModuleType(name)
            vars(module).update(inside)
            monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "tokenkit.integrations.axolotl", raising=False)
    module = importlib.import_module("tokenkit.integrations.axolotl")
    yield module.DistillationPlugin()
    sys.modules.pop("tokenkit.integrations.axolotl", None)


def make_settings(folders, teacher, rows_file, **changes):
    settings = {
        "distillation_teacher": str(teacher),
        "distillation_teacher_tokenizer": str(folders[1]),
        "distillation_losses": {"clm": 1.0, "alm_unconstrained": 20.0},
        "datasets": [{"path": str(rows_file)}],
        "val_set_size": 2,
        "sequence_len": 64,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "num_epochs": 2,
    }
    return Settings({**settings, **changes})


def test_a_run_as_axolotl_makes_it(plugin, models, folders, rows_file, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    models[1].save_pretrained(tmp_path / "teacher")
    cfg = make_settings(folders, tmp_path / "teacher", rows_file)
    where = plugin.get_input_args().rpartition(".")
    assert getattr(importlib.import_module(where[0]), where[2]).model_validate(dict(cfg)).distillation_losses
    data = plugin.load_datasets(cfg)
    assert (len(data.train_dataset), len(data.eval_dataset), data.total_num_steps) == (6, 2, 2)
    collators = []
    for is_eval in (False, True):  # the builder's own arguments come along
        make, more = plugin.get_collator_cls_and_kwargs(cfg, is_eval=is_eval)
        collators.append(make(AutoTokenizer.from_pretrained(folders[0]), padding=True, **more))
    arguments = TrainingArguments
    if INSTALLED:
        arguments = importlib.import_module("axolotl.core.training_args").AxolotlTrainingArguments
    kept = KeepGradients()
    trainer = plugin.get_trainer_cls(cfg)(
        model=models[0],
        args=arguments(
            output_dir=str(tmp_path / "out"),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=3,
            max_steps=data.total_num_steps,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=data.train_dataset,
        eval_dataset=data.eval_dataset,
        data_collator=collators[0],
        eval_data_collator=collators[1],
        callbacks=[kept],
    )
    trainer.train()
    assert len(kept.steps) == 2
    assert all(bool(gradient.any()) for gradient in kept.steps)
    assert trainer.evaluate()["eval_clm"] > 0


def test_it_does_nothing_where_no_teacher_is_named(plugin):
    cfg = Settings(datasets=[{"path": "x"}])
    assert plugin.load_datasets(cfg) is None
    assert plugin.get_trainer_cls(cfg) is None
    assert plugin.get_collator_cls_and_kwargs(cfg) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample_packing": True}, "sample_packing has no effect"),
        ({"distillation_losses": None}, "distillation_losses must give a weight"),
        ({"datasets": []}, "datasets names no data"),
    ],
)
def test_settings_that_cannot_act_are_refused(change, message, plugin, folders, rows_file):
    with pytest.raises(ValueError, match=message):
        plugin.load_datasets(make_settings(folders, "teacher", rows_file, **change))
