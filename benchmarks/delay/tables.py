"""Quality, examples to quality, and what is written about them."""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.delay.tasks import BACKPROP, WARM_BACKPROP, Task
from blockprop.studies.drawing import band, curves, figure_of, tidy
from blockprop.studies.publish import markdown_table, percent, spread
from blockprop.studies.study import Outcome, Study

ABOUT = """
Simulated pipelines in one process, tick by tick. Budget {budget} steps; runs go on to {twice}, but for those that a
step size is chosen by. Quality is the
validation loss at the budget, a running median of three evaluations. Q is backprop's mean validation loss at 80 % of
the budget. "Examples to Q" is the count at the first evaluation (every 2 %) whose running median of three is at or
below Q, over backprop's count.
"""

LEARNT = 0.75
"""A run has learnt something if its last loss is below this share of the loss of guessing."""

ABOUT_STABLE = """
{steps} steps, one seed, no warm-up but the default's own. A step size is stable if the run does not diverge and its
last validation loss, a median of three evaluations, is below {limit:.2f}, three quarters of the loss of guessing.
"""


ABOUT_CACHED = """
{epochs} epochs of the same examples, step size {lr:g} with cosine decay to nothing. The feedback of an example is
computed on its first visit and on every E-th after it; between them each block learns from the last one at a fresh
input. For one batch in 20 it is computed besides, which measures the curvature. Differences are of the same seed.
"""

ABOUT_LONGER = """
{steps} steps, a warm-up over the first tenth and cosine decay to nothing in all rows. Step sizes are those of the study
methods, which chose them in a tenth of the steps, for backprop without and with a warm-up. "Behind" is to backprop at
the latter, which is also "backprop's step size".
"""


def medians(outcome: Outcome, key: str = "loss") -> list[dict[int, float]]:
    """The validation curve of every seed as running medians of three."""
    found = []
    for curve in curves(outcome, "validation", key):
        steps = sorted(curve)
        found.append(
            {
                step: statistics.median(curve[near] for near in steps[max(0, index - 2) : index + 1])
                for index, step in enumerate(steps)
            }
        )
    return found


def quality(outcome: Outcome, task: Task, key: str = "loss", share: float = 1.0) -> list[float]:
    """A validation figure of every seed at a share of the budget."""
    limit = share * task.budget
    return [curve[max(step for step in curve if step <= limit)] for curve in medians(outcome, key) if curve]


def at_budget(outcome: Outcome, task: Task) -> float | None:
    """The mean validation loss at the budget over finished seeds; None if one diverged, or none is finished."""
    values = quality(outcome, task)
    return statistics.fmean(values) if values and not outcome.diverged else None


def steps_to(outcome: Outcome, level: float) -> list[float]:
    """The step of every seed at which the loss is down to the level; infinity if it never is."""
    return [
        min((step for step, loss in curve.items() if loss <= level), default=math.inf) for curve in medians(outcome)
    ]


def tell(study: Study, outcomes: Sequence[Outcome], task: Task) -> str:
    """A table for every K."""
    parts = []
    for panel in study.panels:
        members = [one for one in outcomes if one.row.panel == panel and one.summaries]
        baseline = next((one for one in members if one.row.label == BACKPROP), None)
        if baseline is None or not (levels := quality(baseline, task, share=0.8)):
            continue
        level = statistics.fmean(levels)
        theirs = statistics.fmean(steps_to(baseline, level))
        last = "test loss" if members[0].row.by_loss else "test accuracy %"
        header = ["", "step size", "validation loss", "behind", "validation accuracy %", "examples to Q"]
        header += [f"{last}, at the end", "seeds"]
        parts += [
            f"## {panel}",
            f"Q = {level:.4f}",
            markdown_table(header, _cells(members, baseline, level, theirs, task)),
        ]
    return "\n\n".join(parts)


def _cells(
    members: Iterable[Outcome], baseline: Outcome, level: float, theirs: float, task: Task
) -> Iterable[list[str]]:
    reference = statistics.fmean(quality(baseline, task))
    for one in members:
        losses, ratios = quality(one, task), [steps / theirs for steps in steps_to(one, level)]
        reached = [ratio for ratio in ratios if math.isfinite(ratio)]
        late = len(ratios) - len(reached)
        examples = spread(reached, lambda value: f"{value:.2f}") + (f"; {late} never" if late else "")
        yield [
            one.row.label,
            f"{one.lr:g}",
            "diverged" if one.diverged == len(one.summaries) else spread(losses, lambda value: f"{value:.4f}"),
            "" if one is baseline or not losses else f"{statistics.fmean(losses) - reference:+.4f}",
            spread(quality(one, task, "accuracy"), lambda value: f"{100 * value:.2f}"),
            examples if reached else "> 2",
            spread(one.values("test_loss"), lambda value: f"{value:.4f}")
            if one.row.by_loss
            else spread(one.values("test_accuracy"), percent),
            _seeds(one),
        ]


