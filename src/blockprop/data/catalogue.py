"""The datasets that can be loaded by name."""

import os
from pathlib import Path

from blockprop.data import cifar10, digits, idx, text
from blockprop.data.dataset import Dataset

NAMES = ("digits", "mnist", "fashion-mnist", "cifar10", "shakespeare")
"""Names that `load` knows, besides the path of any text file."""


def load(
    name: str,
    data_dir: Path | str | None = None,
    *,
    validation: float = 0.1,
    context: int = 64,
    augment: bool | None = None,
) -> Dataset:
    """Load a dataset by name, or a text file by its path.

    Args:
        name: One of `NAMES`; or the path of a text file, known by a path separator or the ending ".txt", for
            a character-level language model.
        data_dir: Folder of the published files, in their published layout; nothing is downloaded then. None
            for the cache, into which missing files are downloaded. Of no concern to digits and text files.
        validation: Fraction of the training examples held out, in [0, 1). Which ones does not depend on any
            run's seed, and the test set does not depend on it.
        context: Characters per example of a text; of no concern to images.
        augment: Whether training images are augmented; None augments where the dataset has an augmentation,
            which is CIFAR-10 only.

    Returns:
        The dataset, whole and checked.

    Raises:
        ValueError: If the name is unknown, an argument is out of range, a file is missing or damaged, or a
            download fails.

    >>> data = load("digits", validation=0.2)
    >>> len(data.train), len(data.validation), len(data.test), data.sample.shape
    (1150, 287, 360, torch.Size([2, 1, 8, 8]))
    """
    is_text = name.endswith(".txt") or "/" in name or os.sep in name
    if name not in NAMES and not is_text:
        raise ValueError(
            f"unknown dataset {name!r}; expected {', '.join(NAMES)} or the path of a text file (with a "
            f"{os.sep!r} in it or ending in .txt)"
        )
    if augment and name != "cifar10":
        raise ValueError(f"{name} has no augmentation, only cifar10 has: leave augment out or set it to False")
    folder = None if data_dir is None else Path(data_dir).expanduser()
    match name:
        case "digits":
            return digits.load(validation=validation)
        case "mnist" | "fashion-mnist":
            return idx.load(name, folder, validation=validation)
        case "cifar10":
            return cifar10.load(folder, validation=validation, augment=augment is not False)
        case "shakespeare":
            return text.load_shakespeare(folder, validation=validation, context=context)
        case _:
            return text.load(Path(name).expanduser(), name=name, validation=validation, context=context)
