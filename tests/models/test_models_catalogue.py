import pytest
import torch

from blockprop.data import Dataset
from blockprop.models import NAMES, build


def dataset(shape, targets):
    pairs = torch.zeros(4, *shape), targets
    return Dataset.from_tensors(pairs, pairs, name="mine")


IMAGES = dataset((3, 8, 8), torch.tensor([0, 1, 2, 3]))
TINY = dataset((1, 7, 8), torch.tensor([0, 1, 2, 3]))
VECTORS = dataset((6,), torch.tensor([0, 1, 2, 3]))
CURVES = dataset((6,), torch.rand(4, 2))
TOKENS = Dataset.from_tensors(
    (torch.zeros(4, 8, dtype=torch.long), torch.full((4, 8), 10)),
    (torch.zeros(4, 8, dtype=torch.long), torch.full((4, 8), 10)),
    name="mine",
)


@pytest.mark.parametrize(
    ("name", "data", "shape"),
    [
        ("mlp", IMAGES, (2, 4)),
        ("mlp", TINY, (2, 4)),
        ("mlp", VECTORS, (2, 4)),
        ("mlp", CURVES, (2, 2)),
        ("resnet18", IMAGES, (2, 4)),
        ("preact-resnet18", IMAGES, (2, 4)),
        ("gpt", TOKENS, (2, 8, 11)),
    ],
)
def test_a_model_fits_its_dataset(name, data, shape):
    assert build(name, data, width=8)(data.sample).shape == shape


def test_sizes_left_out_are_the_models_own():
    assert [name for name, _ in build("mlp", VECTORS).named_children()] == ["flatten", "layer1", "layer2"]
    assert build("mlp", VECTORS).layer1.linear.out_features == 300
    assert len(build("gpt", TOKENS)) == 8


def test_arguments_reach_the_model():
    model = build("mlp", VECTORS, width=5, depth=3, dropout=0.2, norm="layer")
    assert [name for name, _ in model.layer2.named_children()] == ["linear", "norm", "relu", "dropout"]
    assert len(build("gpt", TOKENS, depth=2, width=32)) == 4
    assert "norm" in dict(build("preact-resnet18", IMAGES, width=2).head.named_children())


@pytest.mark.parametrize(
    ("name", "data", "arguments", "message"),
    [
        ("vgg", IMAGES, {}, "unknown model 'vgg'; expected one of " + ", ".join(NAMES)),
        ("resnet18", IMAGES, {"depth": 34}, "resnet18 has no use for depth 34"),
        ("resnet18", IMAGES, {"norm": "batch"}, "resnet18 has no use for norm 'batch'"),
        ("gpt", TOKENS, {"norm": "layer"}, "gpt has no use for norm 'layer'"),
        ("mlp", TOKENS, {}, "mlp does not go with mine, a language dataset.*choose gpt"),
        ("preact-resnet18", TOKENS, {}, "preact-resnet18 does not go with mine, a language dataset"),
        ("gpt", IMAGES, {}, "gpt does not go with mine, a classification dataset"),
        ("gpt", CURVES, {}, "gpt does not go with mine, a regression dataset"),
        ("resnet18", VECTORS, {}, r"resnet18 does not go with inputs of shape \[6\]"),
        ("resnet18", TINY, {}, r"resnet18 does not go with inputs of shape \[1, 7, 8\]"),
        ("mlp", IMAGES, {"width": 0}, "width is 0"),
        ("mlp", IMAGES, {"depth": 0}, "depth is 0"),
        ("mlp", IMAGES, {"norm": "none"}, "norm is 'none'"),
        ("gpt", TOKENS, {"width": 97}, "width 97 is not divisible by 3 heads"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(name, data, arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        build(name, data, **arguments)
    assert "\n" not in str(caught.value)
