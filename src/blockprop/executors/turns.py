"""Which link of a pipeline has its curvature measured, and when."""

import itertools
from collections import Counter

from blockprop.schedules import Action, Tick

__all__ = ["Turns"]


class Turns:
    """Which links are to have the curvature above them measured, and where that tells something.

    A block must have moved since it forwarded a microbatch, and of the microbatches of a batch some never see an
    update. A link whose turn has come waits for one that does: so much can be told from the schedule, which all
    processes know, and they all have to take part.

    Args:
        accumulate: the weights move at every n-th update; default 1.

    Attributes:
        due: the links whose turn has come, from 0 at the bottom.
    """

    def __init__(self, accumulate: int = 1) -> None:
        self.due: set[int] = set()
        self._accumulate = accumulate
        self._updates: Counter[int] = Counter()  # by block
        self._forwarded: dict[tuple[int, int], int] = {}  # by block and microbatch: the updates before it

    def take(self, action: Action, tick: Tick) -> bool:
        """Whether a block's turn has come and it has moved; if so, it is over."""
        k, _, number = action
        before = itertools.takewhile(lambda other: other != action, tick)
        updates = self._updates[k] + sum(kind == "update" and j == k for j, kind, _ in before)
        then = self._forwarded.get((k, number), updates)
        if k - 1 not in self.due or updates // self._accumulate == then // self._accumulate:
            return False
        self.due.remove(k - 1)
        return True

    def past(self, tick: Tick) -> None:
        """A tick is over."""
        for k, kind, number in tick:
            if kind == "update":
                self._updates[k] += 1
            elif kind == "forward":
                self._forwarded[k, number] = self._updates[k]
            else:
                self._forwarded.pop((k, number), None)
