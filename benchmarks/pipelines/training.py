"""Real training runs, by the command line: started, followed, and ended when they have said what is wanted."""

import json
import math
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from benchmarks.pipelines.processes import Crew, FailedError, Place
from blockprop import cli
from blockprop.experiments.settings import Settings
from blockprop.metrics import read_metrics
from blockprop.runtime.rendezvous import LOOPBACK

_PORT, _POLL = 29571, 0.5
_DIVERGED = "training diverged"  # as a run says it


@dataclass
class Trained:
    """What a run left.

    Attributes:
        curve: examples and validation loss at every evaluation; its last loss is infinity if training diverged.
        clock: examples and seconds of training, at every row of training metrics.
        summary: its `summary.json`, if it came to its end.
    """

    curve: list[tuple[int, float]] = field(default_factory=list)
    clock: list[tuple[int, float]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Samples/s between the first row and the last: without the filling of the pipeline.

        Raises:
            FailedError: there are not two rows.
        """
        if len(self.clock) < 2:
            raise FailedError("the run told no speed")
        (before, start), (after, end) = self.clock[0], self.clock[-1]
        return (after - before) / (end - start)


def missing() -> str | None:
    """Why blocks cannot run in processes of their own here, or None."""
    return None if hasattr(cli, "worker") else "this blockprop has no processes"


def arguments(settings: Settings, more: Mapping[str, Any] | None = None) -> list[str]:
    """The command line of these settings, without those at their defaults.

    >>> arguments(Settings(width=8, split_at=("layer2",), augment=False), {"policy": "lock-step"})
    ['--no-augment', '--width', '8', '--split-at', 'layer2', '--policy', 'lock-step']
    """
    defaults = Settings()
    values = {f.name: getattr(settings, f.name) for f in fields(Settings)}
    values = {key: value for key, value in values.items() if value != getattr(defaults, key)} | dict(more or {})
    found: list[str] = []
    for key, value in values.items():
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            found += [f"--{flag}", *(str(one) for one in (value if isinstance(value, tuple) else (value,)))]
    return found


def commands(flags: Sequence[str], out: Path, places: Sequence[Place], port: int) -> list[list[str]]:
    """The command line of every process: one that trains alone, or a worker for each block; the lower has the store."""
    if len(places) == 1:
        return [["train", *flags, "--out", str(out), "--quiet"]]
    store = f"{places[0].address}:{port}"
    return [
        [
            "worker",
            "--block",
            str(block),
            "--store",
            store,
            "--listen",
            place.address,
            *flags,
            "--out",
            str(out),
            "--quiet",
        ]
        for block, place in enumerate(places, 1)
    ]


def command(rank: int, settings: dict[str, Any]) -> None:
    """In a process of its own: carry out a command line; its last words are the error if it fails."""
    log = Path(settings["log"]).with_suffix(f".{rank}")
    tempfile.tempdir = str(log.parent)  # what a run that is ended leaves goes with its folder
    with log.open("w") as said:
        for number in (1, 2):
            os.dup2(said.fileno(), number)
        code = cli.main(settings["commands"][rank])
        sys.stderr.flush()
    if code:
        raise RuntimeError((log.read_text(errors="replace").strip().splitlines() or ["no message"])[-1])


def train(
    flags: Sequence[str],
    *,
    places: Sequence[Place],
    limit: float,
    enough: Callable[[Trained], bool] | None = None,
) -> Trained:
    """Run until it ends, or until it is enough; the folder is removed.

    Args:
        flags: of `blockprop train`, without `--out`.
        places: of its processes: one for each block, or one alone.
        limit: seconds.
        enough: asked again and again.

    Raises:
        FailedError: the run failed, or took too long.
    """
    with tempfile.TemporaryDirectory(prefix="blockprop-pipelines-") as folder:
        out = Path(folder) / "run"
        port = _PORT if places[0].namespace else _free_port()
        settings = {"commands": commands(flags, out, places, port), "log": str(Path(folder) / "log")}
        try:
            with Crew(command, settings, places, limit) as crew:
                while not crew.over:
                    crew.hear(_POLL)
                    if enough is not None and enough(found := _read(out)):
                        return found
        except FailedError as error:
            if _DIVERGED not in str(error):
                raise
            found = _read(out)
            found.curve.append((found.curve[-1][0] + 1 if found.curve else 1, math.inf))
            return found
        return _read(out)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def _read(out: Path) -> Trained:
    found = Trained()
    for row in read_metrics(out / "metrics.jsonl"):
        if row["kind"] == "train":
            found.clock.append((row["samples"], row["seconds"]))
        elif row["kind"] == "validation":
            loss = row.get("loss")
            found.curve.append((row["samples"], math.inf if loss is None else loss))
    if (out / "summary.json").exists():
        found.summary = json.loads((out / "summary.json").read_text())
    return found
