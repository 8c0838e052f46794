"""Against the definitions, on explicit gradients."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenkit.objective.aggregation import mixing_matrix
from tokenkit.objective.options import parse_aggregation


def joined(text, gradients, weights=None, step=0):
    """Return what becomes of each gradient [J, P], and the weighted sum."""
    gradients = torch.as_tensor(gradients, dtype=torch.float64)
    weight = torch.ones(len(gradients), dtype=torch.float64) if weights is None else torch.tensor(weights)
    mix = mixing_matrix(parse_aggregation(text), gradients @ gradients.T, step, weight != 0)
    each = mix @ gradients
    return each, weight.double() @ each


def pcgrad_of_the_paper(gradients, step):
    """Algorithm 1 with explicit vectors."""
    shuffle = random.Random(step)
    projected = [gradient.clone() for gradient in gradients]
    for i, gradient in enumerate(projected):
        others = [j for j in range(len(gradients)) if j != i]
        shuffle.shuffle(others)
        for j in others:
            along = gradient @ gradients[j]
            if along < 0:
                gradient -= along / (gradients[j] @ gradients[j]) * gradients[j]
    return torch.stack(projected)


@st.composite
def gradients(draw):
    J, P = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    seed = draw(st.integers(0, 10_000))
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([10.0 ** draw(st.integers(-3, 3)) for _ in range(J)], dtype=torch.float64)
    return scale[:, None] * torch.randn(J, P, generator=generator, dtype=torch.float64)


@given(gradients())
def test_gradmag_gives_every_gradient_a_norm_of_one(g):
    each, _ = joined("gradmag", g)
    torch.testing.assert_close(each, g / g.norm(dim=1, keepdim=True))


@given(gradients(), st.floats(1e-3, 1e3))
def test_gradclip_bounds_norms_and_leaves_short_gradients_alone(g, limit):
    each, _ = joined(f"gradclip:{limit!r}", g)
    norm = g.norm(dim=1, keepdim=True)
    torch.testing.assert_close(each, torch.where(norm > limit, g * (limit / norm), g))


@given(gradients(), st.integers(0, 50))
def test_pcgrad_is_the_algorithm_of_the_paper(g, step):
    expected = pcgrad_of_the_paper(g, step)
    each, _ = joined("pcgrad", g, step=step)
    scale = g.norm(dim=1, keepdim=True)
    torch.testing.assert_close(each / scale, expected / scale, rtol=1e-6, atol=1e-6)


@given(gradients())
def test_pcgrad_leaves_no_conflict_between_two_losses(g):
    g = g[:2]
    each, _ = joined("pcgrad", g)
    norm = g.norm(dim=1)
    assert ((each @ g.T) >= -1e-9 * norm[:, None] * norm).all()


def test_pcgrad_by_hand():
    each, total = joined("pcgrad", [[1.0, 0.0], [-1.0, 1.0]])
    torch.testing.assert_close(each, torch.tensor([[0.5, 0.5], [0.0, 1.0]], dtype=torch.float64))
    torch.testing.assert_close(total, torch.tensor([0.5, 1.5], dtype=torch.float64))


def test_pcgrad_leaves_gradients_that_agree_alone():
    each, _ = joined("pcgrad", [[1.0, 0.0], [1.0, 1.0]])
    assert each.tolist() == [[1.0, 0.0], [1.0, 1.0]]


def test_the_order_of_projections_changes_with_the_step_and_repeats():
    g = torch.tensor([[1.0, 0.2, 0.0], [-1.0, 0.5, 0.3], [-0.4, -1.0, 0.1]])
    per_step = [joined("pcgrad", g, step=step)[1] for step in range(8)]
    assert any(not torch.allclose(per_step[0], other) for other in per_step)
    assert all(torch.equal(joined("pcgrad", g, step=s)[1], per_step[s]) for s in range(8))


def test_joined_functions_run_from_left_to_right():
    g = [[3.0, 0.0], [-4.0, 4.0]]
    unit_then_project, _ = joined("gradmag+pcgrad", g)
    project_then_unit, _ = joined("pcgrad+gradmag", g)
    root = 0.5**0.5
    assert unit_then_project.flatten().tolist() == pytest.approx([0.5, 0.5, 0.0, root])
    assert project_then_unit.flatten().tolist() == pytest.approx([root, root, 0.0, 1.0])


def test_a_gradient_that_was_projected_away_is_not_blown_up_to_norm_one():
    g = torch.tensor([[1.541, 0.7], [-1.541, -0.7000001]])
    each, _ = joined("pcgrad+gradmag", g)
    assert each.abs().max() < 1e-6


@given(gradients())
def test_approx_gradmag_is_gradmag_of_the_last_layer(g):
    torch.testing.assert_close(joined("approx_gradmag", g)[0], joined("gradmag", g)[0])


@given(gradients())
def test_preserve_mag_divides_by_the_sum_of_weights(g):
    inverse = 1 / g.norm(dim=1, keepdim=True)
    each, _ = joined("approx_gradmag_preserve_mag", g)
    torch.testing.assert_close(each, g * inverse / inverse.sum())


@pytest.mark.parametrize("text", ["gradmag", "pcgrad", "approx_gradmag", "approx_gradmag_preserve_mag"])
def test_a_gradient_of_zero_stays_zero_and_disturbs_nobody(text):
    with_zero, _ = joined(text, [[1.0, 2.0], [0.0, 0.0]])
    alone, _ = joined(text, [[1.0, 2.0]])
    assert with_zero.isfinite().all()
    assert with_zero[0].tolist() == alone[0].tolist()
    assert with_zero[1].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("text", ["pcgrad", "approx_gradmag_preserve_mag", "gradmag"])
def test_nobody_makes_way_for_a_loss_of_weight_zero(text):
    _, total = joined(text, [[1.0, 0.0], [-1.0, 1.0]], weights=[2.0, 0.0])
    _, alone = joined(text, [[1.0, 0.0]], weights=[2.0])
    assert total.tolist() == alone.tolist()


def test_static_weights_multiply_after_norms_are_set():
    _, total = joined("gradmag", [[100.0, 0.0], [0.0, 0.01]], weights=[1.0, 3.0])
    assert total.tolist() == pytest.approx([1.0, 3.0])


@pytest.mark.parametrize("text", ["gradmag", "gradclip:1", "approx_gradmag", "approx_gradmag_preserve_mag"])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_norm_that_is_not_finite_is_not_hidden(text, bad):
    gram = torch.tensor([[bad, 0.0], [0.0, 1.0]], dtype=torch.float64)
    mix = mixing_matrix(parse_aggregation(text), gram, 0, torch.tensor([True, True]))
    assert mix[0].isnan().any()


def test_none_means_no_function():
    assert parse_aggregation(None) == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gradmagg", "'gradmagg' is unknown, did you mean gradmag?"),
        ("pc+gradmag", "'pc' is unknown"),
        ("", "'' is unknown"),
        ("gradclip", "gradclip takes the largest norm.*got 'gradclip'"),
        ("gradclip:-1", "a positive number"),
        ("gradclip:x", "a positive number"),
        ("gradclip:inf", "a positive number"),
        ("gradmag:2", "gradmag takes no value"),
        ("gradmag+gradmag", "names a function twice"),
        ("gradnorm+gradmag", "gradnorm cannot be joined with another function"),
        ("pcgrad+approx_gradmag", "approx_gradmag cannot be joined"),
        ("gradmag+gradclip:1", "sets the norm of each gradient twice"),
    ],
)
def test_what_cannot_be_read_or_makes_no_sense_says_why(text, message):
    with pytest.raises(ValueError, match=message):
        parse_aggregation(text)
