"""One record of options serves code and doors: the same checks, each naming what its reader knows."""

import dataclasses
import pickle
import subprocess
import sys
from typing import get_args

import pytest

from tokenkit.config import ALIASES, ConfigError, TrainConfig, read_config
from tokenkit.config.schema import field_docs
from tokenkit.embeddings.options import MethodName
from tokenkit.embeddings.transfer import METHODS
from tokenkit.losses.options import (
    LOSSES,
    AlmOptions,
    GoldOptions,
    LossOptions,
    MinedOptions,
    SidePathOptions,
    UldOptions,
)
from tokenkit.models.options import LoraOptions
from tokenkit.objective.options import ObjectiveOptions
from tokenkit.optim_options import OptimizerOptions
from tokenkit.options import OptionError

NEEDED = {
    "student.pretrained_model_name_or_path": "m",
    "target_tokenizer_name": "byte",
    "data.dataset_name": "d",
}
INF = float("inf")


@pytest.mark.parametrize(
    ("record", "field", "value", "flag"),
    [
        (AlmOptions, "space_threshold", 5.0, "tokenizer_pair_bias_threshold"),
        (AlmOptions, "mode", "append_space+append_space", "alm_mode"),
        (AlmOptions, "mode", "none+append_space", "alm_mode"),
        (AlmOptions, "renyi_alpha", 1.0, "renyi_alpha"),
        (AlmOptions, "chunk_sizes", (), "distill_chunk_sizes"),
        (SidePathOptions, "bias_threshold", 2.0, "tokenizer_pair_bias_threshold_side_path"),
        (UldOptions, "temperature", 0.0, "baseline.kd_temp"),
        (MinedOptions, "alpha", 1.5, "baseline.adaptive_kl_alpha"),
        (GoldOptions, "beta", 2.0, "baseline.gold.beta"),
        (GoldOptions, "uld_hybrid_matched_weight", 1.0, "baseline.gold.uld_hybrid_matched_weight"),
        (LoraOptions, "dropout", 1.0, "model_lora_dropout"),
        (LoraOptions, "target_regex", "(", "model_lora_target_regex"),
        (ObjectiveOptions, "gradnorm_lr", 0.0, "baseline.gradnorm_lr"),
        (ObjectiveOptions, "aggregation", "gradclip", "multitask_aggregation_fn"),
        (OptimizerOptions, "learning_rate", -1.0, "optimizer.learning_rate"),
        (OptimizerOptions, "beta2", 1.0, "optimizer.beta2"),
    ],
)
def test_code_and_doors_refuse_alike_each_by_its_name(record, field, value, flag):
    with pytest.raises(ValueError, match=field if field != "aggregation" else flag):
        record(**{field: value})
    with pytest.raises(ConfigError, match=flag.replace(".", r"\.")):
        read_config(TrainConfig, (), NEEDED | {flag: value}, aliases=ALIASES)


@pytest.mark.parametrize(
    ("record", "field", "value"),
    [
        (AlmOptions, "chunks", "words"),
        (AlmOptions, "workspace_bytes", -1),
        (AlmOptions, "binarization_temp", INF),
        (OptimizerOptions, "learning_rate", INF),
        (OptimizerOptions, "weight_decay", float("nan")),
        (OptimizerOptions, "max_grad_norm", INF),
        (OptimizerOptions, "schedule", "cosin"),
    ],
)
def test_what_no_door_lets_in_is_refused_in_code_too(record, field, value):
    with pytest.raises(OptionError, match=field):
        record(**{field: value})


def test_two_names_of_one_schedule_agree_everywhere():
    both = {"schedule": "linear", "lr_scheduler_type": "linear_warmup_linear_decay"}
    flags = {f"optimizer.{name}": value for name, value in both.items()}
    assert read_config(TrainConfig, (), NEEDED | flags).optimizer == OptimizerOptions(**both)


def test_a_flag_of_several_losses_reaches_all_and_has_one_value():
    options = read_config(TrainConfig, (), NEEDED | {"baseline.kd_temp": 3.0}, say=print).objective.options
    assert {options.uld.temperature, options.dskd.temperature, options.xtoken.temperature} == {3.0}
    with pytest.raises(OptionError, match=r"baseline\.kd_temp is one option of several losses"):
        dataclasses.replace(options, uld=UldOptions())


def test_every_loss_of_the_table_has_its_options_in_the_configuration():
    held = LossOptions()
    for name, entry in LOSSES.items():
        given = held.of(name)
        assert given == {**{f.name: f.default for f in dataclasses.fields(entry.options)}, **entry.fixed}, (
            name
        )


def test_every_option_is_explained():
    for entry in LOSSES.values():
        assert set(field_docs(entry.options)) >= {field.name for field in dataclasses.fields(entry.options)}


def test_an_error_survives_its_way_to_another_process():
    error = pickle.loads(pickle.dumps(OptionError("{a} got {!r}", "{b}")))
    assert str(error) == "a got '{b}'"
    assert error.said({"a": "flag.a"}) == "flag.a got '{b}'"


def test_the_methods_of_a_transfer_are_those_of_its_flag():
    assert set(get_args(MethodName)) == set(METHODS)


def test_options_load_no_torch():
    code = (
        "import sys, tokenkit.losses.options, tokenkit.objective.options, tokenkit.models.options, "
        "tokenkit.optim_options, tokenkit.tokenization.options, tokenkit.embeddings.options\n"
        "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
