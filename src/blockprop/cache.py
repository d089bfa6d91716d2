"""What is kept of every training example from one visit to the next: one entry per example and link.

An entry is an anchor, the output b(h) of the block below the link when the entry was made, and a direction, the way
from there: the slope of the example's own loss in that output, or the displacement h* - b(h) of its gluing variable.
Both are of the example alone (sums over its predictions, no mean over a batch), so that it may come back in any
other batch. h* itself is never stored: the displacement would drown in its rounding.
"""

import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["Entries", "GluingCache", "Visits"]

_DTYPES = (torch.float32, torch.bfloat16, torch.int8, torch.float64)
_AGE_BYTES = 12  # per entry: its visits in int32, the step when it was written in int64


class Entries(NamedTuple):
    """The entries of some examples at one link.

    Attributes:
        anchor: b(h) when they were made, shape [N, ...].
        direction: the way from there, shape [N, ...].
    """

    anchor: Tensor
    direction: Tensor


class GluingCache:
    """Entries by example number, in memory or in memory-mapped files.

    Nothing is allocated before the shapes are known (`fit`). Mapped files have no names: they take room in the
    folder while the process lives, and two runs never share them.

    Args:
        examples: how many there are; their numbers are 0, ..., examples - 1.
        path: a folder for the files, made if missing; default None, in memory.
        dtype: float32 (default), bfloat16, int8 or float64. Under int8 every anchor and every direction has a
            scale of its own, its largest magnitude / 127, and is off by at most half of that.
        limit: bytes it may take; default half of what is free in memory or on the disk.
        snapshot: bytes up to which mapped entries are copied into checkpoints, default 1 GiB; beyond, a resumed
            run starts with no entries. Those in memory always are.

    Raises:
        ValueError: a setting out of its range, or a folder that cannot be used.

    >>> cache = GluingCache(100)
    >>> cache.fit([(3,)])
    >>> cache.write(0, torch.tensor([7, 4]), torch.zeros(2, 3), torch.ones(2, 3), step=1)
    >>> cache.visit(torch.tensor([7]))
    >>> cache.visits(torch.tensor([7, 4, 0])).tolist(), cache.read(0, torch.tensor([4])).direction.tolist()
    ([[1, 0, -1]], [[1.0, 1.0, 1.0]])
    """

    def __init__(
        self,
        examples: int,
        *,
        path: Path | str | None = None,
        dtype: torch.dtype = torch.float32,
        limit: int | None = None,
        snapshot: int = 2**30,
    ) -> None:
        if isinstance(examples, bool) or not isinstance(examples, int) or examples < 1:
            raise ValueError(f"the number of examples is {examples}; expected a whole number of at least 1")
        if dtype not in _DTYPES:
            raise ValueError(f"cache dtype is {dtype}; expected one of {', '.join(map(_name, _DTYPES))}")
        for name, value in (("cache limit", limit), ("cache snapshot", snapshot)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                raise ValueError(f"{name} is {value}; expected a whole number of bytes, at least 0")
        self.examples = examples
        self.path = None if path is None else _folder(Path(path))
        self.dtype = dtype
        self.limit = limit
        self.snapshot = snapshot
        self.shapes: list[tuple[int, ...]] | None = None
        self._anchors: list[_Table] = []
        self._directions: list[_Table] = []
        self._visits = torch.full((1, examples), -1, dtype=torch.int32)
        self._written = torch.full((1, examples), -1, dtype=torch.int64)

    def size(self, shapes: Sequence[Sequence[int]]) -> int:
        """Bytes needed for links with these outputs, shapes of one example each."""
        scale = 4 if self.dtype == torch.int8 else 0
        entry = sum(2 * (math.prod(shape) * self.dtype.itemsize + scale) + _AGE_BYTES for shape in shapes)
        return self.examples * entry

    def fit(self, shapes: Sequence[Sequence[int]]) -> None:
        """Make room, once: later calls only compare.

        Args:
            shapes: of one example's output at every link, bottom first.

        Raises:
            ValueError: it takes more than the limit, which the message says with the size; the outputs have other
                shapes than before.
        """
        wanted = [tuple(shape) for shape in shapes]
        if self.shapes == wanted:
            return
        if self.shapes is not None:
            raise ValueError(
                f"the blocks' outputs have shapes {wanted}, the cache holds {self.shapes}; expected examples of one "
                "shape throughout"
            )
        needed, limit = self.size(wanted), self._free() // 2 if self.limit is None else self.limit
        if needed > limit:
            where = "memory" if self.path is None else str(self.path)
            raise ValueError(
                f"the cache needs {_bytes(needed)} for {self.examples} examples and may take {_bytes(limit)} in "
                f"{where}; expected room for it: store int8 or bfloat16, give a folder with more room (--cache PATH), "
                "cut fewer blocks, or raise the limit"
            )
        self._anchors = [_Table(self.examples, shape, self.dtype, self.path) for shape in wanted]
        self._directions = [_Table(self.examples, shape, self.dtype, self.path) for shape in wanted]
        self._visits = torch.full((len(wanted), self.examples), -1, dtype=torch.int32)
        self._written = torch.full((len(wanted), self.examples), -1, dtype=torch.int64)
        self.shapes = wanted

    def check(self, ids: Tensor | None, count: int) -> Tensor:
        """A batch's example numbers, as int64 on the CPU.

        Args:
            ids: as the user gave them.
            count: N, how many there should be.

        Raises:
            ValueError: none, of another number or type, out of range, or one twice: an example cannot have two
                entries, and which one would stay is chance.
        """
        if ids is None:
            raise ValueError("the cache needs the examples' numbers; expected step(inputs, targets, ids)")
        if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dtype == torch.bool or ids.ndim != 1:
            raise ValueError("ids are no list of whole numbers; expected an int64 tensor of shape [N]")
        if len(ids) != count:
            raise ValueError(f"{len(ids)} ids with {count} examples; expected as many of both")
        ids = ids.to("cpu", torch.int64)
        low, high = (int(end) for end in ids.aminmax())
        if low < 0 or high >= self.examples:
            raise ValueError(
                f"ids run from {low} to {high} but the cache is for {self.examples} examples; expected numbers from 0 "
                f"to {self.examples - 1}"
            )
        ordered = ids.sort().values
        twice = ordered[1:][ordered[1:] == ordered[:-1]]
        if len(twice):
            raise ValueError(
                f"id {int(twice[0])} is in the batch more than once; expected every example once: draw batches "
                "without replacement"
            )
        return ids

    def visits(self, ids: Tensor) -> Tensor:
        """How often each entry was used since it was written, int32 [links, N]; -1 where there is none.

        Before the shapes are known there is one row, of -1.
        """
        return self._visits[:, ids]

    def written(self, ids: Tensor) -> Tensor:
        """The step when each entry was written, int64 [links, N]; -1 where there is none."""
        return self._written[:, ids]

    def read(self, link: int, ids: Tensor) -> Entries:
        """The entries of these examples at a link, from 0 at the bottom, on the CPU; zeros where there is none."""
        return Entries(self._anchors[link].read(ids), self._directions[link].read(ids))

    def write(self, link: int, ids: Tensor, anchor: Tensor, direction: Tensor, *, step: int) -> None:
        """Put entries in the place of those that were there; they have been used no time since.

        Args:
            link: from 0 at the bottom.
            ids: the examples, int64 [N].
            anchor: shape [N, ...], on any device.
            direction: shape [N, ...].
            step: the number of the step that made them.
        """
        self._anchors[link].write(ids, anchor)
        self._directions[link].write(ids, direction)
        self._visits[link, ids] = 0
        self._written[link, ids] = step

    def visit(self, ids: Tensor) -> None:
        """Count one more use of these examples' entries."""
        self._visits[:, ids] += 1

    def state_dict(self) -> dict[str, Any]:
        """All entries and their ages, as a tree for a checkpoint; see `snapshot` for what is too large."""
        kept = self.path is None or (self.shapes is not None and self.size(self.shapes) <= self.snapshot)
        return {
            "examples": self.examples,
            "dtype": _name(self.dtype),
            "shapes": self.shapes,
            "visits": self._visits if kept else None,
            "written": self._written if kept else None,
            "tables": [table.tensors() for table in self._anchors + self._directions] if kept else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned, in memory or mapped as this cache is.

        Raises:
            ValueError: the state is of another number of examples, another dtype or other shapes; no room.
        """
        theirs, ours = (state["examples"], state["dtype"]), (self.examples, _name(self.dtype))
        if theirs != ours:
            raise ValueError(
                f"the saved cache is of {theirs[0]} examples in {theirs[1]}, this one is of {ours[0]} in {ours[1]}; "
                "expected the same data and settings"
            )
        if state["shapes"] is not None:
            self.fit(state["shapes"])
        if state["tables"] is None or state["shapes"] is None:
            self._visits.fill_(-1)
            self._written.fill_(-1)
            return
        self._visits.copy_(state["visits"])
        self._written.copy_(state["written"])
        for table, saved in zip(self._anchors + self._directions, state["tables"], strict=True):
            for mine, value in zip(table.tensors(), saved, strict=True):
                mine.copy_(value)

    def _free(self) -> int:
        return _free_memory() if self.path is None else shutil.disk_usage(self.path).free


class Visits:
    """Which batches have feedback, where it comes on every E-th visit of an example only.

    It follows from the examples' numbers alone, so that every process of a pipeline knows it without being told.

    Args:
        examples: how many there are.
        refresh: E ≥ 1.

    Raises:
        ValueError: E is no whole number of at least 1.

    >>> visits = Visits(4, refresh=2)
    >>> [visits.due(torch.tensor(ids)) for ids in ([0, 1], [2, 3], [0, 1], [1, 2])]
    [True, True, False, True]
    """

    def __init__(self, examples: int, refresh: int) -> None:
        if isinstance(refresh, bool) or not isinstance(refresh, int) or refresh < 1:
            raise ValueError(f"refresh is {refresh}; expected a whole number of visits, at least 1")
        self.refresh = refresh
        self.counts = torch.zeros(examples, dtype=torch.int32)

    def due(self, ids: Tensor) -> bool:
        """Count a visit of these examples; whether one of them is at its first, or at an E-th after it."""
        due = bool((self.counts[ids] % self.refresh == 0).any())
        self.counts[ids] += 1
        return due


class _Table:
    """One tensor per example, in a dtype that may be coarser than its own."""

    def __init__(self, examples: int, shape: tuple[int, ...], dtype: torch.dtype, folder: Path | None) -> None:
        whole = (examples, *shape)
        self.values = torch.zeros(whole, dtype=dtype) if folder is None else _mapped(folder, whole, dtype)
        self.scales = torch.zeros(examples) if dtype == torch.int8 else None

    def read(self, ids: Tensor) -> Tensor:
        values = self.values[ids]
        if self.scales is None:
            return values.float() if values.dtype == torch.bfloat16 else values
        return values.float() * _beside(self.scales[ids], values)

    def write(self, ids: Tensor, values: Tensor) -> None:
        values = values.detach().to("cpu")
        if self.scales is not None:
            values = values.float()
            scales = values.flatten(1).abs().amax(1) / 127
            values = (values / _beside(scales.where(scales > 0, 1), values)).round().clamp(-127, 127)
            self.scales[ids] = scales
        self.values[ids] = values.to(self.values.dtype)

    def tensors(self) -> list[Tensor]:
        return [self.values] if self.scales is None else [self.values, self.scales]


def _beside(scales: Tensor, values: Tensor) -> Tensor:
    return scales.view(-1, *[1] * (values.ndim - 1))


def _mapped(folder: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros in a file without a name, which goes when the tensor goes."""
    size = math.prod(shape) * dtype.itemsize
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)  # a disk that is full says so now, not in mid-run
            mapped = np.memmap(file, dtype=np.uint8, mode="r+", shape=(size,))
    except OSError as error:
        raise ValueError(
            f"no file of {_bytes(size)} can be made in {folder} ({error.strerror}); expected a folder with room for it"
        ) from error
    return torch.from_numpy(mapped).view(dtype).view(shape)


def _folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{path} is no folder for the cache ({error.strerror}); give another") from error
    return path


def _free_memory() -> int:
    """Bytes that can be taken without swapping, as far as the system says."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    names = getattr(os, "sysconf_names", {})
    pages = next((name for name in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES") if name in names), None)
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE") if pages else 2**63 - 1


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
