"""Measured costs: what is measured, how often, and that nothing is changed."""

import time

import pytest
import torch
from torch import nn

from blockprop.models import mlp
from blockprop.planning.contention import measure_contention
from blockprop.planning.costs import halved, measure_layers, representatives
from blockprop.split import layers_of


def test_a_deep_network_without_memory_is_measured_by_its_kinds():
    with torch.device("meta"):
        model = mlp(6, 3, width=10, depth=200)
    layers = measure_layers(layers_of(model), torch.randn(8, 6), repeats=1)
    assert len(layers) == 200
    assert [layers[i].weight_bytes for i in (0, 1, 198, 199)] == [280.0, 440.0, 440.0, 132.0]
    assert [layers[i].output_bytes for i in (0, 199)] == [40.0, 12.0]
    assert layers[1].passes is not layers[0].passes
    assert layers[1].passes == layers[198].passes
    assert set(layers[1].passes) == {8, 4, 2}
    assert all(value > 0 for value in vars(layers[1].passes[8]).values())
    assert layers[0].name == "flatten"


def test_the_network_is_left_as_it_is():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    model.eval()
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    measure_layers(layers_of(model), torch.randn(4, 4, generator=torch.Generator().manual_seed(1)), repeats=1)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    assert not model.training


def test_tokens_have_no_gradient():
    layers = [("a", nn.Embedding(11, 8)), ("b", nn.Linear(8, 11))]
    first, second = measure_layers(layers, torch.randint(11, (4, 5)), repeats=1)
    assert first.passes[4].input_gradient == 0
    assert first.passes[4].weight_gradient > 0
    assert second.passes[4].input_gradient > 0
    assert first.output_bytes == 5 * 8 * 4


def test_representatives_of_two_kinds_in_turn_are_all():
    assert representatives([0, 1, 0, 1]) == [0, 1, 2, 3]
    assert representatives([0] * 9) == [0, 1, 2]


def test_sizes():
    assert halved(100) == [100, 50, 25, 12, 6, 3]
    assert halved(1) == [1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": []}, "there are no layers to measure"),
        ({"sizes": [5]}, "sizes are \\[5\\]; expected numbers of examples from 1 to 4"),
        ({"repeats": 0}, "repeats is 0; expected"),
        ({"layers": [("a", nn.Linear(3, 3))]}, "layer 'a' does not take an input of shape \\[N, 6\\]"),
    ],
)
def test_mistakes(change, message):
    given = {"layers": [("a", nn.Linear(6, 3))], "inputs": torch.randn(4, 6), **change}
    with pytest.raises(ValueError, match=message) as caught:
        measure_layers(**given)
    assert "\n" not in str(caught.value)


def test_contention_is_at_least_one():
    assert 1.0 <= measure_contention(nn.Linear(20, 20), torch.randn(8, 20), seconds=0.05) < 100


def test_a_process_that_fails_is_not_waited_for():
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="ended before it had measured; its error is above"):
        measure_contention(nn.Linear(20, 20), torch.randn(8, 19), seconds=0.05)
    assert time.monotonic() - start < 60
