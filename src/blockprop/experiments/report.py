"""Tables and plots of finished runs, from their folders alone."""

import json
import math
import statistics
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.table import Table

from blockprop.experiments.conflicts import without_effect
from blockprop.experiments.folder import read_json, settings_of
from blockprop.experiments.settings import Settings
from blockprop.metrics import read_metrics

__all__ = ["Group", "Run", "find_runs", "groups", "markdown", "plot", "table"]

# Settings that say where or how long a run computed rather than what: they make no difference between groups.
_INCIDENTAL = {"seed", "data_dir", "threads", "log_every", "checkpoint_every", "evaluate_every", "diagnose_every"}


@dataclass(frozen=True)
class Run:
    """A finished run, as read from its folder: its resolved settings, and its figures."""

    folder: Path
    settings: Settings
    summary: dict[str, Any]

    @property
    def config(self) -> dict[str, Any]:
        """The settings by name, as JSON-ready values."""
        return self.settings.as_dict()

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of `metrics.jsonl`."""
        return read_metrics(self.folder / "metrics.jsonl")


@dataclass(frozen=True)
class Group:
    """Runs that differ by their seed alone, under the settings that set them apart from the others."""

    label: str
    runs: list[Run]

    def values(self, key: str) -> list[float]:
        """A figure of the summaries, of the runs that have it."""
        found = [run.summary.get(key) for run in self.runs]
        return [float(value) for value in found if value is not None]

    def gluing(self) -> list[float]:
        """The gluing loss of every link, mean over the runs; NaN where a run's was not finite."""
        links = [run.summary["gluing_loss"] for run in self.runs if run.summary.get("gluing_loss")]
        return [math.nan if None in link else statistics.fmean(link) for link in zip(*links, strict=True)]


def find_runs(folders: Sequence[Path]) -> list[Run]:
    """All finished runs in or under the folders; of a run and its copies, with the same figures to the second, one.

    Raises:
        ValueError: a folder does not exist, or there is no finished run.
    """
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"there is no folder {folder}; expected the --out of a run or of a comparison")
    paths = sorted({path for folder in folders for path in folder.rglob("summary.json")})
    found = (Run(path.parent, settings_of(path.parent), read_json(path)) for path in paths)
    runs = list({json.dumps([run.config, run.summary], sort_keys=True): run for run in found}.values())
    if not runs:
        raise ValueError(f"no finished run under {', '.join(map(str, folders))}; expected a folder with summary.json")
    return runs


def groups(runs: Sequence[Run]) -> list[Group]:
    """The runs grouped by their settings, each group labelled by what distinguishes it.

    What differs only because each run has it by default, such as the step sizes of two models, is not told. Where
    more than two settings differ, a label tells those that are not at their defaults.
    """

    def settings(run: Run) -> dict[str, str]:
        own = _INCIDENTAL | set(without_effect(run.settings))
        if run.settings.algorithm == "backprop" and run.settings.clip is None and not run.settings.block_lr:
            own |= {"blocks", "split_by"}
        return {key: _word(value) for key, value in run.config.items() if key not in own}

    kinds: dict[tuple[tuple[str, str], ...], list[Run]] = {}
    for run in runs:
        kinds.setdefault(tuple(settings(run).items()), []).append(run)

    def told(key: str) -> bool:
        having = [(dict(kind)[key], members[0].settings) for kind, members in kinds.items() if key in dict(kind)]
        return len({value for value, _ in having}) > 1 and not all(_by_default(one, key) for _, one in having)

    keys = [field.name for field in fields(Settings) if field.name not in ("algorithm", "form") and told(field.name)]
    made = []
    for kind, members in kinds.items():
        config = dict(kind)
        name = "backprop" if config["algorithm"] == "backprop" else f"blockprop {config['form']}"
        # what has no value, such as no clipping, tells nothing
        extra = [
            f"{key.replace('_', '-')}={config[key]}"
            for key in keys
            if config.get(key) and (len(keys) <= 2 or not _by_default(members[0].settings, key))
        ]
        made.append(Group(" ".join([name, *extra]), sorted(members, key=lambda run: run.settings.seed)))
    return sorted(made, key=lambda group: group.label)


