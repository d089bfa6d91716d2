"""Gluing penalties l(h*, output): how strongly a gluing variable is held to the block below (Section 2).

Every penalty maps a batch to one value per example, shape [N]: gluing variables belong to examples, so
nothing here may average over the batch. Indices: n example; all other axes are summed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from blockprop.gluing import Gluing

__all__ = ["Custom", "Huber", "Penalty", "PenaltyLike", "Squared", "per_link"]

_ROUNDING = 1e-15


@runtime_checkable
class Penalty(Protocol):
    """Anything that charges a gluing variable for its distance from a block's output."""

    @property
    def curvature(self) -> float | None:
        """Second derivative per coordinate where the two are equal; None where it is not known."""
        ...

    def __call__(self, gluing: Gluing, output: Tensor) -> Tensor:
        """Penalty per example, shape [N], for `output` of the gluing variable's shape [N, ...]."""
        ...


def _per_example(values: Tensor) -> Tensor:
    return values.flatten(1).sum(1)


def _check_weight(weight: float) -> None:
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
        raise ValueError(f"penalty weight λ is {weight}; expected a positive finite number")


@dataclass(frozen=True)
class Squared:
    """λ‖h* - output‖², the penalty of Eq. (4).

    Args:
        weight: λ > 0, default 1.

    Raises:
        ValueError: λ is not positive and finite.

    >>> link = Gluing(anchor=torch.zeros(2, 3), direction=torch.ones(2, 3), count=2)
    >>> Squared(0.5)(link, torch.zeros(2, 3))
    tensor([1.5000, 1.5000])
    """

    weight: float = 1.0

    def __post_init__(self) -> None:
        _check_weight(self.weight)

    @property
    def curvature(self) -> float:
        """2λ."""
        return 2 * self.weight

    def __call__(self, gluing: Gluing, output: Tensor) -> Tensor:
        """λ‖h* - output‖² per example, shape [N]."""
        return self.weight * _per_example(gluing.residual(output).square())

    def mean_and_slope(self, gluing: Gluing, output: Tensor) -> tuple[Tensor, Tensor]:
        """The mean over predictions, a scalar, and its gradient in `output`, -2λ(h* - output) / count, [N, ...]."""
        weight = self.weight / gluing.count
        if output.data_ptr() == gluing.anchor.data_ptr() or torch.equal(output, gluing.anchor):
            # at the anchor, which is where training asks, the residual is the displacement
            slope = -2 * weight * gluing.scale
            # within the rounding of two factors and a quotient, it is 1
            along = gluing.direction if abs(slope - 1) < _ROUNDING else slope * gluing.direction
            return weight * gluing.squared_sum, along
        residual = gluing.residual(output.detach())
        flat = residual.flatten()
        return weight * torch.dot(flat, flat), (-2 * weight) * residual


@dataclass(frozen=True)
class Huber:
    """λr² per coordinate while |r| ≤ δ, and λδ(2|r| - δ) beyond: one wild coordinate cannot own the step.

    Args:
        weight: λ > 0, default 1; within δ it is the same λ as `Squared`'s.
        delta: δ > 0, default 1, in units of the activations.

    Raises:
        ValueError: λ or δ is not positive and finite.
    """

    weight: float = 1.0
    delta: float = 1.0

    def __post_init__(self) -> None:
        _check_weight(self.weight)
        if not 0 < self.delta < float("inf"):
            raise ValueError(f"Huber delta is {self.delta}; expected a positive finite number")

    @property
    def curvature(self) -> float:
        """2λ, the curvature within δ."""
        return 2 * self.weight

    def majoriser(self, displacement: Tensor) -> Tensor:
        """Curvature of the parabola above the penalty that touches it there; its own is 0 beyond δ."""
        return 2 * self.weight * (self.delta / displacement.abs().clamp_min(self.delta))

    def __call__(self, gluing: Gluing, output: Tensor) -> Tensor:
        """The Huber penalty per example, shape [N]."""
        residual = gluing.residual(output)
        # torch's huber_loss is r²/2 within δ and δ(|r| - δ/2) beyond
        huber = torch.nn.functional.huber_loss(residual, torch.zeros_like(residual), reduction="none", delta=self.delta)
        return 2 * self.weight * _per_example(huber)


