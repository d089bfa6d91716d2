"""What a person sees of a run or of many: a live bar on a terminal, a line an epoch or a run elsewhere."""

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from blockprop.experiments.settings import Settings
from blockprop.metrics import read_metrics
from blockprop.training import Training

__all__ = ["Progress", "SweepProgress"]


class Progress:
    """Shows step, rate, loss, validation and time left.

    Args:
        settings: the run's, for its title.
        quiet: show nothing.
    """

    def __init__(self, settings: Settings, *, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet, highlight=False)
        form = f" ({settings.form}, K = {settings.blocks})" if settings.algorithm == "blockprop" else ""
        self.title = f"{settings.algorithm}{form} on {settings.data}, seed {settings.seed}"
        self.bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            transient=True,
            disable=quiet or not self.console.is_terminal,
        )
        self.task = self.bar.add_task(self.title, total=None, rate="", note="")

    def __enter__(self) -> "Progress":
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def update(self, training: Training) -> None:
        """Show where a training is."""
        rate = training.samples / training.seconds if training.seconds else 0.0
        means = training.epoch_means
        note = f"loss {means.loss / max(means.examples, 1):.4f}"
        if training.score:
            note += f", {training.evaluate_on} {_figure(training.score.accuracy, training.score.loss)}"
        if means.unstable:
            note += f", {means.unstable} unstable h-steps"
        self.bar.update(
            self.task, total=training.total_steps, completed=training.step, rate=f"{rate:,.0f}/s", note=note
        )
        if not self.console.is_terminal and (
            training.step % training.steps_per_epoch == 0 or training.step == training.total_steps
        ):
            epoch = round(training.step / training.steps_per_epoch, 2)
            self.console.print(f"{self.title}: epoch {epoch:g}, {note}, {rate:,.0f} samples/s", soft_wrap=True)


def _figure(accuracy: float | None, loss: float) -> str:
    return f"{loss:.4f}" if accuracy is None else f"{accuracy:.2%}"


_LOOK, _SAY = 5.0, 600.0
"""Seconds after which a sweep looks at the runs that are going on, and says so where there is no terminal."""


@dataclass(frozen=True, eq=False)
class _Running:
    row: str
    name: str
    folder: Path
    settings: Settings

    def so_far(self) -> tuple[float, float]:
        """Its share that is done, and the seconds that it took, by the last row of its metrics."""
        rows = read_metrics(self.folder / "metrics.jsonl")
        if not rows:
            return 0.0, 0.0
        whole, done = (
            (self.settings.steps, "step") if self.settings.steps else (self.settings.resolved().epochs, "epoch")
        )
        return (min(1.0, rows[-1][done] / whole) if whole else 0.0), rows[-1].get("seconds", 0.0)


class SweepProgress:
    """Shows how many of many runs are done, how far those are that go on, and the time left.

    The time is estimated from how long finished runs took; before one has, from how far those have come that go on.

    Args:
        title: what is run.
        expected: for every row of like runs, how many there will be.
        jobs: runs at a time.
        quiet: show nothing.
    """

    def __init__(self, title: str, expected: dict[str, int], *, jobs: int = 1, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet, highlight=False)
        self.expected = dict(expected)
        self.durations: dict[str, list[float]] = {row: [] for row in expected}
        self.jobs = jobs
        self.running: dict[Path, _Running] = {}
        self._ended = threading.Event()
        self._watch = threading.Thread(target=self._look, daemon=True)
        self.bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[now]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=self.console,
            transient=True,
            disable=quiet or not self.console.is_terminal,
        )
        self.task = self.bar.add_task(title, total=sum(expected.values()), left="", now="")

    def __enter__(self) -> "SweepProgress":
        self.bar.start()
        self._watch.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._watch.join()
        self.bar.stop()

    def seconds_left(self) -> float:
        """The time that the runs to come will take: each what those of its row took, or those of all rows."""
        return self._seconds_left(self._so_far())

    def _so_far(self) -> dict[_Running, tuple[float, float]]:
        return {one: one.so_far() for one in list(self.running.values())}

    def _seconds_left(self, so_far: dict[_Running, tuple[float, float]]) -> float:
        known = {row: list(seconds) for row, seconds in self.durations.items()}
        spent = 0.0
        for one, (share, seconds) in so_far.items():
            spent += seconds
            if share and not self.durations[one.row]:
                known[one.row].append(seconds / share)
        all_runs = [seconds for row in known.values() for seconds in row]
        if not all_runs:
            return 0.0
        left = [
            max(0, count - len(self.durations[row])) * fmean(known[row] or all_runs)
            for row, count in self.expected.items()
        ]
        return max(0.0, sum(left) - spent) / self.jobs

    def started(self, row: str, name: str, folder: Path, settings: Settings) -> None:
        """A run of a row goes on in a folder."""
        self.running[folder] = _Running(row, name, folder, settings)

    def finished(self, row: str, seconds: float, note: str, folder: Path | None = None) -> None:
        """Count a run of a row in, and say what came of it."""
        if folder is not None:
            self.running.pop(folder, None)
        self.durations[row].append(seconds)
        done = sum(map(len, self.durations.values()))
        total = sum(self.expected.values())
        left = _duration(self.seconds_left())
        self.bar.update(self.task, completed=done, left=left)
        self.console.print(f"{done}/{total} {note} ({left} left)", soft_wrap=True)

    def _look(self) -> None:
        """Show how far the runs are that go on; now and then where there is no terminal."""
        said = time.monotonic()
        while not self._ended.wait(_LOOK):
            so_far = self._so_far()
            now = ", ".join(f"{one.name} {share:.0%}" for one, (share, _) in so_far.items())
            left = _duration(self._seconds_left(so_far))
            self.bar.update(self.task, now=now, left=left)
            if not self.console.is_terminal and time.monotonic() - said >= _SAY:
                said = time.monotonic()
                self.console.print(f"going on: {now} ({left} left)", soft_wrap=True)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes} min" if minutes < 90 else f"{seconds / 3600:.1f} h"