def _by_default(settings: Settings, key: str) -> bool:
    """Whether a setting is what it would be had it been left out."""
    default: Any = getattr(Settings(), key)
    try:
        left_out = replace(settings, **{key: default}).resolved()
    except ValueError:  # it must not be left out beside the others
        return False
    return bool(getattr(left_out, key) == getattr(settings, key))


def _word(value: Any) -> str:
    """A setting as one would type it; "" for none."""
    match value:
        case None:
            return ""
        case list():
            return ",".join(map(_word, value))
        case float() if float(f"{value:g}") == value:
            return f"{value:g}"
        case _:
            return str(value)


def _spread(values: Sequence[float], show: Callable[[float], str]) -> str:
    if not values:
        return "-"
    mean = show(statistics.fmean(values))
    return mean if len(values) == 1 else f"{mean} ± {show(statistics.stdev(values))}"


def _rows(made: Sequence[Group]) -> tuple[list[str], list[list[str]]]:
    accuracy = any(group.values("test_accuracy") for group in made)
    header = ["", "seeds", *(["test accuracy %"] if accuracy else []), "test loss", "gluing loss per link", "samples/s"]
    rows = []
    for group in made:
        diverged = sum(bool(run.summary.get("diverged")) for run in group.runs)
        gluing = ", ".join(f"{mean:.2g}" for mean in group.gluing()) or "-"
        row = [group.label, str(len(group.runs)) + (f" ({diverged} diverged)" if diverged else "")]
        if accuracy:
            row.append(_spread(group.values("test_accuracy"), lambda value: f"{100 * value:.2f}"))
        row += [
            _spread(group.values("test_loss"), lambda value: f"{value:.4f}"),
            gluing,
            _spread(group.values("samples_per_second"), lambda value: f"{value:,.0f}"),
        ]
        rows.append(row)
    return header, rows


def table(made: Sequence[Group], title: str) -> Table:
    """Mean ± standard deviation over seeds, a row per group, for the terminal."""
    header, rows = _rows(made)
    drawn = Table(title=title)
    for index, name in enumerate(header):
        drawn.add_column(name, justify="right" if index else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*row)
    return drawn


