"""What something costs: counted FLOPs and measured seconds, of any call and of the layers of a model; weights."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from blockprop.errors import first_line, remedy
from blockprop.modes import evaluating

__all__ = ["count_flops", "count_weights", "counted", "measure_seconds", "timed"]

P = ParamSpec("P")
T = TypeVar("T")


class _Flops(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up what the operations cost by the formulas of `torch.utils.flop_counter`.

    Its `FlopCounterMode` does the same by module, with hooks that `torch.autograd.grad` to a module's input refuses.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0.0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        formula = flop_registry.get(function.overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


def counted(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> tuple[T, float]:
    """What a call returns, and the FLOPs of the operations that ran in it, backward passes included.

    Matrix products, convolutions and attention count, 2 FLOPs a multiply-add; elementwise work counts as nothing.

    >>> counted(torch.mm, torch.zeros(2, 3), torch.zeros(3, 4))[1]
    48.0
    """
    # the formulas leave out the fused attention of some devices; taken as products, it counts on all
    with sdpa_kernel(SDPBackend.MATH), _Flops() as flops:
        result = function(*args, **kwargs)
    return result, flops.total


def timed(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> tuple[T, float]:
    """What a call returns, and the seconds that the processor spent on it: waiting for a busy core does not count."""
    start = time.process_time()
    result = function(*args, **kwargs)
    return result, time.process_time() - start


def _walk(
    layers: Sequence[tuple[str, nn.Module]], sample: Tensor, measure: Callable[[nn.Module, Tensor], float]
) -> list[float]:
    """Measure every layer on the output of the one before."""
    costs, h = [], sample
    with evaluating([layer for _, layer in layers]):
        for name, layer in layers:
            try:
                costs.append(measure(layer, h))
                with torch.no_grad():
                    h = layer(h)
            except (RuntimeError, IndexError) as error:
                raise ValueError(
                    f"layer {name!r} ({type(layer).__name__}) does not take an input of shape {list(h.shape)} and "
                    f"type {h.dtype}: {first_line(error)}{remedy(layer, h)}"
                ) from error
    return costs


def count_flops(layers: Sequence[tuple[str, nn.Module]], sample: Tensor) -> list[float]:
    """FLOPs of each layer's forward pass on a sample batch, as [`counted`][blockprop.cost.counted].

    Args:
        layers: (name, module) pairs, evaluated one after the other.
        sample: an input of the first layer, shape [N, ...].

    Raises:
        ValueError: a layer does not take the output of the one before.

    >>> count_flops([("a", nn.Linear(4, 8)), ("b", nn.ReLU())], torch.zeros(1, 4))
    [64.0, 0.0]
    """

    def flops(layer: nn.Module, h: Tensor) -> float:
        with torch.no_grad():
            return counted(layer, h)[1]

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
