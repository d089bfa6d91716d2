"""A study as data, and the one runner of all studies."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from blockprop.experiments.comparison import Plan, Planned, folder_name, work_off
from blockprop.experiments.folder import read_json
from blockprop.experiments.progress import SweepProgress
from blockprop.experiments.settings import Settings

__all__ = ["TUNING_SEED", "Outcome", "Row", "Study", "run_study"]

TUNING_SEED = 1000
"""The seed of the runs that a step size is chosen by; no study reports on it."""


@dataclass(frozen=True)
class Row:
    """One thing that a study compares, over seeds.

    Attributes:
        panel: the part of the figure or of the table that it belongs to.
        label: what it is called there.
        settings: its settings; the seed is the study's to set.
        lrs: step sizes to choose from, by the validation part and one run each with `TUNING_SEED`. Empty: the
            settings' own.
        style: how it is drawn: keywords of matplotlib's `plot`.
        at_most: how many of the study's seeds it has; default all.
        tuning: what is other in the runs that a step size is chosen by, such as fewer steps; default nothing.
    """

    panel: str
    label: str
    settings: Settings
    lrs: tuple[float, ...] = ()
    style: tuple[tuple[str, Any], ...] = ()
    at_most: int | None = None
    tuning: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """Panel and label."""
        return f"{self.panel}: {self.label}"

    @property
    def by_loss(self) -> bool:
        """Whether it is judged by loss, as language models are, and not by accuracy."""
        return self.settings.text


@dataclass(frozen=True)
class Outcome:
    """What came of a row so far.

    Attributes:
        row: the row.
        lr: the step size that was chosen, or the settings' own; None while it is not known.
        summaries: by seed, of the runs that are finished.
        folders: by seed, of the same runs.
        tuning: by folder, the summaries of the runs that the step size was chosen by.
    """

    row: Row
    lr: float | None
    summaries: dict[int, dict[str, Any]]
    folders: dict[int, Path]
    tuning: dict[Path, dict[str, Any]] = field(default_factory=dict)

    @property
    def at_the_end(self) -> bool:
        """Whether the step size is the smallest or the largest that was tried: a better one may lie beyond."""
        return len(self.row.lrs) > 1 and self.lr in (min(self.row.lrs), max(self.row.lrs))

    @property
    def diverged(self) -> int:
        """How many runs diverged."""
        return sum(bool(summary.get("diverged")) for summary in self.summaries.values())

    def gains(self, other: "Outcome", key: str) -> list[float]:
        """By how much a figure is above the other's, for every seed that both have."""
        pairs = [
            (self.summaries[seed].get(key), other.summaries[seed].get(key))
            for seed in sorted(self.summaries)
            if seed in other.summaries
        ]
        return [ours - theirs for ours, theirs in pairs if ours is not None and theirs is not None]

    def values(self, key: str) -> list[float]:
        """A figure of the summaries, of the runs that have it."""
        found = [summary.get(key) for _, summary in sorted(self.summaries.items())]
        return [float(value) for value in found if value is not None]


@dataclass(frozen=True)
class Study:
    """Rows over seeds, and what is written about them.

    Rows with equal settings and step sizes share their runs, whatever their panel.

    Attributes:
        name: of the files.
        title: of the figure and of the README.
        about: what was run and why, in Markdown.
        rows: what is compared.
        seeds: the rows'.
        draw: makes the figure of the outcomes.
        tell: further Markdown about the outcomes, such as a check.
    """

    name: str
    title: str
    about: str
    rows: tuple[Row, ...]
    seeds: tuple[int, ...]
    draw: Callable[["Study", Sequence[Outcome]], Any]
    tell: Callable[["Study", Sequence[Outcome]], str] = lambda _study, _outcomes: ""

    @property
    def panels(self) -> list[str]:
        """The panels, in the order of the rows."""
        return list(dict.fromkeys(row.panel for row in self.rows))

    def seeds_of(self, row: Row) -> tuple[int, ...]:
        """A row's seeds."""
        return self.seeds[: row.at_most]

    def folders(self, out: Path) -> dict[Row, Path]:
        """Where each row's runs are: with the first row of equal settings."""
        first: dict[tuple[Settings, tuple[float, ...], tuple[tuple[str, Any], ...]], Path] = {}
        return {
            row: first.setdefault(
                (row.settings.resolved(), row.lrs, row.tuning),
                out / "runs" / folder_name(row.panel) / folder_name(row.label),
            )
            for row in self.rows
        }

    def check(self, out: Path) -> None:
        """Raise ValueError if the folder holds another study, or runs of this one with other settings."""
        other = next((path for path in out.glob("*-rows.csv") if path.name != f"{self.name}-rows.csv"), None)
        if other is not None:
            raise ValueError(f"{out} holds another study, {other.name}; name another --out")
        for row, folder in self.folders(out).items():
            for lr in row.lrs or (None,):
                for seed in (*self.seeds_of(row), TUNING_SEED):
                    Planned(row.name, _with(row, seed, lr), _place(folder, seed, lr)).check()

    def outcomes(self, out: Path) -> list[Outcome]:
        """What came of every row so far, from the folders alone."""
        return [_outcome(row, folder, self.seeds_of(row)) for row, folder in self.folders(out).items()]


