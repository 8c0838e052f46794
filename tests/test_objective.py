import pytest
import torch

from tokenkit.objective import Objective, parse_schedule
from tokenkit.structs import LossTerm


def term(total: float, count: float) -> LossTerm:
    return LossTerm(torch.tensor(total, requires_grad=True), torch.tensor(count))


def test_totals_are_divided_by_the_counts_of_the_whole_step():
    objective = Objective(["clm", "alm"], [2.0, 0.5], None, 10)
    counts = {"clm": torch.tensor(4.0), "alm": torch.tensor(10.0)}
    loss, means = objective.combine({"clm": term(8.0, 1), "alm": term(20.0, 1)}, counts, step=0)
    torch.testing.assert_close(means, torch.tensor([2.0, 2.0]))
    torch.testing.assert_close(loss, torch.tensor(5.0))


def test_a_step_with_nothing_to_count_is_zero_and_not_nan():
    objective = Objective(["alm"], None, None, 10)
    total = torch.zeros((), requires_grad=True)
    loss, _ = objective.combine({"alm": LossTerm(total, torch.tensor(0))}, {"alm": torch.tensor(0)}, step=0)
    loss.backward()
    assert loss == 0
    assert total.grad is not None
    assert torch.isfinite(total.grad)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("constant", [1, 1, 1]),
        ("constant(0.3)", [0.3, 0.3, 0.3]),
        ("linear", [1, 0.5, 0]),
        ("linear(0, 2, 5)", [0, 2, 2]),
        ("cosine", [1, 0.5, 0]),
        ("reverse_cosine", [0, 0.5, 1]),
        ("cosine(1e-1,0.3,10)", [0.1, 0.2, 0.3]),
    ],
)
def test_schedules_at_start_middle_and_end(text, values):
    schedule = parse_schedule(text, 10)
    assert [schedule(step) for step in (0, 5, 10)] == pytest.approx(values)


@pytest.mark.parametrize("text", ["", "linear(1,2)", "constant()", "exp(1)", "linear(1,2,0)", "cosine 1"])
def test_a_schedule_that_cannot_be_read_is_named(text):
    with pytest.raises(ValueError, match="is no schedule"):
        parse_schedule(text, 10)


def test_weights_by_name_default_to_one_and_unknown_names_are_refused():
    assert Objective(["a", "b"], {"b": 3}, None, 1).weights(0) == {"a": 1.0, "b": 3.0}
    with pytest.raises(ValueError, match=r"names \['c'\]"):
        Objective(["a", "b"], {"c": 3}, None, 1)
    with pytest.raises(ValueError, match="one value per loss"):
        Objective(["a", "b"], [1.0], None, 1)


def test_a_schedule_multiplies_the_weight_of_its_loss():
    objective = Objective(["a", "b"], [2.0, 3.0], ["linear(1,0,10)", "constant(0.5)"], 10)
    assert objective.weights(5) == {"a": pytest.approx(1.0), "b": pytest.approx(1.5)}
    counts = dict.fromkeys(("a", "b"), torch.tensor(1.0))
    loss, _ = objective.combine({"a": term(4.0, 1), "b": term(6.0, 1)}, counts, step=5)
    torch.testing.assert_close(loss, torch.tensor(13.0))


def test_a_loss_in_several_parts_is_the_mean_of_their_quotients():
    objective = Objective(["alm"], None, None, 10)
    parts = LossTerm(torch.tensor([8.0, 9.0]), torch.tensor([1, 1]))
    loss, _ = objective.combine({"alm": parts}, {"alm": torch.tensor([4, 3])}, step=0)
    torch.testing.assert_close(loss, torch.tensor(2.5))
