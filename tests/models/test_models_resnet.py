import pytest
import torch
from torch import nn

from blockprop.models import resnet18

BLOCKS = [f"layer{stage}_{position}" for stage in range(1, 5) for position in (1, 2)]


@pytest.mark.parametrize("preactivation", [False, True])
@pytest.mark.parametrize(("channels", "height", "width"), [(3, 32, 32), (1, 8, 8), (1, 28, 28), (3, 9, 13)])
def test_any_image_from_8_by_8_on(preactivation, channels, height, width):
    model = resnet18(channels, 7, width=4, preactivation=preactivation)
    assert [name for name, _ in model.named_children()] == ["stem", *BLOCKS, "head"]
    assert model(torch.rand(2, channels, height, width)).shape == (2, 7)


@pytest.mark.parametrize("preactivation", [False, True])
def test_the_children_in_a_row_are_the_model(preactivation):
    torch.manual_seed(0)
    model = resnet18(width=4, preactivation=preactivation).eval()
    images = torch.rand(2, 3, 16, 16)
    features = images
    shapes = []
    for child in model:
        features = child(features)
        shapes.append(tuple(features.shape[1:]))
    assert torch.equal(features, model(images))
    assert shapes == [
        *[(4, 16, 16)] * 3,
        *[(8, 8, 8)] * 2,
        *[(16, 4, 4)] * 2,
        *[(32, 2, 2)] * 2,
        (10,),
    ]


def test_the_size_is_that_of_the_published_network():
    with torch.device("meta"):
        model = resnet18()
    assert sum(p.numel() for p in model.parameters()) == 11_173_962
    assert sum(isinstance(module, nn.Conv2d) for module in model.modules()) == 20


def test_a_preactivation_network_sums_without_a_relu_and_ends_in_one():
    torch.manual_seed(0)
    model = resnet18(width=4, preactivation=True)
    features = model[:-1](torch.rand(2, 3, 16, 16))
    assert (features < 0).any()
    assert [name for name, _ in model.head.named_children()] == ["norm", "relu", "pool", "flatten", "linear"]
    assert (resnet18(width=4)[:-1](torch.rand(2, 3, 16, 16)) >= 0).all()


def test_dropout_comes_before_the_last_linear():
    names = [name for name, _ in resnet18(width=2, dropout=0.3).head.named_children()]
    assert names == ["pool", "flatten", "dropout", "linear"]


@pytest.mark.parametrize("preactivation", [False, True])
def test_every_parameter_gets_a_gradient(preactivation):
    model = resnet18(width=2, preactivation=preactivation)
    model(torch.rand(4, 3, 16, 16)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 0}, "width is 0"),
        ({"in_channels": 0}, "in_channels is 0"),
        ({"classes": -1}, "classes is -1"),
        ({"dropout": 1.5}, "dropout is 1.5"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        resnet18(**arguments)
