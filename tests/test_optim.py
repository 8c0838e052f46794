"""Learning rates are pure functions of the step; every trainable parameter lands in one group."""

import pytest
import torch
from torch import nn

from tokenkit.optim import (
    LearningRate,
    build_optimizer,
    learning_rate,
    set_learning_rate,
)
from tokenkit.optim_options import SCHEDULES, OptimizerOptions, ParamGroup
from tokenkit.parallel import World
from tokenkit.run.checkpoint import Identity, State, restore, save


def rates(schedule, total=8, warmup=2, **options):
    options = OptimizerOptions(learning_rate=1.0, schedule=schedule, **options)
    return [learning_rate(step, options, total, warmup) for step in range(total + 1)]


def test_linear_warms_up_to_the_peak_and_falls_to_the_minimum():
    assert rates("linear", lr_min_ratio=0.4) == pytest.approx([0.5, 1, 1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4])


def test_cosine_is_half_way_down_in_the_middle_of_its_decay():
    values = rates("cosine", lr_min_ratio=0.2)
    assert values[2] == 1
    assert values[5] == pytest.approx(0.6)
    assert values[8] == pytest.approx(0.2)


def test_constant_ignores_the_warm_up_and_constant_with_warmup_does_not():
    assert rates("constant") == [1] * 9
    assert rates("constant_with_warmup") == [0.5] + [1] * 8


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_schedule_spends_a_step_at_rate_zero_or_above_the_peak(schedule):
    assert all(0 < rate <= 1 for rate in rates(schedule)[:-1])


@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (1, 1), (5, 5), (5, 9)])
def test_a_warm_up_as_long_as_the_run_is_no_division_by_zero(total, warmup):
    assert all(0 <= rate <= 1 for rate in rates("cosine", total, warmup))


def test_after_the_last_step_the_rate_stays_at_its_minimum():
    options = OptimizerOptions(learning_rate=2.0, lr_min_ratio=0.25)
    assert learning_rate(100, options, 10, 2) == pytest.approx(0.5)


def test_the_two_names_of_a_schedule_mean_the_same_and_may_not_differ():
    assert OptimizerOptions(lr_scheduler_type="linear").schedule_name == "linear"
    OptimizerOptions(lr_scheduler_type="cosine", schedule="linear_warmup_cosine_decay")
    with pytest.raises(ValueError, match="keep the one that is meant"):
        OptimizerOptions(lr_scheduler_type="linear", schedule="cosine")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0.0}, r"learning_rate must be positive, got 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be"),
        ({"learning_rate": float("inf")}, "learning_rate must be"),
        ({"beta2": 1.0}, r"beta2 must lie in \[0, 1\)"),
        ({"weight_decay": -1.0}, "weight_decay must be"),
        ({"lr_min_ratio": 1.5}, "lr_min_ratio must"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be"),
        ({"schedule": "cosin"}, "unknown schedule 'cosin', did you mean cosine"),
        ({"name": "lion"}, "unknown name 'lion': expected one of adamw"),
    ],
)
def test_bad_options_name_the_field_and_the_rule(options, message):
    with pytest.raises(ValueError, match=message):
        OptimizerOptions(**options)


def test_bad_groups_are_refused():
    with pytest.raises(ValueError, match="not a regular expression"):
        ParamGroup(pattern="(")
    with pytest.raises(ValueError, match="lr_scale"):
        ParamGroup(pattern="a", lr_scale=-1.0)


def model():
    return nn.ModuleDict({"embedding": nn.Embedding(5, 4), "body": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})


def test_matrices_are_decayed_and_vectors_are_not():
    named = dict(model().named_parameters())
    optimizer = build_optimizer(named.items(), OptimizerOptions(weight_decay=0.3))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: decay[id(p)] for name, p in named.items()} == {
        "embedding.weight": 0.3,
        "body.weight": 0.3,
        "body.bias": 0.0,
        "norm.weight": 0.0,
        "norm.bias": 0.0,
    }


