import math

import pytest
import torch

from blockprop.executors.tally import Tally
from blockprop.latestage import Learnt


def learnt(age: float, gluing: float) -> Learnt:
    return Learnt(None, torch.tensor(gluing), age=age, drift=2 * age, curvature=3.0, limited=age / 10)


def test_means_are_by_the_shares_of_the_microbatches():
    tally = Tally(2)
    tally.loss(0.5, 0.25)
    tally.loss(1.0, 0.75)
    tally.link(1, learnt(4, 1.0), 0.25)
    tally.link(1, learnt(0, 3.0), 0.75)
    tally.link(0, learnt(6, 5.0))
    report = tally.report(8, waited=0.5)
    assert (report.loss, report.examples, report.waited) == (1.5, 8, 0.5)
    assert report.gluing_loss == [5.0, 2.5]
    assert [link.age for link in report.links] == [6, 1]
    assert [link.drift for link in report.links] == [12, 2]
    assert [link.curvature for link in report.links] == [3, 3]
    assert [link.limited for link in report.links] == pytest.approx([0.6, 0.1])


def test_a_step_of_which_nothing_came_to_an_end():
    """Some links alone are no report: a reader would take them for others."""
    tally = Tally(2)
    tally.link(1, learnt(1, 1.0))
    report = tally.report(3)
    assert math.isnan(report.loss)
    assert (report.links, report.examples) == ([], 3)
