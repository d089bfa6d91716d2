"""The Python batches of CIFAR-10, which are pickles, read without trusting them.

Unpickling calls whatever functions a pickle names, so a plain ``pickle.load`` of a downloaded file would run
any code its author liked. The published batches need four names only: three to rebuild a NumPy array and one
by which newer Pythons write bytes. The unpickler here knows these four and refuses every other.
"""

import _codecs
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

_RECONSTRUCT = np.empty(0).__reduce__()[0]

_ALLOWED = {
    # NumPy moved the function; the published files have the old name, re-written ones have the new.
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _codecs.encode,
}


class _ArrayUnpickler(pickle.Unpickler):
    """An unpickler of containers, numbers, bytes and NumPy arrays, and of nothing else."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module_name}.{global_name}, which no published batch does")
        return _ALLOWED[module_name, global_name]


def read_pickle(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read one published Python batch.

    Args:
        path: A file such as ``cifar-10-batches-py/data_batch_1``: a pickled dictionary that holds uint8
            [N, 3072] under ``b"data"`` and a list of N labels under ``b"labels"``.

    Returns:
        Pixels uint8 [N, 3072] and labels int64 [N].

    Raises:
        ValueError: If the pickle is damaged, names anything but an array, or holds something else.
    """
    try:
        # Python 2 wrote the published files: its strings come as bytes.
        batch = _ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except Exception as error:  # a damaged pickle may raise anything
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is not a CIFAR-10 batch ({reason}): get the published file again") from error
    match batch:
        case {b"data": np.ndarray() as pixels, b"labels": [*labels]} if (
            pixels.dtype == np.uint8
            and pixels.ndim == 2
            and pixels.shape[1] == 3072
            and len(pixels) == len(labels) > 0
            and all(type(label) is int and 0 <= label < 256 for label in labels)
        ):
            return pixels, np.array(labels, np.int64)
    raise ValueError(
        f"{path} is not a CIFAR-10 batch, expected uint8 data [N, 3072] and N integer labels: "
        f"get the published file again"
    )
