"""The multilayer perceptron."""

import math
from collections import OrderedDict

from torch import nn

from blockprop.models.arguments import check_dropout, check_sizes

_NORMS: dict[str, type[nn.BatchNorm1d] | type[nn.LayerNorm]] = {
    "batch": nn.BatchNorm1d,
    "layer": nn.LayerNorm,
}


def mlp(
    input_shape: int | tuple[int, ...],
    classes: int,
    *,
    width: int = 300,
    depth: int = 2,
    dropout: float = 0.0,
    norm: str | None = None,
) -> nn.Sequential:
    """Make a multilayer perceptron from inputs [N, *input_shape] to outputs [N, classes].

    Its children are ``flatten``, one nested Sequential (linear, norm, relu, dropout) per hidden layer, named
    ``layer1``, ``layer2``, ..., and as the last layer a plain Linear.

    Args:
        input_shape: Shape of one input, or its number of features.
        classes: Number of outputs.
        width: Units of each hidden layer.
        depth: Number of layers with weights: 784-300-10 has depth 2.
        dropout: Probability of zeroing a hidden unit in training, in [0, 1); at 0 there is no such module.
        norm: Normalisation of each hidden layer before its ReLU: "batch", "layer", or None for none.

    Raises:
        ValueError: If a size is below 1, ``dropout`` is outside [0, 1) or ``norm`` is unknown.

    >>> [name for name, _ in mlp((1, 28, 28), 10).named_children()]
    ['flatten', 'layer1', 'layer2']
    """
    features = math.prod((input_shape,) if isinstance(input_shape, int) else input_shape)
    check_sizes(input_shape=features, classes=classes, width=width, depth=depth)
    check_dropout(dropout)
    if norm is not None and norm not in _NORMS:
        raise ValueError(f"norm is {norm!r}; expected one of {', '.join(_NORMS)}: change it, or leave it out for none")
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for index in range(1, depth):
        layers[f"layer{index}"] = _hidden(features, width, dropout, norm)
        features = width
    layers[f"layer{depth}"] = nn.Linear(features, classes)
    return nn.Sequential(layers)


def _hidden(features: int, width: int, dropout: float, norm: str | None) -> nn.Sequential:
    linear = nn.Linear(features, width)
    # torch's default shrinks the signal threefold a layer in variance: eight layers of it stand still for epochs
    nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
    layer: OrderedDict[str, nn.Module] = OrderedDict(linear=linear)
    if norm is not None:
        layer["norm"] = _NORMS[norm](width)
    layer["relu"] = nn.ReLU()
    if dropout > 0:
        layer["dropout"] = nn.Dropout(dropout)
    return nn.Sequential(layer)
