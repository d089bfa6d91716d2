import pytest
import torch
from torch import nn

from blockprop.models import mlp


def test_depth_counts_the_layers_with_weights():
    model = mlp((1, 28, 28), 10)
    assert [name for name, _ in model.named_children()] == ["flatten", "layer1", "layer2"]
    assert [tuple(p.shape) for p in model.parameters()] == [(300, 784), (300,), (10, 300), (10,)]
    assert model(torch.rand(4, 1, 28, 28)).shape == (4, 10)


def test_a_single_layer_is_a_linear_model():
    model = mlp(5, 3, depth=1)
    assert [type(child) for child in model] == [nn.Flatten, nn.Linear]
    assert model(torch.rand(2, 5)).shape == (2, 3)


@pytest.mark.parametrize(("norm", "kind"), [("batch", nn.BatchNorm1d), ("layer", nn.LayerNorm)])
def test_a_hidden_layer_is_linear_norm_relu_dropout(norm, kind):
    model = mlp(5, 3, width=4, depth=3, dropout=0.5, norm=norm)
    for layer in (model.layer1, model.layer2):
        assert [type(child) for child in layer] == [nn.Linear, kind, nn.ReLU, nn.Dropout]
    assert isinstance(model.layer3, nn.Linear)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 0}, "width is 0"),
        ({"width": 2.5}, "width is 2.5"),
        ({"depth": 0}, "depth is 0"),
        ({"classes": 0}, "classes is 0"),
        ({"input_shape": (3, 0)}, "input_shape is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"dropout": float("nan")}, "dropout is nan"),
        ({"norm": "group"}, "norm is 'group'; expected one of batch, layer"),
        ({"norm": ""}, "norm is ''"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        mlp(**{"input_shape": 4, "classes": 2, **arguments})
    assert "\n" not in str(caught.value)
