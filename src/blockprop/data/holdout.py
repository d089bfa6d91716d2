"""The validation set: a fixed part of the training examples, kept out of training."""

import torch

from blockprop.data.examples import Examples

# Fixed, and apart from any run's seed, so that runs with different seeds are judged on the same examples.
_SEED = 20_000


def check_fraction(validation: float) -> None:
    """Raise ValueError unless ``validation`` is a fraction in [0, 1)."""
    is_number = isinstance(validation, int | float) and not isinstance(validation, bool)
    if not is_number or not 0 <= validation < 1:
        raise ValueError(
            f"validation is {validation if is_number else f'a {type(validation).__name__}'}; it is a fraction of the "
            f"training examples in [0, 1): give for example 0.1, or 0 for no validation set"
        )


def hold_out(examples: Examples, validation: float) -> tuple[Examples, Examples]:
    """Split training examples into (train, validation).

    Args:
        examples: The training examples, N of them.
        validation: Fraction to hold out, in [0, 1); 0 gives a validation set of length 0. At least one
            example is left to train on.

    Returns:
        Two disjoint parts of ``examples``, the same for the same N and fraction, each in the original order.

    Raises:
        ValueError: If ``validation`` is outside [0, 1).

    >>> train, held = hold_out(Examples(torch.zeros(10, 3), torch.zeros(10)), 0.2)
    >>> len(train), len(held)
    (8, 2)
    """
    check_fraction(validation)
    count = min(round(validation * len(examples)), len(examples) - 1)
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(_SEED))
    return examples.select(order[count:].sort().values), examples.select(order[:count].sort().values)
