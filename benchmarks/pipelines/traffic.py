"""Bytes between two workers in a step, counted; and where the paper's claim about them reverses.

Section 3 of the paper: blocks exchange gluing variables only, which is less than the gradients that data parallelism
exchanges. That holds as long as a batch at the cut is smaller than the weights.
"""

from collections.abc import Sequence

_FLOAT = 4


def data_parallel(weights: int, workers: int = 2) -> int:
    """Bytes that each worker sends in a ring all-reduce of all gradients.

    Args:
        weights: bytes of the weights.
        workers: how many.

    >>> data_parallel(1000)
    1000
    """
    return 2 * (workers - 1) * weights // workers


def pipeline(batch: int, boundaries: Sequence[int], bytes_each: int = _FLOAT) -> int:
    """Bytes in each direction: activations one way, their gradients or targets the other.

    Args:
        batch: examples in a step, whatever the number of microbatches.
        boundaries: numbers that an example has at each cut between processes.
        bytes_each: of a number.

    >>> pipeline(128, [1024])
    524288
    """
    return batch * sum(boundaries) * bytes_each


def reversal(weights: int, boundary: int) -> float:
    """The batch from which on blocks send more than data parallelism.

    >>> reversal(weights=4 * 1000, boundary=10)
    100.0
    """
    return data_parallel(weights) / pipeline(1, [boundary])
