"""What a person sees of a run: a live bar on a terminal, a line an epoch elsewhere."""

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from blockprop.experiments.settings import Settings
from blockprop.training import Training

__all__ = ["Progress"]


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
        if training.validation:
            note += f", validation {_figure(training.validation.accuracy, training.validation.loss)}"
        if means.unstable:
            note += f", {means.unstable} unstable h-steps"
        self.bar.update(
            self.task, total=training.total_steps, completed=training.step, rate=f"{rate:,.0f}/s", note=note
        )
        if not self.console.is_terminal and (
            training.step % training.steps_per_epoch == 0 or training.step == training.total_steps
        ):
            epoch = training.step / training.steps_per_epoch
            self.console.print(f"{self.title}: epoch {epoch:g}, {note}, {rate:,.0f} samples/s", soft_wrap=True)


def _figure(accuracy: float | None, loss: float) -> str:
    return f"{loss:.4f}" if accuracy is None else f"{accuracy:.2%}"
