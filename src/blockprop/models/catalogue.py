"""The models that can be built by name, to fit a dataset."""

import inspect
from collections.abc import Callable

from torch import nn

from blockprop.data import Dataset
from blockprop.models.gpt import gpt
from blockprop.models.mlp import mlp
from blockprop.models.resnet import resnet18

NAMES = ("mlp", "resnet18", "preact-resnet18", "gpt")
"""Names that `build` knows."""


def build(
    name: str,
    dataset: Dataset,
    *,
    width: int | None = None,
    depth: int | None = None,
    dropout: float = 0.0,
    norm: str | None = None,
) -> nn.Sequential:
    """Build a model by name, with the inputs and outputs of a dataset.

    Args:
        name: One of `NAMES`. "gpt" is for language, the residual networks for images of at least 8 x 8, and
            "mlp" for everything but language.
        dataset: Dataset to fit; for language, its context becomes that of the model.
        width: The model's ``width``; None for the model's default.
        depth: The model's ``depth``; None for the model's default. Not for the residual networks.
        dropout: The model's ``dropout``, in [0, 1).
        norm: The model's ``norm``; only for "mlp".

    Raises:
        ValueError: If the name is unknown, the model does not go with the dataset, has no use for an argument
            given, or refuses its value.

    >>> from blockprop.data import load
    >>> build("mlp", load("digits"), width=50).layer1.linear
    Linear(in_features=64, out_features=50, bias=True)
    """
    if name not in NAMES:
        raise ValueError(f"unknown model {name!r}; expected one of {', '.join(NAMES)}: choose one of them")
    residual = name in ("resnet18", "preact-resnet18")
    if residual and depth is not None:
        raise ValueError(f"{name} has no use for depth {depth}; its depth is fixed: leave depth out")
    if name != "mlp" and norm is not None:
        raise ValueError(f"{name} has no use for norm {norm!r}; its normalisation is fixed: leave norm out")
    _check_fit(name, dataset, residual)
    sizes = {key: size for key, size in (("width", width), ("depth", depth)) if size is not None}
    if name == "mlp":
        return mlp(dataset.input_shape, dataset.classes, dropout=dropout, norm=norm, **sizes)
    if name == "gpt":
        return gpt(dataset.classes, context=dataset.input_shape[0], dropout=dropout, **sizes)
    return resnet18(
        dataset.input_shape[0],
        dataset.classes,
        preactivation=name == "preact-resnet18",
        dropout=dropout,
        **sizes,
    )


def sizes(name: str) -> dict[str, int]:
    """The width and the depth that a model has unless told; a residual network has no depth, an unknown name neither.

    >>> sizes("mlp"), sizes("resnet18")
    ({'width': 300, 'depth': 2}, {'width': 64})
    """
    makers: dict[str, Callable[..., nn.Sequential]] = {
        "mlp": mlp,
        "resnet18": resnet18,
        "preact-resnet18": resnet18,
        "gpt": gpt,
    }
    parameters = inspect.signature(makers[name]).parameters if name in makers else {}
    return {key: parameters[key].default for key in ("width", "depth") if key in parameters}


def _check_fit(name: str, dataset: Dataset, residual: bool) -> None:
    shape = list(dataset.input_shape)
    if (dataset.task == "language") != (name == "gpt"):
        wanted = "language" if name == "gpt" else "images or vectors"
        raise ValueError(
            f"{name} does not go with {dataset.name}, a {dataset.task} dataset; expected {wanted}: "
            f"choose {'another model' if name == 'gpt' else 'gpt'} or another dataset"
        )
    if residual and (len(shape) != 3 or min(shape[1:]) < 8):
        raise ValueError(
            f"{name} does not go with inputs of shape {shape}; "
            f"expected images [C, H, W] of at least 8 x 8: choose mlp or another dataset"
        )
