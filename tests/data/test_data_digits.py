import sys

import pytest
import torch

from blockprop.data import load


def test_the_digits_are_split_in_three():
    data = load("digits", validation=0.1)
    assert (len(data.train), len(data.validation), len(data.test)) == (1293, 144, 360)
    assert (data.classes, data.input_shape, data.task) == (10, (1, 8, 8), "classification")
    inputs, targets = data.test.batch(torch.arange(360))
    assert inputs.dtype == torch.float32
    assert (inputs.min().item(), inputs.max().item()) == (0, 1)
    assert set(targets.tolist()) == set(range(10))


def test_the_test_set_is_the_same_for_every_validation():
    parts = [load("digits", validation=validation) for validation in (0, 0.3)]
    assert len(parts[0].validation) == 0
    assert len(parts[0].train) == 1437
    assert torch.equal(parts[0].test.inputs, parts[1].test.inputs)


def test_without_scikit_learn_the_remedy_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ValueError, match=r"digits needs scikit-learn: pip install 'blockprop\[all\]'"):
        load("digits")
