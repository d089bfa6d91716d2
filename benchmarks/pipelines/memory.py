"""Tensor bytes of a process: weights, gradients, optimizer state, and what waits for the backward pass."""

from collections import Counter
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn


def kept(modules: Iterable[nn.Module], optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, int]:
    """Bytes that stay from step to step; gradients are counted as there, as they are at the update."""
    parameters = [p for module in modules for p in module.parameters()]
    states = [value for one in optimizers for state in one.state.values() for value in state.values()]
    return {
        "weights": _bytes(parameters),
        "gradients": _bytes(p for p in parameters if p.requires_grad),
        "optimizer": _bytes(value for value in states if isinstance(value, Tensor) and value.ndim),
    }


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class InFlight:
    """Counts, while it is entered, the bytes that autograd keeps for the backward pass, apart from the weights.

    Args:
        modules: whose parameters are not counted.

    Attributes:
        peak: the most bytes at any one time.

    >>> x = torch.ones(256, requires_grad=True)
    >>> with InFlight([]) as count:
    ...     y = x.exp().sum()
    >>> count.peak
    1024
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._own = {p.untyped_storage().data_ptr() for module in modules for p in module.parameters()}
        self._uses: Counter[int] = Counter()
        self._now = 0
        self.peak = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: _Saved(tensor, self), lambda one: one.tensor
        )

    def __enter__(self) -> "InFlight":
        self._hooks.__enter__()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._hooks.__exit__(kind, error, trace)

    def add(self, storage: Any, by: int) -> None:
        """Count one use more or less of a storage."""
        where = storage.data_ptr()
        if where in self._own:
            return
        before = self._uses[where]
        self._uses[where] += by
        if before == 0 or self._uses[where] == 0:
            self._now += by * storage.nbytes()
        self.peak = max(self.peak, self._now)


class _Saved:
    def __init__(self, tensor: Tensor, count: InFlight) -> None:
        self.tensor, self._count = tensor, count
        count.add(tensor.untyped_storage(), 1)

    def __del__(self) -> None:
        self._count.add(self.tensor.untyped_storage(), -1)
