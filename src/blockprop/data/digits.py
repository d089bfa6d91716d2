"""The 8 x 8 handwritten digits that come with scikit-learn: a dataset that needs no files and no network."""

import torch

from blockprop.data.dataset import Dataset
from blockprop.data.examples import Examples
from blockprop.data.holdout import check_fraction, hold_out
from blockprop.data.normalise import Normalise

_TEST = 360
_SPLIT_SEED = 1797


def load(*, validation: float = 0.1) -> Dataset:
    """Load the digits: 1,797 images, of which the same 360 are always the test set.

    Args:
        validation: Fraction of the other 1,437 images to hold out, in [0, 1).

    Returns:
        A dataset with inputs float32 [N, 1, 8, 8] in [0, 1] and ten classes.

    Raises:
        ValueError: If scikit-learn is not installed or ``validation`` is outside [0, 1).
    """
    check_fraction(validation)
    try:
        from sklearn.datasets import load_digits  # noqa: PLC0415 - an optional dependency, and slow to import
    except ImportError as error:
        raise ValueError("digits needs scikit-learn: pip install 'blockprop[all]'") from error
    published = load_digits()
    images = torch.from_numpy(published.images).to(torch.uint8)[:, None]
    labels = torch.from_numpy(published.target).long()
    digits = Examples(images, labels, Normalise(maximum=16.0))
    # Permuted, because the published order groups the writers.
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    kept, held = hold_out(digits.select(order[_TEST:]), validation)
    return Dataset("digits", kept, held, digits.select(order[:_TEST]), 10, (1, 8, 8), "classification")
