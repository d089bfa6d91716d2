"""What a pipeline has taken in: batches, cut into microbatches, until no block has to do with them any more."""

import math
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from blockprop.cache import GluingCache, Visits
from blockprop.schedules import Action, Tick

__all__ = ["Intake", "Part"]

Counted = Callable[[Tensor], float]
"""How many predictions there are in some labels."""


@dataclass
class Part:
    """A microbatch: inputs, labels and ids, each as far as a block that lives here needs it; its share of its batch.

    And the number of predictions of the whole batch, where the last block lives here and the batch is cut.
    """

    inputs: Tensor | None
    labels: Tensor | None
    ids: Tensor | None
    share: float
    total: float | None = None


class Intake:
    """The microbatches on their way, by number. One that has no examples has a number as well, and None for it.

    Args:
        microbatches: M, into how many parts a batch is cut.
        known: a cache that knows what examples there are; None where every batch has feedback.
        refresh: E ≥ 1: feedback comes on every E-th visit of a batch's examples only.

    Raises:
        ValueError: E is no whole number of at least 1.
    """

    def __init__(self, microbatches: int = 1, known: GluingCache | None = None, refresh: int = 2) -> None:
        self.microbatches = microbatches
        self._known = known
        self._visits = None if known is None else Visits(known.examples, refresh)
        self._without: list[bool] = []  # by batch: whether it has no feedback
        self._fed = self._taken = 0  # microbatches, in steps and by the schedule
        self._largest = 0  # examples of a batch, so far
        self._parts: dict[int, Part | None] = {}

    def __len__(self) -> int:
        return len(self._parts)

    def __iter__(self) -> Iterator[int]:
        return iter(self._parts)

    def __contains__(self, number: int) -> bool:
        return number in self._parts

    def __getitem__(self, number: int) -> Part:
        part = self._parts[number]
        assert part is not None
        return part

    def empty(self, number: int) -> bool:
        """Whether a microbatch has no examples, or is not on its way."""
        return self._parts.get(number) is None

    def quiet(self, number: int) -> bool:
        """Whether a microbatch has no feedback."""
        batch = number // self.microbatches
        return batch < len(self._without) and self._without[batch]

    def asks(self, tick: Tick) -> bool:
        """Whether a tick begins with a batch that has not come yet."""
        return any(kind == "forward" and k == 1 and number >= self._fed for k, kind, number in tick)

    @property
    def fed(self) -> int:
        """The number of the next microbatch to be taken in."""
        return self._fed

    def feed(
        self, inputs: Tensor | None, labels: Tensor | None, ids: Tensor | None, counted: Counted | None = None
    ) -> int:
        """Take a batch in.

        Args:
            inputs: x, shape [N, ...]; None where the first block lives elsewhere.
            labels: y, N rows; None where the last block lives elsewhere.
            ids: the examples' numbers; needed with a cache, and where neither of the others is given.
            counted: the loss's; needed with labels that are cut.

        Returns:
            N.
        """
        # where the pipeline ran empty the schedule has gone on: the next batch is its next one
        self._fed = max(self._fed, math.ceil(self._taken / self.microbatches) * self.microbatches)
        present = next(value for value in (inputs, labels, ids) if value is not None)
        if self._visits is not None and self._known is not None:
            ids = self._known.check(ids, len(present))
            self._without += [False] * (self._fed // self.microbatches - len(self._without))
            self._without.append(not self._visits.due(ids))
        # a short last batch is cut into fewer parts of the same size: BatchNorm needs more than one example
        self._largest = max(self._largest, len(present))
        count = max(1, len(present) * self.microbatches // self._largest)
        cut = [self._cut(value, count) for value in (present, inputs, labels, ids)]
        total = None if labels is None or counted is None or self.microbatches == 1 else counted(labels) or None
        for number, (one, x, y, i) in enumerate(zip(*cut, strict=True), self._fed):
            # an empty one is waited for as well, so that all replicas of a block come to the end together
            some = one is not None and len(one)
            self._parts[number] = Part(x, y, i, len(one) / len(present), total) if some else None
        self._fed += self.microbatches
        return len(present)

    def _cut(self, value: Tensor | None, count: int) -> list[Tensor | None]:
        parts: list[Tensor | None] = [] if value is None else list(value.tensor_split(count))
        return parts + [None] * (self.microbatches - len(parts))

    def past(self, tick: Tick) -> None:
        """A tick of the schedule is over."""
        self._taken += sum(kind == "forward" and k == 1 for k, kind, _ in tick)

    def begin(self) -> None:
        """The schedule begins anew."""
        self._taken = 0

    def last(self, action: Action, blocks: int) -> bool:
        """Whether this is the last that blocks have to do with a microbatch.

        The first block is the last to learn from it; the last block is where no feedback comes down.
        """
        k, kind, number = action
        if k == 1 and kind == "drop":
            return True
        return kind == "backward" and k == (blocks if self.quiet(number) else 1)

    def end(self, number: int) -> None:
        """Forget a microbatch."""
        self._parts.pop(number, None)

    def over(self, number: int, besides: Set[int] = frozenset()) -> bool:
        """Whether no examples are on their way of the batch that a microbatch is of, besides those of some others."""
        begin = number // self.microbatches * self.microbatches
        return all(self.empty(n) or n in besides for n in range(begin, begin + self.microbatches))

    # -- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """What is on its way: a tree for a checkpoint."""
        return {
            "fed": self._fed,
            "largest": self._largest,
            "without": list(self._without),
            "visits": None if self._visits is None else self._visits.counts,
            "parts": [
                [n] if p is None else [n, p.inputs, p.labels, p.ids, p.share, p.total] for n, p in self._parts.items()
            ],
        }

    def load_state_dict(self, state: dict[str, Any], counted: Counted | None = None) -> None:
        """Continue from what `state_dict` returned, with the same settings."""
        self._fed, self._largest = state["fed"], state.get("largest", 0)  # not in older checkpoints
        self._without = list(state["without"])
        if self._visits is not None:
            self._visits.counts = state["visits"].clone()
        self._parts = {number: _restored(counted, *part) if part else None for number, *part in state["parts"]}


def _restored(
    counted: Counted | None,
    inputs: Tensor | None,
    labels: Tensor | None,
    ids: Tensor | None,
    share: float,
    *total: float | None,
) -> Part:
    if not total and labels is not None and counted is not None and share < 1:  # not in older checkpoints
        total = (counted(labels) / share,)
    return Part(inputs, labels, ids, share, *total)
