import json
import math

import pytest
import torch

from tokenkit.objective.options import ObjectiveOptions
from tokenkit.objective.weights import Objective
from tokenkit.structs import LossTerm

NO_LOSSES = torch.zeros(2)


def term(total: float, count: float) -> LossTerm:
    return LossTerm(torch.tensor(total, requires_grad=True), torch.tensor(count))


def objective(weights=None, schedules=None, **options) -> Objective:
    return Objective(["a", "b"], weights, schedules, 10, ObjectiveOptions(**options))


def weigh(it: Objective, losses: list[float], step: int = 0) -> list[float]:
    return it.weigh(step, torch.tensor(losses)).tolist()


def test_totals_are_divided_by_the_counts_of_the_whole_step():
    counts = {"a": torch.tensor(4.0), "b": torch.tensor(10.0)}
    means = objective().means({"a": term(8.0, 1), "b": term(20.0, 1)}, counts)
    assert [mean.item() for mean in means] == [2.0, 2.0]


def test_a_step_with_nothing_to_count_is_zero_and_not_nan():
    total = torch.zeros((), requires_grad=True)
    (mean,) = Objective(["alm"], None, None, 10).means(
        {"alm": LossTerm(total, torch.tensor(0))}, {"alm": torch.tensor(0)}
    )
    mean.backward()
    assert mean == 0
    assert total.grad is not None
    assert torch.isfinite(total.grad)


def test_a_loss_in_several_parts_is_the_mean_of_their_quotients():
    parts = LossTerm(torch.tensor([8.0, 9.0]), torch.tensor([1, 1]))
    (mean,) = Objective(["alm"], None, None, 10).means({"alm": parts}, {"alm": torch.tensor([4, 3])})
    assert mean == 2.5


def test_weights_by_name_default_to_one_and_unknown_names_are_refused():
    assert Objective(["a", "b"], {"b": 3}, None, 1).weights(0) == {"a": 1.0, "b": 3.0}
    with pytest.raises(ValueError, match=r"names \['c'\]"):
        Objective(["a", "b"], {"c": 3}, None, 1)
    with pytest.raises(ValueError, match="one value per loss"):
        Objective(["a", "b"], [1.0], None, 1)


def test_a_schedule_multiplies_the_weight_of_its_loss():
    it = objective([2.0, 3.0], ["linear(1,0,10)", "constant(0.5)"])
    assert it.weights(5) == {"a": pytest.approx(1.0), "b": pytest.approx(1.5)}
    assert weigh(it, [4.0, 6.0], step=5) == pytest.approx([1.0, 1.5])


@pytest.mark.parametrize("s_init", [0.5, [0.5], [0.5, 0.5], {"a": 0.5, "b": 0.5}])
def test_uncertainty_starts_at_its_log_variance(s_init):
    it = objective([2.0, 1.0], weight_mode="uncertainty", s_init=s_init)
    assert weigh(it, [0.0, 0.0]) == pytest.approx([2 * math.exp(-0.5), math.exp(-0.5)])


