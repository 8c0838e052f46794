"""Runs with weights that move and gradients that are joined: what they log, and resumes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.ranks import run_ranks
from tests.training.test_gradients import WAYS
from tests.training.test_resume import curve
from tokenkit import parallel
from tokenkit.errors import ExitCode
from tokenkit.parallel import World
from tokenkit.training import loop
from tokenkit.training.build import build
from tokenkit.training.reports import Reports
from tokenkit.training.step import train_step

SINGLE = World(0, 1, torch.device("cpu"), None)


@pytest.fixture
def config_of(make_config):
    def make(way, **changes):
        settings = {
            "losses": ["clm", "alm_space"],
            "train_model_mode": "full",
            "steps": 4,
            "save_interval": 2,
        }
        return make_config(**{**settings, **WAYS[way], **changes})

    return make


class BrokenError(Exception):
    """The machine died."""


def train_until(config, break_at):
    """Train, and stop without a word once step `break_at` was reported."""
    report = Reports.step

    def report_and_break(self, step, *args, **kwargs):
        report(self, step, *args, **kwargs)
        if step == break_at:
            raise BrokenError

    Reports.step = report_and_break
    try:
        with pytest.raises(BrokenError):
            loop.train(config)
    finally:
        Reports.step = report


def assert_same(whole: Path, broken: Path) -> None:
    assert curve(broken) == curve(whole)
    weights = [load_file(folder / "export" / "model.safetensors") for folder in (whole, broken)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


@pytest.mark.parametrize("way", ["uncertainty", "ema", "gradnorm", "gradmag+pcgrad"])
def test_a_broken_run_resumes_to_the_same_bits(config_of, tmp_path, way):
    assert loop.train(config_of(way, output_dir=tmp_path / "whole")) == ExitCode.DONE
    broken = config_of(way, output_dir=tmp_path / "broken", resume="true")
    train_until(broken, 3)
    assert loop.train(broken) == ExitCode.DONE
    assert_same(tmp_path / "whole", tmp_path / "broken")
    weights = [line["weight/alm_space"] for line in curve(tmp_path / "whole") if "weight/alm_space" in line]
    assert len(weights) == 4
    assert len(set(weights)) >= 3, "the weight never moved"


def whole_and_broken(world, whole, broken):
    parallel.start = lambda **_: world
    parallel.stop = lambda _: None
    assert loop.train(whole) == ExitCode.DONE
    train_until(broken, 3)
    return int(loop.train(broken))


@pytest.mark.parametrize("way", ["uncertainty", "gradnorm"])
def test_two_processes_resume_to_the_same_bits(config_of, tmp_path, way):
    whole = config_of(way, output_dir=tmp_path / "whole")
    broken = config_of(way, output_dir=tmp_path / "broken", resume="true")
    assert run_ranks(whole_and_broken, 2, whole, broken) == [ExitCode.DONE] * 2
    assert_same(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.parametrize("way", WAYS)
def test_every_way_lowers_a_loss_and_says_what_each_loss_weighs(config_of, way):
    parts = build(config_of(way, **{"optimizer.learning_rate": 3e-3}), SINGLE)
    (batch,) = next(parts.batches)
    reports = []
    for _ in range(4):
        reports.append(train_step(parts.run, [batch]))
        parts.run.step += 1
    first, last = reports[0].losses, reports[-1].losses
    assert any(last[name] < first[name] for name in first)
    assert all(report.weights.keys() == report.losses.keys() for report in reports)
    user = parts.run.objective.weights(0)
    for report in reports:
        assert report.loss == pytest.approx(sum(user[name] * loss for name, loss in report.losses.items()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"multitask_aggregation_fn": "gradmagg"}, "'gradmagg' is unknown, did you mean gradmag?"),
        ({"multitask_aggregation_fn": "gradclip"}, "gradclip takes the largest norm"),
        ({"multitask_aggregation_fn": "gradnorm+gradmag"}, "gradnorm cannot be joined"),
        ({"multitask_aggregation_fn": "gradmag", "loss_weight_mode": "ema"}, "both set the scale"),
        ({"loss_weight_mode": "balanse"}, "did you mean balance?"),
        ({"ema_alpha": 1}, "ema_alpha must lie in"),
        ({"baseline.gradnorm_lr": 0}, "baseline.gradnorm_lr must be positive"),
        ({"baseline.gradnorm_alpha": -1}, "baseline.gradnorm_alpha must be at least 0"),
        ({"uncertainty_s_init": [1, 2, 3]}, "uncertainty_s_init must give one value per loss"),
        ({"uncertainty_s_init": ["cml=1"]}, "uncertainty_s_init names cml, but"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_loaded(make_config, changes, message):
    wrong = {"student.pretrained_model_name_or_path": "nobody/nothing", **changes}
    with pytest.raises(ValueError, match=message):
        build(make_config(**wrong), SINGLE)


@pytest.mark.parametrize("given", [0.5, [0.5, 0.5], ["clm=0.5", "alm_unconstrained=0.5"]])
def test_log_variances_start_where_the_flag_says(make_config, given):
    config = make_config(loss_weight_mode="uncertainty", uncertainty_s_init=given)
    assert build(config, SINGLE).run.objective.log_variances == [0.5, 0.5]
