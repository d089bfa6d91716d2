"""The metrics of a run: one JSON object a line, and the same in TensorBoard where it is installed.

JSON knows no NaN and no infinity: such a number is written as null.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blockprop.checkpoint import write_atomically

__all__ = ["Metrics", "finite", "read_metrics"]


def finite(value: Any) -> Any:
    """A JSON-ready value with every NaN and infinity in it replaced by None.

    >>> finite({"loss": float("nan"), "gluing_loss": [1.0, float("inf")]})
    {'loss': None, 'gluing_loss': [1.0, None]}
    """
    match value:
        case dict():
            return {key: finite(item) for key, item in value.items()}
        case list() | tuple():
            return [finite(item) for item in value]
        case float() if not math.isfinite(value):
            return None
        case _:
            return value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file, oldest first; a last line cut short by a crash is left out.

    Raises:
        ValueError: any other line is not a JSON object.
    """
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"a {type(row).__name__}")
            rows.append(row)
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"{path} line {number} is not JSON; expected one object a line") from error
    return rows


class Metrics:
    """Writes rows of metrics as they come.

    Args:
        path: the `.jsonl` file; appended to.
        tensorboard: folder for TensorBoard's files, or None for none. Without TensorBoard installed it is
            ignored: it is a view of the same numbers.
    """

    def __init__(self, path: Path | str, tensorboard: Path | None = None) -> None:
        self.path = path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not (content := path.read_bytes()).endswith(b"\n"):
            # a crash cut the last line: a row written behind it would be lost with it
            write_atomically(path, content[: content.rfind(b"\n") + 1])
        self._file = path.open("a", encoding="utf-8")
        self._tensorboard = tensorboard
        self._board = _summary_writer(tensorboard)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Write one row.

        Args:
            kind: what was measured: "train", "validation", "diagnostics".
            step: after how many steps.
            values: numbers, None, or lists of numbers (one per block or link); NaN and infinity become null.
        """
        values = finite(dict(values))
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._file.flush()
        if self._board is None:
            return
        for name, value in values.items():
            many = value if isinstance(value, list) else [value]
            for index, number in enumerate(many, 1):
                if isinstance(number, int | float):
                    tag = f"{kind}/{name}" + (f"/{index}" if isinstance(value, list) else "")
                    self._board.add_scalar(tag, number, step)

    def rewind(self, step: int) -> None:
        """Forget what was written after a step, so that a resumed run writes it once."""
        kept = [json.dumps(finite(row)) + "\n" for row in read_metrics(self.path) if row["step"] <= step]
        self._file.close()
        write_atomically(self.path, "".join(kept).encode())
        self._file = self.path.open("a", encoding="utf-8")
        if self._board is not None:
            self._board.close()
            self._board = _summary_writer(self._tensorboard, purge_step=step + 1)

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def _summary_writer(folder: Path | None, purge_step: int | None = None) -> Any:
    """A writer for TensorBoard, which then forgets what was written of `purge_step` and later."""
    if folder is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - optional, and slow to import
    except ImportError:
        return None
    return SummaryWriter(log_dir=str(folder), purge_step=purge_step)
