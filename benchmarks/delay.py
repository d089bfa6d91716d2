"""Learning under delay: late feedback of every kind beside backprop, by quality and by examples to quality.

Every run is a simulation of the pipeline, tick by tick, in one process. First all methods at K = 4, each with three
step sizes on one seed; then backprop, the delayed gradient and the three best methods, at the step size that was best
for each, at K = 2, 4, 8 on three seeds. A run that is finished is never made again, and one that was stopped goes on.
"""

import argparse
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from blockprop.experiments.settings import Settings
from blockprop.studies.drawing import band, curves, figure_of, tidy
from blockprop.studies.publish import markdown_table, publish, spread, write_tables
from blockprop.studies.study import Outcome, Row, Study, run_study

BACKPROP, DELAYED, DEFAULT = "backprop", "delayed gradient", "targets, microbatches, warm-up"
"""The rows that are always shown: the baseline, the naive pipeline, and the default of `--schedule pipelined`."""


@dataclass(frozen=True)
class Task:
    """A network with its data and its budget.

    Attributes:
        name: short, for folders and the command line.
        title: in the tables.
        settings: of backprop, with `steps` the budget: runs go on to twice that.
        lrs: step sizes to choose from, the same for all methods.
        nesterov: the optimizer with Nesterov's correction that stands beside the task's own; empty for none.
        brief: few methods and few evaluations.
    """

    name: str
    title: str
    settings: Settings
    lrs: tuple[float, ...]
    nesterov: dict[str, Any]
    brief: bool = False

    @property
    def budget(self) -> int:
        """Steps."""
        assert self.settings.steps is not None
        return self.settings.steps


def tasks(data_dir: Path | None, *, quick: bool) -> list[Task]:
    """The perceptron, the language model and the residual network."""
    base = Settings(data_dir=data_dir, threads=1, algorithm="backprop")
    mnist = replace(base, data="mnist", model="mlp", width=256, depth=8, batch_size=64, validation=0.05)
    text = replace(base, data="shakespeare", model="gpt", width=96, depth=6, batch_size=32, validation=0.02)
    cifar = replace(base, data="cifar10", model="resnet18", width=16, batch_size=128, validation=0.02)
    nesterov = {"optimizer": "nesterov", "momentum": 0.9}
    found = [
        Task("mlp", "MLP 8 x 256, MNIST, SGD", replace(mnist, steps=900), (0.05, 0.1, 0.2), nesterov),
        Task(
            "gpt",
            "GPT 6 x 96, Shakespeare, AdamW",
            replace(text, steps=300),
            (1e-3, 3e-3, 6e-3),
            {"optimizer": "nadam"},
        ),
        Task(
            "muon", "GPT 6 x 96, Shakespeare, Muon", replace(text, steps=300, optimizer="muon"), (0.01, 0.02, 0.04), {}
        ),
        Task("resnet", "ResNet18-w16, CIFAR-10, momentum", replace(cifar, steps=380), (0.02, 0.05, 0.1), nesterov),
    ]
    if quick:
        steps = {"mlp": 200, "gpt": 25}
        found = [
            replace(one, settings=replace(one.settings, steps=steps[one.name], lr=one.lrs[1]), lrs=(), brief=True)
            for one in found
            if one.name in steps
        ]
    return found