def markdown(made: Sequence[Group]) -> str:
    """The same table in Markdown."""
    header, rows = _rows(made)
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def plot(made: Sequence[Group], path: Path, title: str) -> None:
    """Training loss, validation, test result by seed, and gluing loss: one PNG (or SVG, by the name).

    Where feedback was late, in a pipeline or from a cache, age, drift and alignment with backprop stand below.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - optional
        from matplotlib.lines import Line2D  # noqa: PLC0415
    except ImportError as error:
        raise ValueError("plots need matplotlib: pip install 'blockprop[all]'") from error
    legend, ticks = ([_wrapped(group.label, *size) for group in made] for size in ((60, 4), (34, 2)))
    columns = max(1, min(len(made), 150 // (8 + max(len(line) for label in legend for line in label.splitlines()))))
    # room for the tick labels in the lower row, and for the legend below it
    lower = max(3.5, 0.2 * len(ticks) * max(label.count("\n") + 1 for label in ticks))
    below = 0.17 * sum(label.count("\n") + 1 for label in legend) / columns
    late = any(_curves(group, "train", "age") for group in made)
    stale = [one for one in _STALENESS if late and any(_curves(group, *one[:2]) for group in made)]
    heights = [3.5, lower, *[3.0] * bool(stale)]
    figure = Figure(figsize=(13, 0.5 + sum(heights) + below), layout="constrained")
    figure.suptitle(_wrapped(title, 100, 4), fontsize=13)
    rows = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    (loss, validation), (test, gluing) = (row.subplots(1, 2) for row in rows[:2])
    below_these = rows[2].subplots(1, len(stale), squeeze=False)[0] if stale else ()
    accuracy = any(group.values("test_accuracy") for group in made)
    measure, scale = ("accuracy", 100) if accuracy else ("loss", 1)
    lines = []
    for index, group in enumerate(made):
        style: dict[str, Any] = {"color": f"C{index % 10}", "linestyle": ("-", "--", ":", "-.")[index % 4]}
        lines.append(Line2D([], [], **style))
        _band(loss, group, "train", "loss", style)
        _band(validation, group, "validation", measure, style, scale)
        values = [scale * value for value in group.values(f"test_{measure}")]
        if values:
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            test.errorbar(statistics.fmean(values), index, xerr=spread, fmt="o", color=style["color"], capsize=4)
            test.plot(values, [index + 0.18] * len(values), "|", color=style["color"], markersize=9)
        _gluing(gluing, group, index)
        for axes, one in zip(below_these, stale, strict=True):
            _band(axes, group, *one[:2], style)
    for axes, (_, _, name, averaged) in zip(below_these, stale, strict=True):
        axes.set(title=name, xlabel="epoch", ylabel=averaged)
    loss.set(title="training loss", xlabel="epoch", yscale="log")
    validation.set(title=f"validation {measure}" + (" (%)" if accuracy else ""), xlabel="epoch")
    if not validation.lines:
        validation.text(0.5, 0.5, "no validation part", ha="center", transform=validation.transAxes)
    elif accuracy:
        _cut_below_the_plateau(validation)
    test.set(title=f"test {measure}" + (" (%)" if accuracy else "") + ", mean ± sd and every seed")
    test.set_yticks(range(len(made)), ticks, fontsize=9)
    test.set_ylim(len(made) - 0.5, -0.5)
    gluing.set(title="gluing loss ‖h* − b(h)‖² in the last epoch", xlabel="link, from the input", yscale="log")
    for axes in (loss, validation, test, gluing, *below_these):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    gluing.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(lines, legend, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


_STALENESS = (
    ("train", "age", "age of feedback: ticks, or visits", "mean over links"),
    ("train", "drift", "drift ‖b_now(h) − b_old(h)‖²", "mean over links"),
    ("diagnostics", "cosine", "cosine with backprop's gradient", "mean over blocks"),
)
"""Panels about late feedback: kind and name of the figure in the metrics, title, and what was averaged."""


def _wrapped(text: str, width: int, lines: int) -> str:
    """A text in lines of at most `width` characters, cut where it would need more."""
    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder=" …", break_on_hyphens=False))


def _band(axes: Any, group: Group, kind: str, key: str, style: dict[str, Any], scale: float = 1.0) -> None:
    """Mean over seeds as a line, one standard deviation as a band, at the steps that every seed has."""
    curves = _curves(group, kind, key, scale)
    epochs = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    if not epochs:
        return
    values = [[curve[epoch] for curve in curves] for epoch in epochs]
    means = [statistics.fmean(value) for value in values]
    axes.plot(epochs, means, marker="o" if len(epochs) == 1 else None, **style)
    if len(curves) > 1:
        spreads = [statistics.stdev(value) for value in values]
        low = [mean - spread for mean, spread in zip(means, spreads, strict=True)]
        high = [mean + spread for mean, spread in zip(means, spreads, strict=True)]
        axes.fill_between(epochs, low, high, color=style["color"], alpha=0.15, linewidth=0)


def _curves(group: Group, kind: str, key: str, scale: float = 1.0) -> list[dict[float, float]]:
    """A figure over epochs, of every run that has it; the mean where there is one for every link or block."""
    found = []
    for run in group.runs:
        rows = (row for row in run.metrics if row["kind"] == kind)
        curve = {row["epoch"]: _mean(row.get(key)) for row in rows}
        found.append({epoch: scale * value for epoch, value in curve.items() if value is not None})
    return [curve for curve in found if curve]


def _mean(value: float | list[float | None] | None) -> float | None:
    """A number; the mean of several, as far as they are known."""
    if not isinstance(value, list):
        return value
    known = [one for one in value if one is not None]
    return statistics.fmean(known) if known else None


def _cut_below_the_plateau(axes: Any) -> None:
    """The first epochs rise from nothing; show where the curves differ."""
    finals = [line.get_ydata()[-1] for line in axes.lines]
    if finals and min(finals) > 60:
        axes.set_ylim(max(0.0, min(finals) - 1.5 * (100 - min(finals)) - 2), min(100.0, max(finals) + 1))


def _gluing(axes: Any, group: Group, index: int) -> None:
    means = group.gluing()
    if any(value > 0 and math.isfinite(value) for value in means):
        axes.plot(range(1, len(means) + 1), means, "o-", color=f"C{index % 10}")
