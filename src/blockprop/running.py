"""Running means of what a training tells of each link."""

from dataclasses import dataclass, field
from typing import Any

__all__ = ["RunningMean"]


@dataclass
class RunningMean:
    """A mean for every link: of all values alike at first, so that none of the first lasts; later of the latest most.

    Args:
        memory: what is kept of the mean at a new value, in [0, 1), default 0.9; 1 - 1/n at the n-th, while that is
            less.

    Raises:
        ValueError: a memory out of its range.

    >>> mean = RunningMean(0.5)
    >>> [mean.add(0, value) for value in (4.0, 2.0, 1.0)]
    [4.0, 3.0, 2.0]
    >>> mean.at(1)
    0.0
    """

    memory: float = 0.9
    values: dict[int, float] = field(default_factory=dict, init=False)
    counts: dict[int, int] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if not 0 <= self.memory < 1:
            raise ValueError(f"memory is {self.memory}; expected a number in [0, 1)")

    def at(self, link: int) -> float:
        """The mean; 0 until there is a value."""
        return self.values.get(link, 0.0)

    def add(self, link: int, value: float) -> float:
        """Take a value in, and return the mean."""
        self.counts[link] = count = self.counts.get(link, 0) + 1
        kept = min(self.memory, 1 - 1 / count)
        self.values[link] = mean = kept * self.at(link) + (1 - kept) * value
        return mean

    def state_dict(self) -> dict[str, Any]:
        """The means, and of how many values they are."""
        return {"values": dict(self.values), "counts": dict(self.counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with these means."""
        self.values = dict(state["values"])
        self.counts = dict(state.get("counts") or dict.fromkeys(self.values, 20))  # not in older checkpoints
