"""What a message proposes: the type of the input that a module takes."""

import pytest
import torch
from torch import nn

import blockprop
from blockprop.errors import remedy
from blockprop.models import gpt
from conftest import sgd

MLP = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
TOKENS = gpt(9, context=5, width=8, depth=1)


@pytest.mark.parametrize(
    ("model", "inputs", "expected"),
    [
        (MLP, torch.zeros(3, 4), ""),
        (
            MLP,
            torch.zeros(3, 4).double(),
            "; expected torch.float32, as its weights are, give inputs.to(torch.float32)",
        ),
        (MLP, torch.zeros(3, 4).long(), "; expected torch.float32, as its weights are, give inputs.to(torch.float32)"),
        (TOKENS, torch.zeros(3, 5).long(), ""),
        (TOKENS, torch.zeros(3, 5), "; expected token numbers, give inputs.long()"),
        (nn.ReLU(), torch.zeros(3, 5).long(), ""),
    ],
)
def test_the_remedy_is_the_type_of_the_first_weights(model, inputs, expected):
    assert remedy(model, inputs) == expected


@pytest.mark.parametrize("make", [blockprop.BlockProp, blockprop.Backprop])
@pytest.mark.parametrize("use", ["step", "predict"])
@pytest.mark.parametrize("kind", [torch.float64, torch.int64])
def test_inputs_of_another_type_are_refused_with_the_right_one(make, use, kind):
    algo = make(blockprop.split(MLP, 2), nn.CrossEntropyLoss(), sgd())
    inputs, targets = torch.ones(3, 4, dtype=kind), torch.tensor([0, 1, 0])
    with pytest.raises(ValueError, match=rf"block 1 failed .* {kind}: .*give inputs\.to\(torch\.float32\)$") as caught:
        algo.step(inputs, targets) if use == "step" else algo.predict(inputs)
    assert "\n" not in str(caught.value)


def test_a_shape_that_does_not_fit_has_no_type_to_blame():
    algo = blockprop.BlockProp(blockprop.split(MLP, 2), nn.CrossEntropyLoss(), sgd())
    with pytest.raises(ValueError, match="block 1 failed on an input of shape") as caught:
        algo.predict(torch.zeros(3, 5))
    assert "expected torch" not in str(caught.value)


def test_a_sample_of_another_type_is_refused_with_the_right_one():
    with pytest.raises(ValueError, match=r"layer '1' \(Linear\) .*give inputs\.to\(torch\.float32\)$"):
        blockprop.split(MLP, 2, sample=torch.zeros(3, 4).double())
