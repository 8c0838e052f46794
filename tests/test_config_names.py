"""The names and defaults that the configuration repeats, so as not to import torch, are those of the code."""

import dataclasses
import typing
from typing import get_args

from tokenkit.config import names
from tokenkit.config.gold import Gold
from tokenkit.config.models import Lora, Optimizer
from tokenkit.config.objective import Alm, Objective
from tokenkit.kernels.alm_difference import DIFFERENCES
from tokenkit.losses import LOSSES, AlmOptions, GoldRules, answers, rows
from tokenkit.losses import alm as alm_module
from tokenkit.models.causal_lm import DTYPES
from tokenkit.models.lora import LoraOptions
from tokenkit.objective import ObjectiveOptions, aggregation, weights
from tokenkit.optim import SCHEDULES, OptimizerOptions, ParamGroup
from tokenkit.pairing import align
from tokenkit.tokenization import byteify, chat


def defaults(options):
    return {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}


def test_losses_and_their_aliases():
    aliases = {alias: name for name, loss in LOSSES.items() for alias in loss.aliases}
    assert set(names.LOSS_NAMES) == set(LOSSES) | set(aliases)
    assert aliases == names.LOSS_ALIASES


def test_losses_without_a_teacher():
    alone = {name for name, loss in LOSSES.items() if not loss.needs_teacher}
    assert {names.LOSS_ALIASES.get(name, name) for name in names.LOSSES_WITHOUT_TEACHER} == alone


def test_options_of_alm():
    assert get_args(names.Difference) == DIFFERENCES
    assert set(names.ALM_MODES) == {*alm_module.MODES, "none"}
    assert names.Numerator == alm_module.Numerator
    assert names.Denominator == alm_module.Denominator
    assert AlmOptions(**Alm().options("space")) == AlmOptions(chunks="space")


def test_options_of_the_baselines():
    assert GoldRules(**Gold().rules()) == GoldRules()
    assert defaults(Gold()) == defaults(GoldRules())
    assert names.Divergence == rows.Divergence
    assert names.MergeStrategy == answers.Strategy


def test_options_of_the_objective():
    assert set(names.AGGREGATIONS) == set(aggregation.AGGREGATIONS)
    assert ObjectiveOptions(**Objective().weighing()) == ObjectiveOptions()
    assert get_args(get_args(typing.get_type_hints(Objective)["loss_weight_mode"])[0]) == get_args(
        weights.WeightMode
    )


def test_options_of_text():
    assert names.ChatTemplateMode == chat.ChatTemplateMode
    assert names.LossMaskMode == chat.LossMaskMode
    assert names.SpecialTokensMode == align.SpecialTokensMode
    assert set(names.SPACE_MASK_PARTS) == {*byteify.SPACE_BYTES, "special"}


def test_options_of_training():
    assert set(get_args(names.Dtype)) == set(DTYPES)
    assert set(get_args(names.LearningRateSchedule)) == set(SCHEDULES)
    assert defaults(Optimizer()) == defaults(OptimizerOptions())
    assert {f.name for f in dataclasses.fields(ParamGroup)} == {"pattern", "lr_scale"}
    lora = {name.removeprefix("model_lora_"): value for name, value in defaults(Lora()).items()}
    assert lora == defaults(LoraOptions())
