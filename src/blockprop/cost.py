"""What a layer costs: counted FLOPs, measured seconds, or its number of weights."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from blockprop.errors import first_line

__all__ = ["count_flops", "count_weights", "measure_seconds"]


@contextmanager
def _evaluating(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Evaluation mode, so that counting moves no statistics and draws no random numbers."""
    modules = [module for layer in layers for module in layer.modules()]
    training = [module.training for module in modules]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module, was in zip(modules, training, strict=True):
            module.training = was


def _walk(
    layers: Sequence[tuple[str, nn.Module]], sample: Tensor, measure: Callable[[nn.Module, Tensor], float]
) -> list[float]:
    """Measure every layer on the output of the one before."""
    costs, h = [], sample
    with _evaluating([layer for _, layer in layers]):
        for name, layer in layers:
            try:
                costs.append(measure(layer, h))
                with torch.no_grad():
                    h = layer(h)
            except (RuntimeError, IndexError) as error:
                raise ValueError(
                    f"layer {name!r} ({type(layer).__name__}) does not take an input of shape {list(h.shape)} and "
                    f"type {h.dtype}: {first_line(error)}"
                ) from error
    return costs


def count_flops(layers: Sequence[tuple[str, nn.Module]], sample: Tensor) -> list[float]:
    """FLOPs of each layer's forward pass on a sample batch, counted from the operations that run.

    Matrix products, convolutions and attention count, 2 FLOPs a multiply-add; elementwise work counts as nothing.

    Args:
        layers: (name, module) pairs, evaluated one after the other.
        sample: an input of the first layer, shape [N, ...].

    Raises:
        ValueError: a layer does not take the output of the one before.

    >>> count_flops([("a", nn.Linear(4, 8)), ("b", nn.ReLU())], torch.zeros(1, 4))
    [64.0, 0.0]
    """

    def flops(layer: nn.Module, h: Tensor) -> float:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            layer(h)
        return float(counter.get_total_flops())

    return _walk(layers, sample, flops)


def measure_seconds(layers: Sequence[tuple[str, nn.Module]], sample: Tensor, repeats: int = 7) -> list[float]:
    """Seconds of each layer's forward and backward pass on a sample batch: the median of `repeats`, after a warm-up.

    Args:
        layers: (name, module) pairs, evaluated one after the other.
        sample: an input of the first layer, shape [N, ...].
        repeats: measurements a layer, default 7.

    Raises:
        ValueError: a layer does not take the output of the one before.
    """

    def once(layer: nn.Module, h: Tensor) -> float:
        h = h.detach().requires_grad_(h.is_floating_point())
        inputs = [h, *layer.parameters()] if h.requires_grad else list(layer.parameters())
        inputs = [tensor for tensor in inputs if tensor.requires_grad]
        start = time.perf_counter()
        output = layer(h)
        if inputs:
            torch.autograd.grad(output.sum(), inputs, allow_unused=True)
        if h.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def seconds(layer: nn.Module, h: Tensor) -> float:
        once(layer, h)
        return statistics.median(once(layer, h) for _ in range(repeats))

    return _walk(layers, sample, seconds)


def count_weights(layers: Sequence[tuple[str, nn.Module]]) -> list[float]:
    """Number of weights of each layer: its FLOPs per example, halved, where the layer is fully connected.

    >>> count_weights([("a", nn.Linear(4, 8)), ("b", nn.ReLU())])
    [40.0, 0.0]
    """
    return [float(sum(parameter.numel() for parameter in layer.parameters())) for _, layer in layers]