def run_study(
    study: Study,
    out: Path,
    *,
    jobs: int = 1,
    quiet: bool = False,
    on_row: Callable[[Row], None] | None = None,
) -> None:
    """Make the runs of a study that are not finished yet.

    Args:
        study: what to run.
        out: the study's folder; run folders are `out/runs/PANEL/LABEL/seed-N`, or `.../lr-X/seed-N` where the step
            size X is chosen.
        jobs: runs at a time, each in a process of its own if more than one.
        quiet: show no progress.
        on_row: called after the last run of each row.

    Raises:
        ValueError: no seed, or one twice or that of the tuning; else as `work_off`.
    """
    if not study.seeds or len(set(study.seeds)) != len(study.seeds) or TUNING_SEED in study.seeds:
        raise ValueError(f"expected at least one seed, none twice, and not {TUNING_SEED}, which chooses step sizes")
    rows: dict[Path, Row] = {}
    for row, folder in study.folders(out).items():
        rows.setdefault(folder, row)
    expected = {row.name: len(row.lrs) + len(study.seeds_of(row)) for row in rows.values()}
    left = dict(expected)
    with SweepProgress(study.title, expected, jobs=jobs, quiet=quiet) as progress:

        def row_of(planned: Planned) -> Row:
            return next(rows[folder] for folder in planned.folder.parents if folder in rows)

        def started(planned: Planned) -> None:
            progress.started(row_of(planned).name, planned.name, planned.folder, planned.settings)

        def done(planned: Planned, summary: dict[str, Any], seconds: float) -> None:
            row = row_of(planned)
            progress.finished(row.name, seconds, f"{planned.name}: {_result(row, summary)}", planned.folder)
            left[row.name] -= 1
            if on_row and not left[row.name]:
                on_row(row)

        work_off(_plans(study, rows), jobs=jobs, quiet=True, lean=True, on_run=done, on_start=started)


def _plans(study: Study, rows: dict[Path, Row]) -> list[Plan]:
    """Row by row where a step size is chosen first; else seed by seed, so that a whole figure is there early."""
    tuned = [_tuned(row, folder, study.seeds_of(row)) for folder, row in rows.items() if row.lrs]
    others = [(row, folder) for folder, row in rows.items() if not row.lrs]
    return tuned + [
        _of_seeds(row, folder, [seed], None)
        for seed in study.seeds
        for row, folder in others
        if seed in study.seeds_of(row)
    ]


def _tuned(row: Row, folder: Path, seeds: Sequence[int]) -> Plan:
    """The runs that choose the step size; then those of the seeds."""
    tuning = [
        Planned(f"{row.name}, choosing step size {lr:g}", _with(row, TUNING_SEED, lr), _place(folder, TUNING_SEED, lr))
        for lr in row.lrs
    ]
    return Plan(tuning, lambda summaries: _of_seeds(row, folder, seeds, _chosen(row, summaries)))


def _of_seeds(row: Row, folder: Path, seeds: Sequence[int], lr: float | None) -> Plan:
    return Plan([Planned(f"{row.name}, seed {seed}", _with(row, seed, lr), _place(folder, seed, lr)) for seed in seeds])


def _place(folder: Path, seed: int, lr: float | None) -> Path:
    """A run's folder; a step size that was chosen is part of its name, so that more of them may be tried later."""
    return (folder if lr is None else folder / f"lr-{lr:g}") / f"seed-{seed}"


def _with(row: Row, seed: int, lr: float | None) -> Settings:
    settings = replace(row.settings, seed=seed, lr=row.settings.lr if lr is None else lr)
    return replace(settings, **dict(row.tuning)) if seed == TUNING_SEED else settings


def _chosen(row: Row, summaries: Sequence[dict[str, Any]]) -> float:
    """The step size that did best on the validation part; of equals the smallest, diverged ones last."""

    def merit(pair: tuple[float, dict[str, Any]]) -> tuple[bool, float]:
        _, summary = pair
        if summary.get("diverged"):
            return False, 0.0
        return True, -summary["validation_loss"] if row.by_loss else summary["validation_accuracy"]

    return max(sorted(zip(row.lrs, summaries, strict=True), key=lambda pair: pair[0]), key=merit)[0]


def _outcome(row: Row, folder: Path, seeds: Sequence[int]) -> Outcome:
    places = [_place(folder, TUNING_SEED, lr) for lr in row.lrs]
    tuning = {place: summary for place in places if (summary := _summary(place)) is not None}
    if len(tuning) < len(row.lrs):
        return Outcome(row, None, {}, {}, tuning)
    chosen = _chosen(row, list(tuning.values())) if row.lrs else None
    folders = {seed: _place(folder, seed, chosen) for seed in seeds}
    summaries = {seed: summary for seed, path in folders.items() if (summary := _summary(path)) is not None}
    return Outcome(
        row, chosen or row.settings.resolved().lr, summaries, {seed: folders[seed] for seed in summaries}, tuning
    )


def _summary(folder: Path) -> dict[str, Any] | None:
    return read_json(folder / "summary.json") if (folder / "summary.json").exists() else None


def _result(row: Row, summary: dict[str, Any]) -> str:
    if summary.get("diverged"):
        return "diverged"
    return f"test loss {summary['test_loss']:.4f}" if row.by_loss else f"test accuracy {summary['test_accuracy']:.2%}"
