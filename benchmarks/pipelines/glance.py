"""The tables of `report` at a glance: time to Q and samples/s of every kind of method, workload by workload."""

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.measure import table
from benchmarks.pipelines.link import SPEEDS

Row = Mapping[str, Any]
ABOUT = (
    "Time to Q over one thread's, in brackets samples/s over one thread's; both medians. Below 1, and above 1 in "
    "brackets, is faster than one thread. Of torch's schedules at the same batch, and of microbatches with stashed "
    "weights, the one that has the shortest time is shown, with its microbatches."
)
_SCHEDULES = ("GPipe", "1F1B", "ZBV")


def glance(results: Mapping[str, Any], titles: Mapping[str, str]) -> list[str]:
    """A table for every link; nothing where nothing was measured.

    Args:
        results: `results.json`.
        titles: of the workloads, by name.
    """
    parts = []
    for speed in SPEEDS:
        found = {name: results["groups"].get(f"{name}/{speed.name}", {}).get("rows", {}) for name in titles}
        columns = {name: [row for row in rows.values() if "ratio" in row] for name, rows in found.items() if rows}
        lines = [[title, *(cell(best(rows, belongs)) for rows in columns.values())] for title, belongs in KINDS]
        lines = [line for line in lines if any(line[1:])]
        if lines:
            parts += [f"### {speed.title}", table(["", *(titles[name] for name in columns)], lines)]
    return ["## At a glance", ABOUT, *parts] if parts else []


def best(rows: list[Row], belongs: Callable[[str], bool]) -> Row | None:
    """Of the methods that belong together the one that is soonest at Q, or has most samples/s where none is."""
    ours = [row for row in rows if belongs(row["method"])]
    return min(ours, key=lambda row: (row.get("time", float("inf")), -row["ratio"]), default=None)


def cell(row: Row | None) -> str:
    """Time to Q, and samples/s in brackets.

    >>> cell({"method": "ZBV, 4", "ratio": 1.44, "time": 0.69, "examples": [1.0]})
    '0.69 (1.44); ZBV, 4'
    >>> cell({"method": "DDP", "ratio": 1.5, "examples": [None, None]})
    'never (1.50)'
    >>> cell({"method": "DDP", "ratio": 1.5})
    '(1.50)'
    >>> cell({"method": "DDP", "ratio": 1.5, "time": 1.0, "examples": [1.5, None]})
    '1.00, 1 seed never (1.50)'
    """
    if row is None:
        return ""
    speed, examples = f"({row['ratio']:.2f})", row.get("examples", ())
    never = sum(one is None for one in examples)
    if "time" in row:
        shown = f"{row['time']:.2f}" + (f", {never} seed{'s' * (never > 1)} never" if never else "") + f" {speed}"
    else:
        shown = f"never {speed}" if never else speed
    return shown + (f"; {which}" if (which := _choice(row["method"])) else "")


def _choice(method: str) -> str:
    """What tells it apart from the others of its kind.

    >>> _choice("BlockProp, lock-step, stashed, 4 microbatches"), _choice("1F1B, 8 x 128"), _choice("DDP")
    ('4', '', '')
    """
    if _schedule(method):
        return method
    return method.rsplit(", ", maxsplit=1)[-1].split(maxsplit=1)[0] if _stashed_parts(method) else ""


def _schedule(method: str) -> bool:
    return method.startswith(_SCHEDULES) and " x " not in method


def _stashed_parts(method: str) -> bool:
    return method.startswith("BlockProp, lock-step, stashed, ")


def _is(name: str) -> Callable[[str], bool]:
    return lambda method: method == name


KINDS: tuple[tuple[str, Callable[[str], bool]], ...] = (
    ("two threads", _is("two threads")),
    ("DDP", _is("DDP")),
    ("torch's best schedule", _schedule),
    ("1F1B, several batches at a time", lambda method: " x " in method),
    ("**lock-step, 2 microbatches, the default**", _is("BlockProp, lock-step, 2 microbatches")),
    ("lock-step, 1 microbatch", _is("BlockProp, lock-step")),
    ("lock-step, stashed, 1 microbatch", _is("BlockProp, lock-step, stashed")),
    ("lock-step, stashed, more microbatches", _stashed_parts),
    ("free-running, 2 microbatches", _is("BlockProp, free-running, 2 microbatches")),
    ("free-running, 2 microbatches, int8", _is("BlockProp, free-running, 2 microbatches, int8")),
    ("free-running, 1 microbatch", _is("BlockProp, free-running")),
    ("free-running, 1 microbatch, int8", _is("BlockProp, free-running, int8")),
    ("cached, E = 2", _is("BlockProp, cached, E = 2")),
    ("cached, E = 4", _is("BlockProp, cached, E = 4")),
)
"""The methods of a line, by name."""
