"""Training and evaluation mode, for a while."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["evaluating"]


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Evaluation mode for these modules and all in them: no statistics move, no random numbers are drawn.

    Each has its own mode back afterwards.
    """
    found = [part for module in modules for part in module.modules()]
    training = [part.training for part in found]
    for part in found:
        part.training = False
    try:
        yield
    finally:
        for part, was in zip(found, training, strict=True):
            part.training = was
