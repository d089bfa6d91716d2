"""What a layer costs."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from blockprop.cost import count_flops, count_weights, measure_seconds


def named(*layers):
    return [(str(i), layer) for i, layer in enumerate(layers)]


@settings(max_examples=20, deadline=None, derandomize=True)
@given(widths=st.lists(st.integers(1, 9), min_size=2, max_size=5), n=st.integers(1, 4))
def test_flops_of_linear_layers_are_two_a_multiplication(widths, n):
    layers = named(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths)))
    expected = [2.0 * n * a * b for a, b in itertools.pairwise(widths)]
    assert count_flops(layers, torch.zeros(n, widths[0])) == expected


def test_convolutions_attention_and_elementwise_work():
    layers = named(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten())
    assert count_flops(layers, torch.zeros(2, 3, 6, 6)) == [2.0 * 2 * 16 * 5 * 27, 0.0, 0.0, 0.0]


def test_weights():
    layers = named(nn.Linear(4, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 2, bias=False), nn.BatchNorm1d(2)))
    assert count_weights(layers) == [40.0, 0.0, 20.0]


@pytest.mark.parametrize("count", [count_flops, measure_seconds])
def test_counting_changes_nothing(count):
    block = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    block[2].eval()
    buffers, state = [buffer.clone() for buffer in block.buffers()], torch.get_rng_state()
    costs = count(named(*block), torch.randn(3, 4, generator=torch.Generator().manual_seed(1)))
    assert len(costs) == 3
    assert all(torch.equal(a, b) for a, b in zip(block.buffers(), buffers, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in block] == [True, True, False]
    assert all(p.grad is None for p in block.parameters())


def test_seconds_are_those_of_forward_and_backward():
    calls = []

    class Spy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            calls.append("forward")
            return x * 2

        @staticmethod
        def backward(ctx, g):
            calls.append("backward")
            return g * 2

    class Layer(nn.Module):
        def forward(self, x):
            return Spy.apply(x)

    (seconds,) = measure_seconds([("a", Layer())], torch.randn(2, 3), repeats=2)
    assert seconds > 0
    assert calls.count("backward") == 3  # a warm-up and two measurements
    assert calls.count("forward") == 4  # and the input of the layer after it


def test_token_ids_have_costs_too():
    layers = named(nn.Embedding(11, 8), nn.Linear(8, 11))
    ids = torch.randint(11, (2, 5))
    assert count_flops(layers, ids) == [0.0, 2.0 * 10 * 88]
    assert all(seconds > 0 for seconds in measure_seconds(layers, ids, repeats=1))


@pytest.mark.parametrize("count", [count_flops, measure_seconds])
def test_a_layer_that_does_not_fit_is_named_and_modes_are_restored(count):
    layers = named(nn.Linear(4, 5), nn.Linear(6, 2))
    with pytest.raises(ValueError, match=r"layer '1' \(Linear\) does not take an input of shape \[3, 5\]") as caught:
        count(layers, torch.zeros(3, 4))
    assert "\n" not in str(caught.value)
    assert all(layer.training for _, layer in layers)


def test_an_error_without_a_message_is_reported_as_well():
    class Unfinished(nn.Module):
        def forward(self, x):
            raise NotImplementedError

    with pytest.raises(ValueError, match="Unfinished"):
        count_flops([("a", Unfinished())], torch.zeros(1, 2))
