"""The gluing variable of one link, as it travels: an anchor and how far it moved from it."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["Gluing"]


@dataclass(frozen=True)
class Gluing:
    """h*, the gluing variable of one link for a batch, after its h-step.

    What is kept is the *displacement* h* - anchor and not h* itself. The displacement carries the whole
    learning signal and is often thousands of times smaller than h*, so that in h*'s own rounding it would
    drown: at a large penalty, or as soon as activations are bfloat16.

    It is kept as a direction times a number. A single gradient step moves along the slope that backpropagation
    left, and the penalty's own slope is the displacement times another number: where the two numbers cancel, as
    they do at 2λγ_h = 1, nothing is computed and nothing is rounded.

    Attributes:
        anchor: b(h), the output of the block below at which the h-step began; shape [N, ...].
        direction: h* - anchor, divided by `scale`; same shape as `anchor`, float32 at least.
        count: number of predictions in the batch (examples, or tokens). The h-step works on the sum over
            predictions and the W-step on their mean; the two differ by this factor.
        scale: what the direction is multiplied by, default 1.
    """

    anchor: Tensor
    direction: Tensor
    count: float
    scale: float = 1.0

    def to(self, device: torch.device) -> "Gluing":
        """The same on another device, where the block below lives."""
        return replace(self, anchor=self.anchor.to(device), direction=self.direction.to(device))

    @cached_property
    def displacement(self) -> Tensor:
        """h* - anchor, shape [N, ...]."""
        return self.direction if self.scale == 1 else self.scale * self.direction

    @property
    def value(self) -> Tensor:
        """h* itself, shape [N, ...], in the displacement's dtype."""
        return torch.add(self.anchor.to(self.direction.dtype), self.direction, alpha=self.scale)

    def residual(self, output: Tensor) -> Tensor:
        """h* - output, exact to the displacement's own rounding where `output` equals the anchor.

        Args:
            output: the block's present output, shape [N, ...].

        Returns:
            Tensor of shape [N, ...], differentiable in `output`.
        """
        dtype = self.displacement.dtype
        return self.displacement + (self.anchor.to(dtype) - output.to(dtype))

    @cached_property
    def squared_sum(self) -> Tensor:
        """‖h* - anchor‖² summed over the batch, without λ: a scalar tensor."""
        flat = self.direction.flatten()
        return self.scale**2 * torch.dot(flat, flat)
