"""The gluing variable of one link, as it travels: an anchor and how far it moved from it."""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Gluing"]


@dataclass(frozen=True)
class Gluing:
    """h*, the gluing variable of one link for a batch, after its h-step.

    What is kept is the *displacement* h* - anchor and not h* itself. The displacement carries the whole
    learning signal and is often thousands of times smaller than h*, so that in h*'s own rounding it would
    drown: at a large penalty, or as soon as activations are bfloat16.

    Attributes:
        anchor: b(h), the output of the block below at which the h-step began; shape [N, ...].
        displacement: h* - anchor; same shape as `anchor`, float32 at least.
        count: number of predictions in the batch (examples, or tokens). The h-step works on the sum over
            predictions and the W-step on their mean; the two differ by this factor.
    """

    anchor: Tensor
    displacement: Tensor
    count: float

    @property
    def value(self) -> Tensor:
        """h* itself, shape [N, ...], in the displacement's dtype."""
        return self.anchor.to(self.displacement.dtype) + self.displacement

    def residual(self, output: Tensor) -> Tensor:
        """h* - output, exact to the displacement's own rounding where `output` equals the anchor.

        Args:
            output: the block's present output, shape [N, ...].

        Returns:
            Tensor of shape [N, ...], differentiable in `output`.
        """
        dtype = self.displacement.dtype
        return self.displacement + (self.anchor.to(dtype) - output.to(dtype))

    def squared_sum(self) -> Tensor:
        """‖h* - anchor‖² summed over the batch, without λ: a scalar tensor."""
        flat = self.displacement.flatten()
        return torch.dot(flat, flat)
