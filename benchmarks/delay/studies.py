"""What is run about a task: which rows, at which step sizes, on which seeds."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks.delay import tables
from benchmarks.delay.tasks import (
    ALIKE,
    BACKPROP,
    DEFAULT,
    DELAYED,
    ONCE,
    TWICE,
    WARM_BACKPROP,
    Task,
    methods,
    variants,
)
from blockprop.studies.study import Outcome, Row, Study

STYLES: dict[str, tuple[tuple[str, Any], ...]] = {
    BACKPROP: (("color", "k"),),
    DELAYED: (("color", "C3"),),
    DEFAULT: (("color", "C0"),),
}


ALL = ("methods", "finals", "stable", "longer", "cached")
REFRESH = (2, 4, 8)


def names(task: Task) -> list[str]:
    """The studies of a task; a brief one has the first two."""
    without = {"stable": not task.trial, "longer": not task.long, "cached": task.again is None}
    return [name for name in ALL if not without.get(name)]


def study(name: str, task: Task, outcomes: Sequence[Outcome]) -> Study | None:
    """A study of a task; None where it waits for step sizes that are not chosen yet.

    Args:
        name: one of `names`.
        task: the task.
        outcomes: of its `tuning`, as far as there are any.
    """
    tuned = all(outcome.summaries for outcome in outcomes)
    match name:
        case "methods":
            return tuning(task)
        case "stable":
            return stable(task)
        case "cached":
            return cached(task)
        case "finals":
            return finals(task, outcomes) if tuned else None
        case _:
            return longer(task, outcomes) if tuned else None


def tuning(task: Task) -> Study:
    """All methods at K = 4, each at the best of three step sizes, on one seed."""
    rows = tuple(row(task, method, 4, task.lrs) for method in methods(task))
    return _study(f"delay-{task.name}-methods", f"{task.title}: all methods at K = 4", rows, (0,), task)


def finals(task: Task, outcomes: Sequence[Outcome]) -> Study:
    """Backprop with and without a warm-up, the delayed gradient, the default, and the best others.

    The default is there at its own step size, at backprop's if that is another, and, at backprop's, where
    messages are late and lost.

    Args:
        task: the task.
        outcomes: of its `tuning`.
    """
    lrs = {outcome.row.label: outcome.lr for outcome in outcomes}
    losses = {one.row.label: tables.at_budget(one, task) for one in outcomes}
    others = [name for name in lrs if name != DELAYED and not name.startswith(BACKPROP)]
    best = sorted(others, key=lambda name: math.inf if (loss := losses[name]) is None else loss)[:3]
    lrs |= dict.fromkeys((ALIKE, ONCE, TWICE), lrs[BACKPROP])
    lighter = [name for name in lrs if name == f"{BACKPROP}, momentum {task.lighter}"]
    warm = [name for name in lrs if name == WARM_BACKPROP]  # a brief task has it not
    alike = [ALIKE] if lrs[ALIKE] != lrs[DEFAULT] else []
    chosen = list(dict.fromkeys([BACKPROP, *warm, *lighter, DELAYED, *best, DEFAULT, *alike, TWICE, ONCE]))
    rows = tuple(row(task, method, blocks, lr=lrs[method]) for blocks in task.cuts for method in chosen)
    return _study(f"delay-{task.name}", task.title, rows, (0,) if task.brief else (0, 1, 2), task)


def stable(task: Task) -> Study:
    """Backprop, the delayed gradient and the default at K = 4, with the smallest step size doubled time and again."""
    steps = task.trial
    rows = tuple(
        Row(method, f"step size {lr:g}", replace(row(task, method, 4, lr=lr).settings, steps=steps))
        for method in (BACKPROP, DELAYED, DEFAULT)
        for lr in (task.lrs[0] * 2**power for power in range(7))
    )
    return Study(
        name=f"delay-{task.name}-stable",
        title=f"{task.title}: how large a step size may be, K = 4",
        about=tables.ABOUT_STABLE.format(steps=steps, limit=tables.LEARNT * task.chance),
        rows=rows,
        seeds=(0,),
        draw=tables.draw,
        tell=lambda study, outcomes: tables.tell_stable(study, outcomes, task),
    )


def longer(task: Task, outcomes: Sequence[Outcome]) -> Study:
    """Backprop, the delayed gradient and the default for many steps, with a warm-up and cosine decay.

    Args:
        task: the task.
        outcomes: of its `tuning`: at the step sizes that were best there, of backprop without and with a warm-up; the
            default is also at backprop's with a warm-up, if that is another.
    """
    lrs = {outcome.row.label: outcome.lr for outcome in outcomes}
    lrs[ALIKE] = lrs[WARM_BACKPROP]
    alike = [ALIKE] if lrs[ALIKE] != lrs[DEFAULT] else []
    whole = {"steps": task.long, "warmup": task.long // 10, "lr_schedule": "cosine", "evaluate_every": task.long // 60}
    rows = tuple(
        replace(one, settings=replace(one.settings, **whole))
        for blocks in task.cuts
        for method in (BACKPROP, WARM_BACKPROP, DELAYED, DEFAULT, *alike)
        for one in (row(task, method, blocks, lr=lrs[method]),)
    )
    return Study(
        name=f"delay-{task.name}-longer",
        title=f"{task.title}: {task.long} steps",
        about=tables.ABOUT_LONGER.format(steps=task.long),
        rows=rows,
        seeds=(0, 1, 2),
        draw=tables.draw,
        tell=tables.tell_longer,
    )


def cached(task: Task) -> Study:
    """Backprop and cached targets at K = 2 and 4, on examples that come again unchanged; all at one step size."""
    assert task.again is not None
    feedback: dict[str, dict[str, Any]] = {BACKPROP: {}}
    for refresh in REFRESH:
        feedback[f"cached, E = {refresh}"] = {"algorithm": "blockprop", "schedule": "cached", "refresh": refresh}
    rows = tuple(
        Row(
            f"{task.title}, K = {blocks}",
            label,
            # backprop does not depend on K
            replace(task.again, blocks=4 if label == BACKPROP else blocks, **settings),
            style=STYLES.get(label, ()),
        )
        for blocks in (2, 4)
        for label, settings in feedback.items()
    )
    return Study(
        name=f"delay-{task.name}-cached",
        title=f"{task.title}: cached targets",
        about=tables.ABOUT_CACHED.format(epochs=task.again.epochs, lr=task.again.lr),
        rows=rows,
        seeds=tuple(range(8)),  # short runs, and differences of a tenth of a point
        draw=tables.draw,
        tell=tables.tell_cached,
    )


def row(task: Task, method: str, blocks: int, lrs: tuple[float, ...] = (), lr: float | None = None) -> Row:
    """One method on one task, cut into K blocks, for twice the budget."""
    chosen = (methods(task) | variants(task))[method]
    settings = replace(
        task.cut_into(blocks),
        steps=2 * task.budget,
        evaluate_every=max(1, task.budget // (10 if task.brief else 50)),
        log_every=max(1, task.budget // 50),
        # backprop does not depend on K: one run stands in every panel
        blocks=4 if method.startswith(BACKPROP) else blocks,
        lr=task.settings.lr if lr is None else lr,
        **chosen,
    )
    panel = f"{task.title}, K = {blocks}"
    tuning = {"steps": task.budget} | task.tuning
    return Row(panel, method, settings, lrs, style=STYLES.get(method, ()), tuning=tuple(tuning.items()))


def _study(name: str, title: str, rows: tuple[Row, ...], seeds: tuple[int, ...], task: Task) -> Study:
    return Study(
        name=name,
        title=title,
        about=tables.ABOUT.format(budget=task.budget, twice=2 * task.budget),
        rows=rows,
        seeds=seeds,
        draw=tables.draw,
        tell=lambda study, outcomes: tables.tell(study, outcomes, task),
    )
