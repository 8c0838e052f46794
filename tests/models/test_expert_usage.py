"""How evenly experts are used: numbers worked out by hand, and the counters of a model that trains."""

import json
import math

import pytest
import torch

from tests.commands.test_pretrain import PEER
from tokenkit.kernels.product_key_topk import MASS_UNITS
from tokenkit.models.causal_lm import LoadOptions
from tokenkit.models.expert_usage import ExpertUsage, metrics_of, too_small, usage_statistics
from tokenkit.models.new import new_causal_lm
from tokenkit.parallel import World
from tokenkit.training.expert_reports import HEATMAP, ExpertReports


def model_of(**peer):
    settings = {"model_type": "peer_mla", **PEER, "peer_config": {**PEER["peer_config"], **peer}}
    return new_causal_lm("new", settings, 300, LoadOptions())


def test_statistics_of_a_window():
    count = torch.tensor([0, 6, 1, 1])
    stats = usage_statistics(count, torch.tensor([0, 1, 1, 2]) * int(MASS_UNITS), 2.0)
    assert stats["coverage"] == 0.75
    assert stats["hot_experts"] == [[1, 6]], "more than twice the mean over all experts, which is 2"
    assert stats["top"][0] == [1, 6]
    assert stats["max_over_mean"] == 3
    assert stats["unevenness"] == pytest.approx(math.log(4) + 0.5 * math.log(0.25) + 0.5 * math.log(0.5))
    assert stats["gini"] == pytest.approx((2 * (1 * 0 + 2 * 1 + 3 * 1 + 4 * 6)) / (4 * 8) - 5 / 4)
    assert stats["is_window_too_small"]
    even = usage_statistics(torch.full((4,), 8), torch.full((4,), 3), 5.0)
    assert (even["hot"], even["unevenness"], even["gini"]) == (0, pytest.approx(0), pytest.approx(0))
    assert not even["is_window_too_small"]
    assert usage_statistics(torch.zeros(4), torch.zeros(4), 5.0)["coverage"] == 0


def test_only_training_counts_and_a_window_begins_anew(tmp_path):
    assert ExpertUsage.of(model_of()) is None, "nobody asked"
    model = model_of(log_expert_usage=True, log_freq=2, usage_threshold=3.0)
    usage = ExpertUsage.of(model)
    assert list(usage.layers) == [1], "the layer's number in the model"
    ids_BT = torch.arange(24).reshape(2, 12)
    model.eval()
    model(ids_BT)
    assert usage.layers[1][0].sum() == 0
    model.train()
    model(ids_BT)
    count, mass = (counter.clone() for counter in usage.layers[1])
    assert count.sum() == 24 * 2 * 2, "tokens, heads, experts per head"
    assert mass.sum() / MASS_UNITS == pytest.approx(24 * 2, rel=1e-5), "gates of a head add up to 1"
    found = usage.statistics(usage.counters())
    assert found[1]["uses"] == 96
    assert usage.layers[1][0].sum() == 0
    assert metrics_of(found)["expert_usage/layer_1_coverage"] == found[1]["coverage"]
    assert "raise log_freq to 6" in too_small(found, 2), "96 uses of 64 experts"

    class Seen:
        trackers = progress = None

        def __init__(self):
            self.lines, self.notes, self.trackers, self.progress, self.record = [], [], self, self, self

        def write(self, step, values):
            self.lines.append((step, values))

        def show(self, step, histograms, tables, images):
            self.shown = histograms, tables, images

        def note(self, words):
            self.notes.append(words)

    (tmp_path / "checkpoints").mkdir()
    seen, world = Seen(), World(0, 1, torch.device("cpu"), None)
    reports = ExpertReports(usage, tmp_path)
    for step in range(1, 5):
        model(ids_BT)
        reports.after_step(step, seen, world)
    window = reports.newest()
    reports.found = {}  # of later steps: the checkpoint may be written while they are taken
    reports.after_checkpoint(4, window, world)
    assert [step for step, _ in seen.lines] == [2, 4], "optimizer steps"
    assert len(seen.notes) == 1
    assert (tmp_path / HEATMAP).stat().st_size > 1000
    histograms, tables, images = seen.shown
    assert sum(histograms["expert_usage/layer_1_histogram"]) == 192
    assert tables["expert_usage/hot_experts"][0] == ("layer", "expert", "uses")
    assert images["expert_usage/top_experts_heatmap"] == tmp_path / HEATMAP
    stats = json.loads((tmp_path / "checkpoints" / "expert_stats_00000004.json").read_text())
    assert stats["layers"]["1"]["uses"] == 192
