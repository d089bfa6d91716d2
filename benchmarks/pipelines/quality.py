"""Quality, and the examples that it takes: as in `benchmarks.delay`.

Q is backprop's mean validation loss at 80 % of the budget, at a constant step size. It is reached at the first
evaluation whose running median of three is at or below Q.
"""

import math
import statistics
from collections.abc import Sequence

Curve = Sequence[tuple[int, float]]
"""Examples seen, and the validation loss then; in order. A loss that is not finite is infinity."""

SHARE = 0.8


def medians(curve: Curve) -> list[tuple[int, float]]:
    """The curve as running medians of three.

    >>> medians([(1, 5.0), (2, 1.0), (3, 4.0), (4, 3.0)])
    [(1, 5.0), (2, 3.0), (3, 4.0), (4, 3.0)]
    """
    losses = [loss for _, loss in curve]
    return [(seen, statistics.median(losses[max(0, i - 2) : i + 1])) for i, (seen, _) in enumerate(curve)]


def level(curves: Sequence[Curve], budget: int) -> float:
    """Q.

    Args:
        curves: of backprop, one a seed.
        budget: in examples.

    Raises:
        ValueError: a curve that has no evaluation so early.
    """
    found = []
    for curve in curves:
        early = [loss for seen, loss in medians(curve) if seen <= SHARE * budget]
        if not early:
            raise ValueError(f"no evaluation within {SHARE:.0%} of the budget of {budget} examples")
        found.append(early[-1])
    return statistics.fmean(found)


def examples_to(curve: Curve, wanted: float) -> float:
    """Examples until the level is reached; infinity if it never is.

    >>> examples_to([(1, 5.0), (2, 3.0), (3, 3.0), (4, 1.0)], 3.0)
    3
    """
    return next((seen for seen, loss in medians(curve) if loss <= wanted), math.inf)