def methods(task: Task) -> dict[str, dict[str, Any]]:
    """What is compared: settings beside the task's, at any K."""
    pipelined = {"algorithm": "blockprop", "schedule": "pipelined", "microbatches": 1, "warmup": 0}
    gradient = pipelined | {"feedback": "gradient"}
    stashed = pipelined | {"feedback": "stashed"}
    alike = pipelined | {"directions": "all"}
    warm = {"warmup": None}
    quarter = task.budget // 4
    found = {
        BACKPROP: {},
        "backprop, warm-up": {"warmup": 2 * task.budget // 10},
        DELAYED: gradient,
        "delayed gradient, warm-up": gradient | warm,
        "delayed gradient, stashed weights": stashed,
        "delayed gradient, stashed weights, warm-up": stashed | warm,
        "targets, κ = 0.1": alike | {"curvature": 0.1},
        "targets, κ measured": alike,
        "targets, κ measured, warm-up": alike | warm,
        "targets, κ measured along and across": pipelined,
        "targets, κ measured along and across, warm-up": pipelined | warm,
        "delayed gradient, microbatches, warm-up": gradient | warm | {"microbatches": None},
        "targets in all directions, microbatches, warm-up": alike | warm | {"microbatches": None},
        DEFAULT: pipelined | warm | {"microbatches": None},
        "PipeMare: annealing and prediction": gradient | {"delay_annealing": quarter, "prediction": 1.0},
        "SpecTrain: weight prediction": gradient | {"prediction": 1.0},
        "DC-ASGD, λ = 0.1": stashed | {"compensation": 0.1},
    }
    if task.nesterov:
        found["Nesterov, delayed gradient, stashed weights"] = stashed | task.nesterov
        found["Nesterov, targets, microbatches, warm-up"] = found[DEFAULT] | task.nesterov
    if task.brief:
        few = (BACKPROP, DELAYED, "delayed gradient, warm-up", "targets, κ measured along and across, warm-up", DEFAULT)
        return {method: found[method] for method in few}
    return found


def row(task: Task, method: str, blocks: int, lrs: tuple[float, ...] = (), lr: float | None = None) -> Row:
    """One method on one task, cut into K blocks, for twice the budget."""
    settings = replace(
        task.settings,
        steps=2 * task.budget,
        evaluate_every=max(1, task.budget // (10 if task.brief else 50)),
        log_every=max(1, task.budget // 50),
        blocks=blocks,
        lr=task.settings.lr if lr is None else lr,
        **methods(task)[method],
    )
    return Row(f"{task.title}, K = {blocks}", method, settings, lrs, style=STYLES.get(method, ()))


STYLES: dict[str, tuple[tuple[str, Any], ...]] = {
    BACKPROP: (("color", "k"),),
    DELAYED: (("color", "C3"),),
    DEFAULT: (("color", "C0"),),
}


def tuning(task: Task) -> Study:
    """All methods at K = 4 with three step sizes; the one seed is the one that they are reported on."""
    rows = tuple(row(task, method, 4, task.lrs) for method in methods(task))
    return _study(f"delay-{task.name}-methods", f"{task.title}: all methods at K = 4", rows, (0,), task)


def finals(task: Task, outcomes: Sequence[Outcome], *, quick: bool) -> Study:
    """Backprop, the delayed gradient, the default and the best others at K = 2, 4, 8 on three seeds.

    Args:
        task: the task.
        outcomes: of its `tuning`.
        quick: K = 2 and 4 on one seed.
    """
    lrs = {outcome.row.label: outcome.lr for outcome in outcomes}
    others = [
        one for one in outcomes if one.row.label not in (BACKPROP, DELAYED) and one.row.label != "backprop, warm-up"
    ]
    best = sorted(others, key=lambda one: at_budget(one, task) if at_budget(one, task) is not None else math.inf)[:3]
    chosen = list(dict.fromkeys([BACKPROP, DELAYED, *(one.row.label for one in best), DEFAULT]))
    cuts, seeds = ((2, 4), (0,)) if quick else ((2, 4, 8), (0, 1, 2))
    rows = tuple(
        row(task, method, blocks if method != BACKPROP else 4, lr=lrs[method])
        if method != BACKPROP
        else replace(row(task, method, 4, lr=lrs[method]), panel=f"{task.title}, K = {blocks}")
        for blocks in cuts
        for method in chosen
    )
    return _study(f"delay-{task.name}", task.title, rows, seeds, task)


def _study(name: str, title: str, rows: tuple[Row, ...], seeds: tuple[int, ...], task: Task) -> Study:
    return Study(
        name=name,
        title=title,
        about=ABOUT.format(budget=task.budget, twice=2 * task.budget),
        rows=rows,
        seeds=seeds,
        draw=draw,
        tell=lambda study, outcomes: tell(study, outcomes, task),
    )


ABOUT = """
Simulated pipelines in one process, tick by tick. Budget {budget} steps; runs go on to {twice}. Quality is the
validation loss at the budget, a running median of three evaluations. Q is backprop's mean validation loss at 80 % of
the budget. "Examples to Q" is the count at the first evaluation (every 2 %) whose running median of three is at or
below Q, over backprop's count.
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
        header = ["", "step size", "validation loss", "behind", "validation accuracy %", "examples to Q", "seeds"]
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
            str(len(one.summaries)) + (f", {one.diverged} diverged" if one.diverged else ""),
        ]


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the shape of the tables in minutes, not to quote")
    parser.add_argument("--out", type=Path, default=Path("studies/delay"), help="folder of runs, tables and figures")
    parser.add_argument("--data-dir", type=Path, help="folder with the data's published files")
    parser.add_argument("--tasks", nargs="+", choices=["mlp", "gpt", "muon", "resnet"], help="default: all")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--redraw", action="store_true", help="run nothing: write tables and figures anew")
    given = parser.parse_args()
    command = "python -m benchmarks.delay" + " --quick" * given.quick
    chosen = [one for one in tasks(given.data_dir, quick=given.quick) if not given.tasks or one.name in given.tasks]
    for task in chosen:
        wide = tuning(task)
        _carry_out(wide, given.out / task.name / "methods", command, given)
        outcomes = wide.outcomes(given.out / task.name / "methods")
        if all(outcome.summaries for outcome in outcomes):
            _carry_out(finals(task, outcomes, quick=given.quick), given.out / task.name / "finals", command, given)


def _carry_out(study: Study, out: Path, command: str, given: argparse.Namespace) -> None:
    command += f" --tasks {out.parent.name}"
    if not given.redraw:
        out.mkdir(parents=True, exist_ok=True)
        run_study(study, out, jobs=given.jobs, on_row=lambda _row: write_tables(study, out, command))
    publish(study, out, command)
    print(f"figure, tables and README: {out}")


if __name__ == "__main__":
    main()