def test_the_first_pattern_that_matches_sets_the_scale():
    named = dict(model().named_parameters())
    groups = (ParamGroup(pattern="embed", lr_scale=10.0), ParamGroup(pattern="weight$", lr_scale=0.5))
    optimizer = build_optimizer(named.items(), OptimizerOptions(param_groups=groups))
    set_learning_rate(optimizer, 2.0)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rate[id(named["embedding.weight"])] == 20.0
    assert rate[id(named["body.weight"])] == 1.0
    assert rate[id(named["body.bias"])] == 2.0


def test_a_pattern_that_matches_nothing_trainable_is_an_error():
    parameters = model()
    parameters["embedding"].requires_grad_(False)
    with pytest.raises(ValueError, match=r"'embed' matches none of the 4 trainable parameters"):
        build_optimizer(
            parameters.named_parameters(), OptimizerOptions(param_groups=(ParamGroup(pattern="embed"),))
        )


def test_a_frozen_model_is_an_error():
    with pytest.raises(ValueError, match="no parameter is trainable"):
        build_optimizer(model().requires_grad_(False).named_parameters(), OptimizerOptions())


@pytest.mark.parametrize("fused", [True, False])
def test_three_steps_match_the_formula_of_adamw(fused, device):
    options = OptimizerOptions(
        learning_rate=0.1, weight_decay=0.1, schedule="linear", use_fused_adam=fused, epsilon=1e-6
    )
    schedule = LearningRate(options, total_steps=3, warmup_steps=2)
    weight = nn.Parameter(torch.randn(3, 4, device=device))
    optimizer = build_optimizer([("weight", weight)], options)

    truth = weight.detach().double()
    first = second = torch.zeros_like(truth)
    for step in range(3):
        weight.grad = torch.randn_like(weight)
        grad = weight.grad.double()
        rate = schedule(step)
        set_learning_rate(optimizer, rate)
        optimizer.step()
        first = 0.9 * first + 0.1 * grad
        second = 0.95 * second + 0.05 * grad**2
        unbiased = (second / (1 - 0.95 ** (step + 1))).sqrt() + 1e-6
        truth = truth * (1 - rate * 0.1) - rate * first / (1 - 0.9 ** (step + 1)) / unbiased
    torch.testing.assert_close(weight.detach().double(), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", ["rowwise_adam", "rowwise_adagrad"])
def test_tables_of_experts_have_one_second_moment_a_row(how, tmp_path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.Module()
            self.experts.down = nn.Parameter(torch.linspace(-1, 1, 24).reshape(3, 2, 4).clone())
            self.other = nn.Parameter(torch.ones(2, 2))

    model = nn.ModuleDict({"layer": Model()})
    table = model["layer"].experts.down
    options = OptimizerOptions(learning_rate=0.1, weight_decay=0.5, use_fused_adam=False)
    experts = {"optimizer": how, "expert_lr": 0.02}
    optimizer = build_optimizer(model.named_parameters(), options, experts)
    set_learning_rate(optimizer, 0.1)
    expected, m, v = table.detach().double().clone(), 0.0, 0.0
    gradients = [torch.sin(torch.arange(24.0) + step).reshape(3, 2, 4) for step in range(3)]
    for step, gradient in enumerate(gradients, 1):
        table.grad, model["layer"].other.grad = gradient.clone(), torch.ones(2, 2)
        optimizer.step()
        g = gradient.double()
        square = g.square().mean((1, 2), keepdim=True)
        if how == "rowwise_adagrad":
            v = v + square
            expected = expected - 0.02 * g / (v.sqrt() + 1e-8)
            continue
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * square
        expected = expected - 0.02 * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
    assert torch.allclose(table.double(), expected, atol=1e-6)
    state = optimizer.state[table]
    assert state["row_sq"].shape == (3, 1, 1)
    assert ("exp_avg" in state) == (how == "rowwise_adam")
    assert (model["layer"].other < 1 - 0.1).all(), "the others are AdamW's, decayed"

    world = World(0, 1, torch.device("cpu"), None)
    save(tmp_path, State(module=model, optimizer=optimizer, step=1), Identity({}), world)
    again = nn.ModuleDict({"layer": Model()})
    other = build_optimizer(again.named_parameters(), options, experts)
    restore(tmp_path, State(module=again, optimizer=other), Identity({}), world)
    found = other.state[again["layer"].experts.down]
    assert torch.equal(found["row_sq"], state["row_sq"])
    assert found["step"] == 3
