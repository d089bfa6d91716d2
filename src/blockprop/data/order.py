"""The order in which a run sees its examples, and the random numbers of each batch.

Both are functions of (seed, epoch, batch index) alone and carry no state from batch to batch: a run resumed
in the middle of an epoch draws exactly what an uninterrupted one would have drawn.
"""

from collections.abc import Iterator
from hashlib import blake2b

import torch
from torch import Tensor


def batches(n: int, batch_size: int, *, seed: int, epoch: int) -> Iterator[Tensor]:
    """Cut one epoch's permutation of the examples into batches.

    Args:
        n: Number of examples.
        batch_size: Examples per batch; the last batch holds what is left and may be smaller.
        seed: Seed of the run.
        epoch: Number of the epoch, each with its own permutation.

    Returns:
        An iterator over int64 ids [batch_size]; every id in 0..n-1 comes exactly once.

    Raises:
        ValueError: If ``batch_size`` is below 1 or ``n`` is negative.

    >>> [len(ids) for ids in batches(7, 3, seed=0, epoch=0)]
    [3, 3, 1]
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1: give a larger batch_size")
    if n < 0:
        raise ValueError(f"the number of examples is {n}; it must not be negative: pass len(examples)")
    order = torch.randperm(n, generator=_generator("order", seed, epoch))
    return (order[start : start + batch_size] for start in range(0, n, batch_size))


def batch_generator(seed: int, epoch: int, index: int) -> torch.Generator:
    """Give the generator from which one training batch draws its augmentation.

    Args:
        seed: Seed of the run.
        epoch: Number of the epoch.
        index: Number of the batch within the epoch.

    Returns:
        A fresh generator on the CPU, independent of those of all other batches.

    >>> first, again = batch_generator(0, 3, 5), batch_generator(0, 3, 5)
    >>> bool(torch.equal(torch.rand(4, generator=first), torch.rand(4, generator=again)))
    True
    """
    return _generator("batch", seed, epoch, index)


def _generator(*key: str | int) -> torch.Generator:
    # Hashed, because neighbouring raw seeds such as seed + epoch would give two runs a stream in common.
    digest = blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
