"""CIFAR-10, from the published binary files or the published Python batches.

A binary file is a row of records: one label byte, then the 3,072 pixels of a 32 x 32 image, red before green
before blue.
"""

import tarfile
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from blockprop.data.augment import CropAndFlip
from blockprop.data.cifar_pickle import read_pickle
from blockprop.data.dataset import Dataset
from blockprop.data.download import cache_folder, fetch
from blockprop.data.examples import Examples
from blockprop.data.holdout import check_fraction, hold_out
from blockprop.data.normalise import Normalise

NORMALISATION = Normalise(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
"""Mean and deviation of the training images, for red, green and blue."""

_ARCHIVE = "cifar-10-binary.tar.gz"
_BINARY = "cifar-10-batches-bin"
_PYTHON = "cifar-10-batches-py"
_TRAIN = [f"data_batch_{number}" for number in range(1, 6)]
_TEST = "test_batch"
_SHAPE = (3, 32, 32)
_PIXELS = 3 * 32 * 32
_CLASSES = 10

Records = tuple[np.ndarray, np.ndarray]
"""Pixels uint8 [N, 3072] and labels int64 [N]."""


def load(data_dir: Path | None, *, validation: float = 0.1, augment: bool = True) -> Dataset:
    """Load CIFAR-10.

    Args:
        data_dir: Folder of ``cifar-10-batches-bin`` or ``cifar-10-batches-py`` (the first is read if both are
            there); None for the cache, which is filled by download.
        validation: Fraction of the 50,000 training images to hold out, in [0, 1).
        augment: Whether training images are cropped and mirrored at random, as `CropAndFlip` does.

    Returns:
        A dataset with inputs float32 [N, 3, 32, 32] and ten classes.

    Raises:
        ValueError: If a file is missing or damaged, or the download fails.
    """
    check_fraction(validation)
    if data_dir is None:
        data_dir = cache_folder()
        _fill(data_dir / _BINARY)
    if (data_dir / _BINARY).is_dir():
        folder, suffix, reader = data_dir / _BINARY, ".bin", read_binary
    elif (data_dir / _PYTHON).is_dir():
        folder, suffix, reader = data_dir / _PYTHON, "", read_pickle
    else:
        raise ValueError(
            f"neither {data_dir / _BINARY} nor {data_dir / _PYTHON} exists; expected one of these published "
            f"folders: put it there, name another folder as data_dir, or name none to download it"
        )
    train = _examples([folder / f"{name}{suffix}" for name in _TRAIN], reader)
    test = _examples([folder / f"{_TEST}{suffix}"], reader)
    kept, held = hold_out(train, validation)
    if augment:
        kept = Examples(kept.inputs, kept.targets, NORMALISATION, CropAndFlip())
    return Dataset("cifar10", kept, held, test, _CLASSES, _SHAPE, "classification")


def read_binary(path: Path) -> Records:
    """Read one published binary file.

    Returns:
        Pixels uint8 [N, 3072] and labels int64 [N].

    Raises:
        ValueError: If the file's size is not a positive multiple of 3,073 bytes.
    """
    content = np.fromfile(path, np.uint8)
    if len(content) == 0 or len(content) % (1 + _PIXELS):
        raise ValueError(
            f"{path} holds {len(content)} bytes, expected a positive multiple of {1 + _PIXELS}: "
            f"get the published file again"
        )
    records = content.reshape(-1, 1 + _PIXELS)
    return records[:, 1:], records[:, 0].astype(np.int64)


def _examples(paths: list[Path], reader: Callable[[Path], Records]) -> Examples:
    pixels, labels = zip(*(_checked(path, reader) for path in paths), strict=True)
    images = torch.from_numpy(np.concatenate(pixels)).view(-1, *_SHAPE)
    return Examples(images, torch.from_numpy(np.concatenate(labels)), NORMALISATION)


def _checked(path: Path, reader: Callable[[Path], Records]) -> Records:
    if not path.is_file():
        raise ValueError(f"{path} does not exist; expected the published file there: unpack the archive again")
    pixels, labels = reader(path)
    wrong = labels[(labels < 0) | (labels >= _CLASSES)]
    if len(wrong):
        raise ValueError(
            f"{path} holds the label {wrong[0]}, expected 0 to {_CLASSES - 1}: get the published file again"
        )
    return pixels, labels


def _fill(folder: Path) -> None:
    """Download and unpack the binary files into ``folder`` unless all of them are there."""
    wanted = [f"{name}.bin" for name in [*_TRAIN, _TEST]]
    if all((folder / name).is_file() for name in wanted):
        return
    archive = fetch(_ARCHIVE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archive, "r:gz") as members:
            for name in wanted:
                _extract(members, name, folder)
        archive.unlink()
    except (tarfile.TarError, KeyError, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{archive} cannot be unpacked into {folder} ({error}): delete it and try again") from error


def _extract(members: tarfile.TarFile, name: str, folder: Path) -> None:
    # The destination is spelled here and never taken from the archive, so that no member can land elsewhere;
    # the rename makes a file appear whole or not at all.
    content = members.extractfile(f"{_BINARY}/{name}")
    if content is None:
        raise tarfile.TarError(f"{name} is not a file")
    with content, tempfile.TemporaryDirectory(dir=folder) as scratch:
        partial = Path(scratch, name)
        partial.write_bytes(content.read())
        partial.replace(folder / name)
