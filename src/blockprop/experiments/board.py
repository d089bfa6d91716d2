"""What a person sees of a run in several processes: one live table, a row a block; lines where there is no terminal."""

import time
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Table

from blockprop.experiments.settings import Settings
from blockprop.metrics import finite
from blockprop.runtime import Place, Rendezvous
from blockprop.training import Training

__all__ = ["Board", "Reporter"]


class Reporter:
    """Tells the others, through the store, how far a process is: at most twice a second.

    Args:
        rendezvous: a connection of this thread.
        place: whose.
    """

    def __init__(self, rendezvous: Rendezvous, place: Place) -> None:
        self._rendezvous, self._place = rendezvous, place
        self._next = 0.0
        self._last: tuple[float, float, int] | None = None  # seconds, waited, bytes at the last telling

    def update(self, training: Training) -> None:
        """After a step."""
        now = time.monotonic()
        if now < self._next and training.step < training.total_steps:
            return
        self._next = now + 0.5
        means, sent = training.epoch_means, sum(training.traffic.values())
        before, waited, bytes_before = self._last or training.begun
        span = max(training.seconds - before, 1e-9)
        self._last = training.seconds, training.waited, sent
        score = training.score
        heard = means.examples - means.silent
        self._rendezvous.write(
            f"progress/{self._place.name}",
            finite(
                {
                    "step": training.step,
                    "total": training.total_steps,
                    "epoch": round(training.step / training.steps_per_epoch, 2),
                    "rate": training.samples / training.seconds if training.seconds else 0.0,
                    "loss": means.loss / heard if heard else None,
                    "residual": means.gluing[0] / max(1, means.examples - means.unlinked) if means.gluing else None,
                    "age": means.age[0] / max(1, means.examples - means.unlinked) if means.age else None,
                    "bytes": (sent - bytes_before) / span,
                    "busy": max(0.0, 1 - (training.waited - waited) / span),
                    "score": None if score is None else [score.loss, score.accuracy],
                }
            ),
        )


class Board:
    """Shows what the reporters tell.

    Args:
        rendezvous: a connection of this thread.
        places: whose rows, top block last.
        settings: the run's, for the title.
        quiet: show nothing.
    """

    def __init__(self, rendezvous: Rendezvous, places: Sequence[Place], settings: Settings, *, quiet: bool) -> None:
        self.console = Console(stderr=True, quiet=quiet, highlight=False)
        self._rendezvous, self._places = rendezvous, places
        policy = f"{settings.policy}, {settings.who_does_what}"
        self.title = f"{settings.data}, {settings.model}, {len(places)} processes, {policy}, seed {settings.seed}"
        self._live = Live(console=self.console, transient=True, auto_refresh=False)
        self._shown = -1.0

    def __enter__(self) -> "Board":
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def refresh(self) -> None:
        """Read what is told by now, and show it."""
        if self.console.quiet:
            return
        told = {place: self._rendezvous.read(f"progress/{place.name}") for place in self._places}
        if self.console.is_terminal:
            self._live.update(table(self.title, told), refresh=True)
            return
        top = told[self._places[-1]]
        if top is None or top["loss"] is None:
            return
        if int(top["epoch"]) > self._shown or top["step"] == top["total"] != self._shown:
            self._shown = top["total"] if top["step"] == top["total"] else int(top["epoch"])
            self.console.print(_line(self.title, top), soft_wrap=True)


def table(title: str, told: dict[Place, dict[str, Any] | None]) -> Table:
    """Rate, loss or residual, staleness, traffic and busy share of every process."""
    made = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for head in ("block", "step", "samples/s", "loss", "‖h* - b(h)‖²", "age", "MB/s sent", "busy", "validation"):
        made.add_column(head, justify="left" if head == "block" else "right", no_wrap=True)
    for place, row in told.items():
        if row is None:
            made.add_row(place.name, "starting")
            continue
        made.add_row(
            place.name,
            f"{row['step']}/{row['total']}",
            f"{row['rate']:,.0f}",
            _number(row["loss"], ".4f"),
            _number(row["residual"], ".2e"),
            _number(row["age"], ".1f"),
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['busy']:.0%}",
            _score(row["score"]) if place.top else "",
        )
    return made


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _score(score: list[float | None] | None) -> str:
    if score is None:
        return ""
    loss, accuracy = score
    return f"{accuracy:.2%}" if accuracy is not None else f"{loss:.4f}"


def _line(title: str, top: dict[str, Any]) -> str:
    validation = f", validation {_score(top['score'])}" if top["score"] else ""
    loss = _number(top["loss"], ".4f") or "-"
    return f"{title}: epoch {top['epoch']:g}, loss {loss}{validation}, {top['rate']:,.0f} samples/s"
