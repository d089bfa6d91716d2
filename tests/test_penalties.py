"""Penalties: one value per example, zero at equality, and the curvature that they claim."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockprop.gluing import Gluing
from blockprop.penalties import Custom, Huber, Penalty, Squared, per_link


def squares(a, b):
    return (a - b).square().flatten(1).sum(1)


PENALTIES = [Squared(), Squared(0.3), Huber(0.7, 0.4), Custom(squares)]


@pytest.mark.parametrize("penalty", PENALTIES, ids=lambda penalty: type(penalty).__name__)
@pytest.mark.parametrize("shape", [(3,), (2, 4), (2, 3, 5)])
def test_a_value_per_example_zero_at_equality_and_positive_elsewhere(penalty, shape):
    output = torch.randn(4, *shape, dtype=torch.float64)
    same = penalty(Gluing(output, torch.zeros_like(output), 4), output)
    assert torch.equal(same, torch.zeros(4, dtype=torch.float64))
    moved = torch.zeros_like(output)
    moved[2].view(-1)[0] = 0.1
    apart = penalty(Gluing(output, moved, 4), output)
    assert apart[2] > 0
    assert torch.equal(apart[[0, 1, 3]], torch.zeros(3, dtype=torch.float64))
    assert isinstance(penalty, Penalty)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(weight=st.floats(1e-3, 1e3), delta=st.floats(1e-2, 10), r=st.floats(-20, 20))
def test_values_are_the_formulas(weight, delta, r):
    gluing = Gluing(torch.zeros(1, 1, dtype=torch.float64), torch.full((1, 1), r, dtype=torch.float64), 1)
    output = torch.zeros(1, 1, dtype=torch.float64)
    assert Squared(weight)(gluing, output).item() == pytest.approx(weight * r**2)
    expected = weight * r**2 if abs(r) <= delta else weight * delta * (2 * abs(r) - delta)
    assert Huber(weight, delta)(gluing, output).item() == pytest.approx(expected)


@pytest.mark.parametrize("penalty", PENALTIES[:3], ids=str)
def test_the_curvature_is_the_second_derivative_at_equality(penalty):
    output = torch.randn(1, 3, dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(
        lambda d: penalty(Gluing(output, d, 1), output).sum(), torch.zeros(1, 3, dtype=torch.float64)
    ).view(3, 3)
    torch.testing.assert_close(hessian, penalty.curvature * torch.eye(3, dtype=torch.float64))


def test_a_custom_penalty_sees_h_star_and_the_output():
    seen = []

    def function(h_star, output):
        seen.append((h_star, output))
        return squares(h_star, output)

    anchor, moved, output = torch.randn(2, 3), torch.randn(2, 3), torch.randn(2, 3).bfloat16()
    Custom(function)(Gluing(anchor, moved, 2), output)
    assert torch.equal(seen[0][0], anchor + moved)
    assert torch.equal(seen[0][1], output.float())
    assert Custom(function).curvature is None


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda a, b: (a - b).square().sum(), "one value per example"),
        (lambda a, b: 1.0, "returned float"),
        (lambda a, b: squares(a, b) + 1, "where both arguments are equal"),
        (lambda a, b: -squares(a, b), "negative"),
        (lambda a, b: 0 * squares(a, b), "although its arguments differ"),
    ],
)
def test_a_custom_penalty_is_held_to_its_contract(function, message):
    with pytest.raises(ValueError, match=message) as caught:
        Custom(function).check(torch.randn(3, 4))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda a, b: (a - b).flatten(1).sum(1), "negative"),
        (lambda a, b: squares(a, b).detach(), "differentiable"),
    ],
    ids=["negative-one-way", "detached"],
)
def test_a_custom_penalty_that_fails_only_in_use_is_found_by_the_check(function, message):
    with pytest.raises(ValueError, match=message):
        Custom(function).check(torch.randn(3, 4))


def test_per_link():
    huber = Huber(2.0)
    assert per_link(2, 3) == [Squared(2.0)] * 3
    assert per_link([1.0, huber, squares], 3) == [Squared(1.0), huber, Custom(squares)]
    assert per_link([], 0) == []
    with pytest.raises(ValueError, match="lists 2 values for 3 links"):
        per_link([1.0, 2.0], 3)


def test_a_penalty_class_for_its_instance_is_refused():
    with pytest.raises(ValueError, match="penalty"):
        per_link(Squared, 1)


@pytest.mark.parametrize("weight", [0, -1.0, float("inf"), float("nan")])
def test_weights_out_of_range(weight):
    with pytest.raises(ValueError, match="λ"):
        Squared(weight)
    with pytest.raises(ValueError, match="λ"):
        Huber(weight)
    with pytest.raises(ValueError, match="delta"):
        Huber(1.0, weight)


def test_a_displacement_survives_a_coarse_anchor():
    """h* - anchor is exact although it would vanish in bfloat16's rounding of h*."""
    anchor = torch.full((1, 4), 1000.0).bfloat16()
    link = Gluing(anchor, torch.full((1, 4), 1e-3), 1)
    assert torch.equal(link.residual(anchor), torch.full((1, 4), 1e-3))
    assert float(link.squared_sum) == pytest.approx(4e-6 * len(link.anchor))
    assert torch.equal(link.value, anchor.float() + 1e-3)


@pytest.mark.parametrize("at_anchor", [True, False])
def test_the_squared_penaltys_closed_form_is_its_gradient(at_anchor):
    anchor = torch.randn(5, 3, dtype=torch.float64)
    link = Gluing(anchor, torch.randn(5, 3, dtype=torch.float64), 7.0)
    output = (anchor if at_anchor else anchor + 1).detach().requires_grad_()
    mean, slope = Squared(0.3).mean_and_slope(link, output)
    expected = Squared(0.3)(link, output).sum() / 7
    torch.testing.assert_close(mean, expected.detach())
    torch.testing.assert_close(slope, torch.autograd.grad(expected, output)[0])
