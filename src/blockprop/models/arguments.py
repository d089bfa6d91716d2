"""Checks of the arguments that the models have in common."""


def check_sizes(**sizes: int) -> None:
    """Raise ValueError unless every size is a whole number of at least 1.

    >>> check_sizes(width=0)
    Traceback (most recent call last):
        ...
    ValueError: width is 0; expected a whole number of at least 1: give a larger width
    """
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} is {size!r}; expected a whole number of at least 1: give a larger {name}")


def check_dropout(dropout: float) -> None:
    """Raise ValueError unless ``dropout`` is a probability in [0, 1)."""
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}; expected a probability in [0, 1): give for example 0.1, or 0 for none")
