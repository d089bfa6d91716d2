"""What training keeps in memory beside weights, gradients and optimizer state."""

from dataclasses import astuple, dataclass

__all__ = ["Held"]


@dataclass(frozen=True)
class Held:
    """Bytes that a stage keeps beside weights, gradients and optimizer state.

    Attributes:
        activations_in_flight: inputs and outputs of batches whose feedback has not come.
        stashed_weights: copies of weights that batches were forwarded with.
        cache: of the gluing cache, in memory or mapped.
    """

    activations_in_flight: int = 0
    stashed_weights: int = 0
    cache: int = 0

    def most(self, other: "Held") -> "Held":
        """The larger of each."""
        return Held(*map(max, astuple(self), astuple(other)))

    def __add__(self, other: "Held") -> "Held":
        return Held(*map(sum, zip(astuple(self), astuple(other), strict=True)))