def test_uncertainty_follows_the_gradient_of_its_scalar():
    it = objective([2.0, 1.0], weight_mode="uncertainty", s_init=[0.3, -1.0])
    losses = [3.0, 0.02]
    s = torch.tensor(it.log_variances, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([s], lr=0.01, betas=(0.9, 0.999))
    for step in range(5):
        optimizer.zero_grad()
        weight = torch.tensor([2.0, 1.0], dtype=torch.float64)
        (weight * (torch.exp(-s) * torch.tensor(losses, dtype=torch.float64) + s / 2)).sum().backward()
        optimizer.step()
        it.update(step, losses, [1, 1], [0, 0])
    assert it.log_variances == pytest.approx(s.tolist(), rel=1e-9)


def test_uncertainty_follows_a_schedule_of_its_loss():
    it = Objective(["a"], None, ["linear(4.0,0.25,3)"], 3, ObjectiveOptions(weight_mode="uncertainty"))
    weights = [it.weights(step)["a"] for step in range(4)]
    assert weights == pytest.approx([4.0, 2.75, 1.5, 0.25])
    s = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([s], lr=0.01)
    for step, weight in enumerate(weights):
        optimizer.zero_grad()
        (weight * (torch.exp(-s) * 3.0 + s / 2)).backward()
        optimizer.step()
        it.update(step, [3.0], [1], [0])
    assert it.log_variances == pytest.approx([s.item()], rel=1e-9)


def test_uncertainty_of_a_loss_of_zero_stays_within_bounds():
    it = objective(weight_mode="uncertainty", s_init=-49.99)
    for step in range(20):
        it.update(step, [0.0, 0.0], [1, 1], [0, 0])
    assert it.log_variances == [-50.0, -50.0]


def test_uncertainty_settles_where_the_scalar_is_smallest():
    it = objective(weight_mode="uncertainty")
    for step in range(600):
        it.update(step, [2.0, 0.1], [1, 1], [0, 0])
    assert it.log_variances == pytest.approx([math.log(4.0), math.log(0.2)], abs=1e-2)


def test_balance_makes_every_loss_one_and_keeps_the_sign_of_its_gradient():
    it = objective([1.0, 3.0], weight_mode="balance")
    assert it.needs() == "losses"
    assert weigh(it, [4.0, -0.5]) == pytest.approx([0.25, 6.0])


def test_balance_gives_a_loss_without_anything_to_count_no_weight():
    assert weigh(objective(weight_mode="balance"), [4.0, 0.0]) == [0.25, 0.0]


def test_ema_begins_as_balance_and_goes_on_with_the_mean_of_the_past():
    it = objective(weight_mode="ema", ema_alpha=0.75)
    assert it.needs() == "losses"
    assert weigh(it, [4.0, 0.5]) == [0.25, 2.0]
    it.update(0, [4.0, 0.5], [1, 1], [0, 0])
    assert it.needs() == "nothing"
    assert weigh(it, [100.0, 100.0], step=1) == [0.25, 2.0]
    it.update(1, [8.0, 0.5], [1, 1], [0, 0])
    assert weigh(it, [0.0, 0.0], step=2) == [1 / 5.0, 2.0]


def test_ema_waits_for_a_loss_that_was_not_there_yet():
    it = objective(weight_mode="ema", ema_alpha=0.75)
    it.update(0, [4.0, 0.0], [1, 0], [0, 0])
    assert it.needs() == "losses"
    assert weigh(it, [8.0, 0.5]) == [0.25, 2.0]


def gradnorm(**options) -> Objective:
    return objective(aggregation="gradnorm", **options)


def test_gradnorm_keeps_the_mean_of_its_weights_at_one_and_raises_the_weak_gradient():
    it = gradnorm()
    for step in range(20):
        assert sum(it.pulls) == pytest.approx(2)
        it.update(step, [1.0, 1.0], [1, 1], [4.0, 1.0])
    assert it.pulls[0] < 1 < it.pulls[1]


def test_the_mean_of_gradnorms_weights_is_one_also_where_most_of_them_fall():
    options = ObjectiveOptions(aggregation="gradnorm")
    it = Objective(["a", "b", "c"], None, None, 10, options)
    for step in range(20):
        it.update(step, [1.0] * 3, [1] * 3, [4.0, 4.0, 1.0])
        assert sum(it.pulls) == pytest.approx(3)
    assert it.pulls[0] == it.pulls[1] < 1 < it.pulls[2]


def test_gradnorm_settles_where_gradients_are_of_equal_norm_if_losses_fall_alike():
    it = gradnorm()
    for step in range(300):
        it.update(step, [1.0, 1.0], [1, 1], [3.0, 1.0])
    assert it.pulls == pytest.approx([0.5, 1.5], abs=0.05)


def test_gradnorm_pulls_harder_at_the_loss_that_lags_behind():
    fast_first = gradnorm(gradnorm_alpha=1.5)
    fast_first.update(0, [1.0, 1.0], [1, 1], [1.0, 1.0])
    for step in range(1, 20):
        fast_first.update(step, [0.2, 0.9], [1, 1], [1.0, 1.0])
    assert fast_first.pulls[0] < 1 < fast_first.pulls[1]


def test_gradnorm_with_alpha_zero_looks_at_norms_alone():
    it = gradnorm(gradnorm_alpha=0.0)
    it.update(0, [1.0, 1.0], [1, 1], [1.0, 1.0])
    it.update(1, [0.1, 0.9], [1, 1], [1.0, 1.0])
    assert it.pulls == [1.0, 1.0]


def test_no_weight_of_gradnorm_dies():
    it = gradnorm(gradnorm_lr=10.0)
    for step in range(5):
        it.update(step, [1.0, 1.0], [1, 1], [100.0, 1.0])
        assert min(it.pulls) > 0


@pytest.mark.parametrize("options", [{"weight_mode": "uncertainty"}, {"aggregation": "gradnorm"}])
def test_a_loss_that_was_not_there_or_weighs_nothing_teaches_nothing(options):
    it = objective([1.0, 0.0], **options)
    before = json.dumps(it.state_dict())
    it.update(0, [0.0, 3.0], [0, 1], [0.0, 1.0])
    assert json.dumps(it.state_dict()) == before


OPTIONS = [{"weight_mode": "uncertainty"}, {"weight_mode": "ema"}, {"aggregation": "gradnorm"}]


@pytest.mark.parametrize("options", OPTIONS)
def test_state_reads_back_from_json_to_the_same_bits(options):
    whole, broken = objective(**options), objective(**options)
    for step in range(6):
        if step == 3:
            state = json.loads(json.dumps(broken.state_dict()))
            broken = objective(**options)
            broken.load_state_dict(state)
        for it in (whole, broken):
            it.update(step, [1 / (3 + step), 0.7 * step + 0.1], [1, 1], [math.pi / (step + 1), 0.3])
    assert whole.state_dict() == broken.state_dict()
    assert weigh(whole, [1.0, 1.0], 6) == weigh(broken, [1.0, 1.0], 6)


def test_the_state_of_another_number_of_losses_is_refused():
    with pytest.raises(ValueError, match=r"must be of 1 losses \['a'\]"):
        Objective(["a"], None, None, 1).load_state_dict(objective().state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_mode": "balanced"}, "unknown weight_mode 'balanced', did you mean balance"),
        ({"weight_mode": "balance", "aggregation": "gradmag"}, "balance and .* gradmag both set the scale"),
        ({"weight_mode": "ema", "aggregation": "gradnorm"}, "ema and .* gradnorm both set the scale"),
        ({"ema_alpha": 1.0}, r"ema_alpha must lie in \[0, 1\), got 1.0"),
        ({"gradnorm_lr": 0.0}, "gradnorm_lr must be positive"),
        ({"gradnorm_alpha": -1.0}, "gradnorm_alpha must be at least 0"),
        ({"s_init": 1e3}, r"uncertainty_s_init must lie in \[-50.0, 50.0\]"),
        ({"s_init": [1.0, 2.0, 3.0]}, "uncertainty_s_init must give one value per loss"),
        ({"s_init": {"c": 1.0}}, r"uncertainty_s_init names \['c'\]"),
    ],
)
def test_options_that_cannot_be_used_say_why(options, message):
    with pytest.raises(ValueError, match=message):
        objective(**options)


def test_pcgrad_goes_with_weights_that_move():
    assert objective(weight_mode="balance", aggregation="pcgrad").needs() == "gradients"
