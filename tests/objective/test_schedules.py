import pytest

from tokenkit.objective.options import parse_schedule


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("constant", [1, 1, 1]),
        ("constant(0.3)", [0.3, 0.3, 0.3]),
        ("linear", [1, 0.5, 0]),
        ("linear(0, 2, 5)", [0, 2, 2]),
        ("cosine", [1, 0.5, 0]),
        ("reverse_cosine", [0, 0.5, 1]),
        ("step(0,2,5)", [0, 2, 2]),
        ("step(0,1,6)", [0, 0, 1]),
        ("cosine(1e-1,0.3,10)", [0.1, 0.2, 0.3]),
    ],
)
def test_schedules_at_start_middle_and_end(text, values):
    schedule = parse_schedule(text, 10)
    assert [schedule(step) for step in (0, 5, 10)] == pytest.approx(values)


@pytest.mark.parametrize(
    "text", ["", "linear(1,2)", "constant()", "exp(1)", "linear(1,2,0)", "cosine 1", "step(0,1)"]
)
def test_a_schedule_that_cannot_be_read_is_named(text):
    with pytest.raises(ValueError, match="is no schedule"):
        parse_schedule(text, 10)
