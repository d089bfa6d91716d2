"""What the studies' figures have in common."""

import statistics
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from blockprop.metrics import read_metrics
from blockprop.studies.study import Outcome

__all__ = ["band", "curves", "figure_of", "require_matplotlib", "save", "tidy"]


def require_matplotlib() -> None:
    """Raise ValueError if matplotlib, which is optional, is not installed."""
    if find_spec("matplotlib") is None:
        raise ValueError("figures need matplotlib: pip install 'blockprop[all]'")


def figure_of(title: str, rows: int, columns: int, *, width: float = 4.6, height: float = 3.7) -> tuple[Any, list[Any]]:
    """A figure with a title and its axes, row by row; sizes of a panel in inches."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - optional

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    figure.suptitle(title, fontsize=12)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG and SVG; the same figure gives the same files.

    Args:
        figure: what `figure_of` made.
        path: without its ending.
    """
    from matplotlib import rc_context  # noqa: PLC0415 - optional

    figure.savefig(path.with_suffix(".png"), dpi=110)
    with rc_context({"svg.hashsalt": path.name, "svg.fonttype": "none"}):
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})


def curves(outcome: Outcome, kind: str, key: str) -> list[dict[int, float]]:
    """A quantity over steps, for every seed; lists over links are summed."""
    found = []
    for folder in outcome.folders.values():
        rows = [row for row in read_metrics(folder / "metrics.jsonl") if row["kind"] == kind]
        pairs = ((row["step"], row.get(key)) for row in rows)
        found.append({step: sum(v) if isinstance(v, list) else v for step, v in pairs if v is not None and v != []})
    return found


def band(axes: Any, seeds: Sequence[dict[int, float]], style: dict[str, Any], *, scale: float = 1.0) -> None:
    """The mean over seeds as a line and a standard deviation as a band, at the steps that every seed has."""
    steps = sorted(set.intersection(*(set(curve) for curve in seeds))) if seeds else []
    if not steps:
        return
    values = [[scale * curve[step] for curve in seeds] for step in steps]
    means = [statistics.fmean(value) for value in values]
    (line,) = axes.plot(steps, means, **style)
    if len(seeds) > 1:
        spreads = [statistics.stdev(value) for value in values]
        low = [mean - spread for mean, spread in zip(means, spreads, strict=True)]
        high = [mean + spread for mean, spread in zip(means, spreads, strict=True)]
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.15, linewidth=0)


def tidy(axes: Any) -> None:
    """A light grid and two spines."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
