"""The curvature κ of what lies above a link: how far a target is to be from the output it corrects.

A late feedback g is the gradient at the output b_old(h) that was sent up. Since then the block has moved its
output for this batch by d = b_now(h) - b_old(h). The target h* = b_old(h) - g/κ turns the feedback into g + κ d,
which is today's gradient, to first order, if κ is the curvature of what lies above along d.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from blockprop.running import RunningMean
from blockprop.ways import norms

__all__ = ["Constant", "Curvature", "PerExample", "Secant"]


class Curvature(Protocol):
    """Anything that says how curved the loss is in the outputs of every link's lower block."""

    def at(self, link: int, slope: Tensor) -> float | Tensor:
        """κ ≥ 0 of the sum over predictions, as λ is.

        Args:
            link: from 0 at the bottom.
            slope: the feedback that κ is to correct, of each example's own summed loss, shape [N, ...].

        Returns:
            One for all examples, or a tensor that broadcasts to the slope's shape.
        """
        ...

    def wants(self, link: int, links: int, tick: int) -> bool:
        """Whether it is that link's turn to be measured, now or soon; it costs two passes through all that is above."""
        ...

    def measure(self, link: int, way: Tensor, change: Tensor, slope: Tensor) -> None:
        """Learn from how far a block's output moved, and by how much the slope of the batch's summed loss changed.

        Args:
            link: from 0 at the bottom.
            way: d, shape [N, ...].
            change: today's slope after the way minus today's slope before it, shape [N, ...].
            slope: the slope before the way, shape [N, ...].
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """What has been learnt."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        ...


@dataclass(frozen=True)
class Constant:
    """The same κ all the time. 0 makes the target the delayed gradient.

    Args:
        values: κ, one for all links or one per link, bottom first.

    Raises:
        ValueError: a value that is negative or not finite.
    """

    values: float | Sequence[float]

    def __post_init__(self) -> None:
        for value in self.values if isinstance(self.values, Sequence) else [self.values]:
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise ValueError(f"curvature is {value}; expected a finite number of at least 0")

    def at(self, link: int, slope: Tensor) -> float:  # noqa: ARG002
        """The value given."""
        return float(self.values[link] if isinstance(self.values, Sequence) else self.values)

    def wants(self, link: int, links: int, tick: int) -> bool:  # noqa: ARG002
        """Never.

        Raises:
            ValueError: there are not as many values as links.
        """
        if isinstance(self.values, Sequence) and len(self.values) != links:
            raise ValueError(
                f"curvature has {len(self.values)} values for {links} links; expected one, or one per link"
            )
        return False

    def measure(self, link: int, way: Tensor, change: Tensor, slope: Tensor) -> None:
        """Nothing to learn."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to continue."""


@dataclass
class Secant:
    """κ = Σ⟨Δg, d⟩ / Σ⟨d, d⟩, measured while training, a link at a time; no less than 0, and 0 until first measured.

    Δg is the difference of today's gradients at b_now(h) and at b_old(h). One measurement is of a few examples and
    varies by its own size, so that κ is the least-squares slope of many: both sums are running means (`RunningMean`).
    So a measurement counts by how far the block had moved. The moves grow as training goes on, and the curvature falls
    meanwhile, so that κ follows the latter at once; a mean of the quotients would lag behind it, and a κ that is much
    too large does harm.

    Args:
        every: ticks between two measurements, default 20; the links take turns.
        memory: what is kept of the running means at a new measurement, in [0, 1), default 0.9.

    Raises:
        ValueError: a setting out of its range.
    """

    every: int = 20
    memory: float = 0.9
    changes: RunningMean = field(init=False)  # ⟨Δg, d⟩
    squares: RunningMean = field(init=False)  # ⟨d, d⟩

    def __post_init__(self) -> None:
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise ValueError(f"every is {self.every}; expected a whole number of ticks, at least 1")
        self.changes, self.squares = RunningMean(self.memory), RunningMean(self.memory)

    @property
    def values(self) -> dict[int, float]:
        """κ of every link that is measured."""
        return {link: max(0.0, self.changes.at(link)) / square for link, square in self.squares.values.items()}

    def at(self, link: int, slope: Tensor) -> float:  # noqa: ARG002
        """κ as it is known by now."""
        return self.values.get(link, 0.0)

    def wants(self, link: int, links: int, tick: int) -> bool:
        """Once in every n ticks, of one link."""
        turn, place = divmod(tick, self.every)
        return place == 0 and turn % links == link

    def measure(self, link: int, way: Tensor, change: Tensor, slope: Tensor) -> None:  # noqa: ARG002
        """Take the secant of the loss above along the way; a block that has not moved tells nothing."""
        square = float(torch.sum(way * way))
        if square > 0:
            self.changes.add(link, float(torch.sum(change * way)))
            self.squares.add(link, square)

    def state_dict(self) -> dict[str, Any]:
        """The running means."""
        return {"changes": self.changes.state_dict(), "squares": self.squares.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with these means."""
        if "changes" in state:  # older checkpoints have means of quotients, which are measured anew
            self.changes.load_state_dict(state["changes"])
            self.squares.load_state_dict(state["squares"])


@dataclass(frozen=True)
class PerExample:
    """Another κ for every example, in proportion to its slope: κ_i = ρ ‖g_i‖.

    With a cross-entropy, an example that is classified well has a small slope and a small curvature, both in
    proportion to what is missing of its probability. The target is then as far away for every example, 1/ρ.

    Args:
        ratio: ρ of every link: a [`Constant`][blockprop.curvature.Constant], or a
            [`Secant`][blockprop.curvature.Secant] that measures ρ = Σ_i ⟨Δg_i, d_i⟩ / Σ_i ‖g_i‖ ‖d_i‖²; default the
            latter.
    """

    ratio: Curvature = field(default_factory=Secant)

    def at(self, link: int, slope: Tensor) -> Tensor:
        """ρ ‖g_i‖, shape [N, 1, ...]."""
        ratio = self.ratio.at(link, slope)
        return ratio * norms(slope)

    def wants(self, link: int, links: int, tick: int) -> bool:
        """As the ratio does."""
        return self.ratio.wants(link, links, tick)

    def measure(self, link: int, way: Tensor, change: Tensor, slope: Tensor) -> None:
        """Learn ρ: the secant along a way that is longer by √‖g_i‖, of a change that is smaller by as much."""
        root = norms(slope).sqrt()
        self.ratio.measure(link, root * way, (change / root).where(root > 0, 0), slope)

    def state_dict(self) -> dict[str, Any]:
        """The ratio's."""
        return self.ratio.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the ratio's."""
        self.ratio.load_state_dict(state)