@dataclass(frozen=True)
class Custom:
    """A penalty of the user's own.

    Args:
        function: l(h*, output) -> shape [N]; non-negative, and zero only where the two are equal.

    Raises:
        ValueError: on use, if the result is not of shape [N] or holds a negative value; and by
            [`check`][blockprop.penalties.Custom.check] if it is not zero at equality.
    """

    function: Callable[[Tensor, Tensor], Tensor]

    @property
    def curvature(self) -> None:
        """Unknown: an h-solver that needs a step size must be given one."""
        return

    def __call__(self, gluing: Gluing, output: Tensor) -> Tensor:
        """The user's penalty per example, shape [N]."""
        value = gluing.value
        penalty = self.function(value, output.to(value.dtype))
        if not isinstance(penalty, Tensor) or penalty.shape != value.shape[:1]:
            found = f"shape {list(penalty.shape)}" if isinstance(penalty, Tensor) else type(penalty).__name__
            raise ValueError(f"penalty returned {found}; expected one value per example, shape [{len(value)}]")
        if (penalty.detach() < 0).any():
            raise ValueError(
                "penalty returned a negative value; expected l >= 0, and zero only where the two are equal"
            )
        return penalty

    def check(self, output: Tensor) -> None:
        """Hold the function to l(a, a) = 0 and l(a, b) > 0 on a sample of outputs, shape [N, ...].

        Raises:
            ValueError: it is not zero at equality, or zero although every coordinate differs.
        """
        output = output.detach().float()
        zero = torch.zeros_like(output)
        at_equality = self(Gluing(output, zero, 1.0), output)
        if (at_equality != 0).any():
            raise ValueError(
                f"penalty is {at_equality.max().item():.3g} where both arguments are equal; expected 0 there"
            )
        for step in (1, -1):
            with torch.enable_grad():
                apart = self(Gluing(output, (zero + step).requires_grad_(), 1.0), output)
            if (apart == 0).any():
                raise ValueError("penalty is 0 although its arguments differ; expected zero only at equality")
            if not apart.requires_grad:
                raise ValueError("penalty is not differentiable; expected torch operations on h* and the output only")


PenaltyLike = float | Penalty | Callable[[Tensor, Tensor], Tensor]


def _penalty(given: PenaltyLike) -> Penalty:
    if isinstance(given, bool):
        raise ValueError(f"penalty is {given}; expected λ, a Penalty, or a callable l(h*, output) -> [N]")
    if isinstance(given, int | float):
        return Squared(float(given))
    if isinstance(given, Squared | Huber | Custom):
        return given
    if isinstance(given, Penalty) and not isinstance(given, type):
        return given
    if callable(given) and not isinstance(given, type):
        return Custom(given)
    raise ValueError(f"penalty is a {type(given).__name__}; expected λ, a Penalty, or a callable l(h*, output) -> [N]")


def per_link(given: PenaltyLike | Sequence[PenaltyLike], links: int) -> list[Penalty]:
    """One penalty per link from one value for all, or from a list with one value a link, bottom first.

    Args:
        given: λ, a `Penalty`, a callable l(h*, output) -> [N], or a list of `links` of these.
        links: K - 1.

    Raises:
        ValueError: a list of the wrong length, or an element that is none of the above.

    >>> per_link([1.0, 2.0], links=2)
    [Squared(weight=1.0), Squared(weight=2.0)]
    """
    if isinstance(given, Sequence):
        if len(given) != links:
            raise ValueError(f"penalty lists {len(given)} values for {links} links; give one, or one per link")
        return [_penalty(item) for item in given]
    return [_penalty(given)] * links
