"""MNIST and Fashion-MNIST, in the IDX format they are published in.

An IDX file is two zero bytes, a type byte (8 for uint8), the number of dimensions, each dimension as a
big-endian 32-bit integer, and then the values themselves.
"""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from blockprop.data.dataset import Dataset
from blockprop.data.examples import Examples
from blockprop.data.files import locate
from blockprop.data.holdout import check_fraction, hold_out
from blockprop.data.normalise import Normalise

NORMALISATION = {
    "mnist": Normalise(mean=(0.1307,), std=(0.3081,)),
    "fashion-mnist": Normalise(mean=(0.2860,), std=(0.3530,)),
}
"""Mean and deviation of the training images of each dataset in this format."""

_SIDE = 28
_CLASSES = 10


def load(name: str, data_dir: Path | None, *, validation: float = 0.1) -> Dataset:
    """Load MNIST or Fashion-MNIST.

    Args:
        name: "mnist" or "fashion-mnist", also the folder that the four published files lie in.
        data_dir: Folder of that folder; None for the cache, which is filled by download.
        validation: Fraction of the 60,000 training images to hold out, in [0, 1).

    Returns:
        A dataset with inputs float32 [N, 1, 28, 28] and ten classes.

    Raises:
        ValueError: If a file is missing, damaged, or does not fit the others.
    """
    check_fraction(validation)
    train = _examples(name, "train", data_dir)
    test = _examples(name, "t10k", data_dir)
    kept, held = hold_out(train, validation)
    return Dataset(name, kept, held, test, _CLASSES, (1, _SIDE, _SIDE), "classification")


def read(path: Path, dimensions: int) -> Tensor:
    """Read one IDX file of bytes, gzipped if its name ends in ".gz".

    Args:
        path: The file.
        dimensions: Number of dimensions it must have.

    Returns:
        uint8 with the dimensions of the file.

    Raises:
        ValueError: If the gzip stream is damaged, the magic number or the number of dimensions is another,
            a dimension is 0, or the file is shorter or longer than its dimensions say.
    """
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is not a whole gzip file ({error}): get the published file again") from error
    magic = bytes([0, 0, 8, dimensions])
    if content[:4] != magic:
        raise ValueError(
            f"{path} starts with {content[:4].hex(' ') or 'nothing'}, expected {magic.hex(' ')} "
            f"for {dimensions}-dimensional IDX bytes: get the published file again"
        )
    start = 4 + 4 * dimensions
    shape = struct.unpack(f">{dimensions}I", content[4:start]) if len(content) >= start else ()
    expected = start + math.prod(shape)
    if not shape or len(content) != expected:
        raise ValueError(
            f"{path} holds {len(content)} bytes, expected {expected if shape else f'at least {start}'}: "
            f"get the published file again"
        )
    if 0 in shape:
        raise ValueError(f"{path} has dimensions {list(shape)}, expected none of 0: get the published file again")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy())


def _examples(name: str, part: str, data_dir: Path | None) -> Examples:
    images_path = locate(f"{name}/{part}-images-idx3-ubyte.gz", data_dir)
    labels_path = locate(f"{name}/{part}-labels-idx1-ubyte.gz", data_dir)
    images = read(images_path, dimensions=3)
    labels = read(labels_path, dimensions=1)
    if images.shape[1:] != (_SIDE, _SIDE):
        raise ValueError(
            f"{images_path} holds images of {images.shape[1]} x {images.shape[2]} pixels, "
            f"expected {_SIDE} x {_SIDE}: get the published file again"
        )
    if len(images) != len(labels):
        raise ValueError(
            f"{images_path} holds {len(images)} images but {labels_path} holds {len(labels)} labels, "
            f"expected as many: get the published files again"
        )
    if (highest := int(labels.max())) >= _CLASSES:
        raise ValueError(
            f"{labels_path} holds the label {highest}, expected 0 to {_CLASSES - 1}: get the published file again"
        )
    return Examples(images[:, None], labels.long(), NORMALISATION[name])
