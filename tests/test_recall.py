"""Feedback by example: what is kept is the target of a later visit."""

import pytest
import torch

from blockprop.cache import GluingCache
from blockprop.curvature import Constant, Secant
from blockprop.gluing import Gluing
from blockprop.recall import Recall

OLD = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
SLOPES = torch.tensor([[0.5, 0.0], [0.0, -1.0]], dtype=torch.float64)  # of each example's own summed loss


def recall(curvature=None):
    return Recall(GluingCache(4, dtype=torch.float64), curvature or Constant(0.0), 0)


def feedback(slopes, count):
    """As the block above sends it: the slope of the mean over `count` predictions."""
    return Gluing(torch.zeros_like(slopes), slopes / count, count)


def gradient(target, output):
    output = output.clone().requires_grad_()
    mean, _ = target.mean(output)
    mean.backward()
    return output.grad


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_the_gradient_at_the_same_output_is_the_one_that_was_kept(share):
    """Of a microbatch it is as much of the batch's mean as it was."""
    kept = recall()
    ids = torch.tensor([2, 0])
    count = 2 / share  # predictions of the whole batch, one an example
    kept.keep(ids, OLD, feedback(SLOPES, count), share, tick=3)
    found = kept.target(ids, OLD, share)
    torch.testing.assert_close(gradient(found.target, OLD), SLOPES / count)
    torch.testing.assert_close(found.anchor, OLD)


def test_an_example_without_an_entry_says_nothing():
    kept = recall(Constant(2.0))
    kept.keep(torch.tensor([1, 3]), OLD, feedback(SLOPES, 2), 1.0, tick=0)
    found = kept.target(torch.tensor([1, 0]), OLD + 1, 1.0)
    torch.testing.assert_close(found.anchor, torch.stack([OLD[0], OLD[1] + 1]))
    torch.testing.assert_close(gradient(found.target, OLD + 1)[1], torch.zeros(2, dtype=torch.float64))


def test_the_correction_is_along_the_slope_that_was_kept():
    """c = (ρ + κ d) ĝ, whatever else has moved: here d is 3 along, and 7 across."""
    kept = recall(Constant(2.0))
    ids = torch.tensor([0, 1])
    kept.keep(ids, OLD, feedback(SLOPES, 2), 1.0, tick=0)
    moved = OLD + torch.tensor([[3.0, 7.0], [0.0, 0.0]], dtype=torch.float64)
    found = gradient(kept.target(ids, moved, 1.0).target, moved)
    torch.testing.assert_close(found, torch.tensor([[0.5 + 2 * 3, 0.0], [0.0, -1.0]], dtype=torch.float64) / 2)


def test_what_is_replaced_tells_the_curvature_along_the_slope():
    curvature = Secant()
    kept = recall(curvature)
    ids = torch.tensor([0, 1])
    kept.keep(ids, OLD, feedback(SLOPES, 2), 1.0, tick=0)
    assert not curvature.values
    # the outputs moved by 0.1 along their slopes, which changed by 4 times as much
    way = 0.1 * torch.eye(2, dtype=torch.float64)
    kept.keep(ids, OLD + way, feedback(SLOPES + 4 * way, 2), 1.0, tick=1)
    assert curvature.values == {0: pytest.approx(4.0)}


def test_age_counts_visits():
    kept = recall()
    ids = torch.tensor([0, 1])
    kept.keep(ids, OLD, feedback(SLOPES, 2), 1.0, tick=0)
    assert [kept.target(ids, OLD, 1.0).age for _ in range(2)] == [1.0, 2.0]


def test_it_goes_on_from_a_checkpoint():
    kept, other = recall(), recall()
    assert kept.size == 0
    ids = torch.tensor([0, 1])
    kept.keep(ids, OLD, feedback(SLOPES, 6), 1.0, tick=0)
    assert kept.size > 0
    other.load_state_dict(kept.state_dict())
    torch.testing.assert_close(gradient(other.target(ids, OLD, 1.0).target, OLD), SLOPES / 6)
