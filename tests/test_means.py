"""Running means of a run's steps."""

import pytest
import torch

from blockprop.executors.executor import LinkReport, StepReport
from blockprop.means import Means


def test_what_an_older_checkpoint_has_not_does_not_dilute_the_means():
    link = LinkReport(torch.tensor(1.0), 1, 0.0, converged=True, stable=True, age=2.0, drift=0.1, curvature=0.5)
    old = {"examples": 8, "loss": 4.0, "gluing": [8.0], "age": [16.0], "drift": [0.8]}
    means = Means.restored(old)
    means.add(StepReport(0.5, 8, [link]))
    assert means.values()["curvature"] == [0.5]
    assert means.values()["age"] == [2.0]
    assert means.values()["drift"] == pytest.approx([0.1])
