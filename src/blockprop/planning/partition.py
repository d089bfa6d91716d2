"""Where to cut a network for a method: no device, and no link, is to take longer than it must.

`split` balances blocks of one arithmetic on equal devices. Here a layer may cost more in one block than in another
(below the top a block evaluates a late batch again, the top does not), devices have speeds, and a cut has a message.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["partition"]

Numbers = NDArray[np.float64]


def partition(
    below: Sequence[float],
    top: Sequence[float],
    speeds: Sequence[float],
    *,
    spared: Sequence[float] | None = None,
    messages: Sequence[float] | None = None,
) -> list[int]:
    """Where each of K consecutive blocks begins, so that the slowest device or link is as fast as can be.

    To a part in 100,000, by bisection; for each limit tried, the ends that the first k blocks can reach follow from
    those of the first k - 1 in one sweep, for K = 1,024 blocks of 2,048 layers in a second.

    Args:
        below: seconds of each layer in a block that has another above it.
        top: seconds of each layer in the last block.
        speeds: of the K devices, bottom first.
        spared: seconds that a block spares on the layer that it begins with, at most what the layer costs; default 0.
        messages: seconds of the message that a cut above each layer sends; default 0.

    Raises:
        ValueError: more devices than layers.

    >>> partition([4, 4, 4, 4], [3, 3, 3, 3], [1, 1])
    [0, 2]
    >>> partition([4] * 7, [3] * 7, [1, 1])
    [0, 3]
    >>> partition([1] * 6, [1] * 6, [2, 1])
    [0, 4]
    >>> partition([1] * 4, [1] * 4, [1, 1], messages=[1, 9, 1, 1])
    [0, 3]
    >>> partition([1] * 4, [1] * 4, [1, 1], messages=[9, 9, 9, 9])
    [0, 2]
    """
    count, blocks = len(below), len(speeds)
    if blocks > count:
        raise ValueError(
            f"cannot cut {count} layer{'s' * (count != 1)} into {blocks} blocks; expected at most {count}: give fewer "
            "--blocks, or more --depth"
        )
    sums = [np.concatenate([[0.0], np.cumsum(costs)]) for costs in (below, top)]
    saves = np.append(np.zeros(count) if spared is None else np.asarray(spared, dtype=np.float64), 0.0)
    sent = np.concatenate([[0.0], np.zeros(count) if messages is None else messages])
    sent[count] = 0.0

    numbers = np.arange(count + 1)

    def reached(limit: float, message: float) -> list[NDArray[np.int64]] | None:
        """For every block and every end of it, the latest beginning within the limits; -1 where there is none."""
        ends = np.full(count + 1, -1)
        ends[0] = 0
        found = []
        for k, speed in enumerate(speeds):
            costs: Numbers = sums[k == blocks - 1]
            latest = np.concatenate([[-1], np.maximum.accumulate(np.where(ends >= 0, numbers, -1))[:-1]])
            took = (costs - (costs + saves)[latest]) / speed
            ends = np.where((latest >= 0) & (took <= limit) & (sent <= message), latest, -1)
            if ends.max() < 0:
                return None
            found.append(ends)
        return found if ends[count] >= 0 else None

    # no limit is below an even share of all work; from there up in steps of twice the size, then by halves
    low = float(min(each[-1] for each in sums) - saves.sum()) / sum(speeds)
    high = max(low, 1e-12)
    while reached(high, high) is None:
        low, high = high, 2 * high
    while high - low > 1e-5 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if reached(middle, middle) is not None else (middle, high)
    # where a link is the slowest, there is room to make the devices more even
    message, low = high, 0.0
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if reached(middle, message) is not None else (middle, high)
    ways = reached(high, message)
    assert ways is not None
    begins = [count]
    for ends in reversed(ways):
        begins.append(int(ends[begins[-1]]))
    return begins[:0:-1]
