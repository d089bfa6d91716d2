"""What a person sees of a run or of many: a live bar on a terminal, a line an epoch or a run elsewhere."""

from statistics import fmean
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from blockprop.experiments.settings import Settings
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


class SweepProgress:
    """Shows how many of many runs are done, and the time left, estimated from how long finished ones took.

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
        self.bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=self.console,
            transient=True,
            disable=quiet or not self.console.is_terminal,
        )
        self.task = self.bar.add_task(title, total=sum(expected.values()), left="")

    def __enter__(self) -> "SweepProgress":
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def seconds_left(self) -> float:
        """The time that the runs to come will take: each what those of its row took, or those of all rows."""
        all_runs = [seconds for row in self.durations.values() for seconds in row]
        if not all_runs:
            return 0.0
        left = [
            max(0, count - len(self.durations[row])) * fmean(self.durations[row] or all_runs)
            for row, count in self.expected.items()
        ]
        return sum(left) / self.jobs

    def finished(self, row: str, seconds: float, note: str) -> None:
        """Count a run of a row in, and say what came of it."""
        self.durations[row].append(seconds)
        done = sum(map(len, self.durations.values()))
        total = sum(self.expected.values())
        left = _duration(self.seconds_left())
        self.bar.update(self.task, completed=done, left=left)
        self.console.print(f"{done}/{total} {note} ({left} left)", soft_wrap=True)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes} min" if minutes < 90 else f"{seconds / 3600:.1f} h"