def _seeds(one: Outcome) -> str:
    return str(len(one.summaries)) + (f", {one.diverged} diverged" if one.diverged else "")


def tell_stable(study: Study, outcomes: Sequence[Outcome], task: Task) -> str:
    """The last loss of every method at every step size, and the largest stable one over backprop's."""
    lrs = sorted({one.lr for one in outcomes if one.lr is not None})
    largest: dict[str, float] = {}
    rows = []
    for method in study.panels:
        cells = dict.fromkeys(lrs, "")
        for one in (one for one in outcomes if one.row.panel == method and one.summaries and one.lr is not None):
            loss = next((curve[max(curve)] for curve in medians(one) if curve), math.inf)
            learns = not one.diverged and loss < LEARNT * task.chance
            cells[one.lr] = "diverged" if one.diverged else f"{loss:.3f}" if learns else f"({loss:.3f})"
            if learns:
                largest[method] = max(largest.get(method, 0.0), one.lr)
        best, theirs = largest.get(method), largest.get(BACKPROP)
        told = f"{best:g}" if best else "none"
        rows.append([method, *cells.values(), told, f"{best / theirs:g}" if best and theirs else ""])
    header = ["", *(f"{lr:g}" for lr in lrs), "largest stable", "over backprop's"]
    return markdown_table(header, rows) + "\n\nIn brackets: learnt too little."


def tell_cached(study: Study, outcomes: Sequence[Outcome]) -> str:
    """A table for every K, of the figures at the end on the test part."""
    parts = []
    for panel in study.panels:
        members = [one for one in outcomes if one.row.panel == panel and one.summaries]
        baseline = next((one for one in members if one.row.label == BACKPROP), None)
        rows = []
        for one in members:
            gains = [] if baseline is None or one is baseline else one.gains(baseline, "test_accuracy")
            rows.append(
                [
                    one.row.label,
                    spread(one.values("test_accuracy"), percent),
                    _points(gains),
                    spread(one.values("test_loss"), lambda value: f"{value:.4f}"),
                    _seeds(one),
                ]
            )
        header = ["", "test accuracy %", "to backprop, points", "test loss", "seeds"]
        parts += [f"## {panel}", markdown_table(header, rows)]
    return "\n\n".join(parts)


def tell_longer(study: Study, outcomes: Sequence[Outcome]) -> str:
    """A table for every K, of the last validation losses and the accuracy on the test part."""
    parts = []
    for panel in study.panels:
        members = [one for one in outcomes if one.row.panel == panel and one.summaries]
        baseline = next((one for one in members if one.row.label == WARM_BACKPROP), None)
        rows = []
        for one in members:
            ends = [curve[max(curve)] for curve in medians(one) if curve]
            gains = [] if baseline is None or one is baseline else one.gains(baseline, "test_accuracy")
            rows.append(
                [
                    one.row.label,
                    f"{one.lr:g}",
                    spread(ends, lambda value: f"{value:.4f}"),
                    spread(one.values("test_accuracy"), percent),
                    _points([-gain for gain in gains]),
                    _seeds(one),
                ]
            )
        header = ["", "step size", "last validation loss", "test accuracy %", "behind, points", "seeds"]
        parts += [f"## {panel}", markdown_table(header, rows)]
    return "\n\n".join(parts)


def _points(differences: Sequence[float]) -> str:
    """Mean and standard deviation over seeds of a difference in accuracy, in points."""
    if not differences:
        return ""
    mean = f"{100 * statistics.fmean(differences):+.2f}"
    return mean if len(differences) == 1 else f"{mean} ± {100 * statistics.stdev(differences):.2f}"


def draw(study: Study, outcomes: Sequence[Outcome]) -> Any:
    """Validation loss over steps, a panel for every K."""
    panels = study.panels
    figure, axes = figure_of(study.title, 1, len(panels), width=6.0, height=4.6)
    for place, panel in zip(axes, panels, strict=True):
        for index, one in enumerate(one for one in outcomes if one.row.panel == panel and one.summaries):
            style = {"label": one.row.label, "linewidth": 1.2, "color": f"C{index % 10}", **dict(one.row.style)}
            band(place, medians(one), style)
        place.set(title=panel, xlabel="step", ylabel="validation loss", yscale="log")
        tidy(place)
        place.legend(frameon=False, fontsize=7)
    return figure
