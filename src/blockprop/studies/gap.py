"""The gap to backprop: every form, on every kind of network, with step sizes tuned alike."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from blockprop.experiments.settings import Settings
from blockprop.studies.drawing import figure_of, tidy
from blockprop.studies.publish import markdown_table, mean_gap, percent, spread
from blockprop.studies.study import Outcome, Row, Study

__all__ = ["gap", "pooled_sd"]

METHODS: dict[str, dict[str, Any]] = {
    "backprop": {"algorithm": "backprop"},
    "exact": {"form": "exact"},
    "published": {"form": "published"},
    "rescaled": {"form": "rescaled"},
    "Gauss-Newton": {"form": "proximal", "h_solver": "gauss-newton"},
}

# Shares held out that leave whole batches, where an epoch is run to its end.
_IMAGES, _TEXT = 0.104, 0.1109


@dataclass(frozen=True)
class Network:
    """A network with its data, as a part of the table."""

    name: str
    settings: Settings
    cuts: tuple[int, ...]
    lrs: tuple[float, ...]
    variants: tuple[tuple[str, dict[str, Any]], ...]
    methods: tuple[str, ...]
    seeds: int = 3


_PLAIN: tuple[str, dict[str, Any]] = ("", {})
_MLP_VARIANTS = (
    _PLAIN,
    (", dropout 0.2", {"dropout": 0.2}),
    (", LayerNorm", {"norm": "layer"}),
    (", BatchNorm", {"norm": "batch"}),
)


def _networks(data_dir: Path | None) -> list[Network]:
    base = Settings(data_dir=data_dir, threads=1)
    mnist = replace(base, data="mnist", model="mlp", batch_size=128, epochs=3, validation=_IMAGES)
    text = replace(base, data="shakespeare", model="gpt", width=64, depth=4, batch_size=32, steps=400, validation=_TEXT)
    cifar = replace(base, data="cifar10", model="resnet18", width=16, batch_size=64, steps=512, validation=0.02)
    brief, dropped = replace(cifar, steps=256), (", dropout 0.2", {"dropout": 0.2})
    deep = replace(mnist, width=256, depth=8, epochs=1)
    sgd, adam = (0.01, 0.03, 0.1, 0.3, 1.0), (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    momentum = (0.01, 0.02, 0.05, 0.1, 0.2)
    shallow_sgd = (0.03, 0.1, 0.3, 1.0, 3.0)
    first_order = ("backprop", "exact", "published", "rescaled")
    shallow = replace(mnist, width=300, depth=2)
    uneven = replace(deep, batch_size=100, validation=0.1)
    return [
        Network("MLP 784-300-10", shallow, (2,), shallow_sgd, _MLP_VARIANTS, tuple(METHODS), 5),
        Network("MLP 8 x 256", deep, (2, 4, 8), sgd, _MLP_VARIANTS, first_order, 5),
        Network("GPT 4 x 64", text, (2, 4), adam, (_PLAIN, (", dropout 0.1", {"dropout": 0.1})), first_order),
        Network("MLP 8 x 256", deep, (2, 4, 8), sgd, _MLP_VARIANTS, ("Gauss-Newton",), 5),
        Network("MLP 8 x 256, batches of 100", uneven, (4,), sgd, _MLP_VARIANTS[:2], ("backprop", "exact"), 10),
        Network("ResNet18-w16", cifar, (2, 4), momentum, (_PLAIN,), first_order),
        Network("ResNet18-w16", brief, (2, 4), momentum[1:4], (dropped,), first_order),
    ]


def _rows(networks: Iterable[Network], *, fewer: bool) -> Iterable[Row]:
    for network in networks:
        for variant, changes in network.variants:
            for blocks in network.cuts:
                for method in network.methods:
                    own = METHODS[method] | ({} if method == "backprop" else {"blocks": blocks})
                    settings = replace(network.settings, **changes, **own)
                    panel = f"{network.name}{variant}, K = {blocks}"
                    yield Row(panel, method, settings, network.lrs, at_most=network.seeds if fewer else None)


def gap(*, data_dir: Path | None = None, seeds: Sequence[int] = (), quick: bool = False) -> Study:
    """The table of all methods and networks.

    Args:
        data_dir: folder of the published data.
        seeds: of every row; default 0 to 4 on MNIST, with batches of 100 to 9, and 0 to 2 on the networks that take
            longer.
        quick: a few steps of the perceptrons alone, to see that it works.
    """
    networks = _networks(data_dir)
    if quick:
        networks = [
            replace(one, settings=replace(one.settings, epochs=None, steps=60), cuts=one.cuts[:1], variants=variants)
            for one in networks[:2]
            for variants in [one.variants[:2]]
        ]
    return Study(
        name="gap",
        title="The gap to backprop",
        about=_QUICK if quick else _ABOUT,
        rows=tuple(_rows(networks, fewer=not seeds)),
        seeds=tuple(seeds) or ((0, 1) if quick else tuple(range(10))),
        draw=_draw,
        tell=_tell,
    )


_ABOUT = """
For each row the step size is chosen among several, by one run each on the validation part with a seed of its own;
then comes one run a seed with the step size chosen. The step sizes are the same for all methods of a network, and so
are epochs, batches and their order.

| network | data | training | step sizes |
| --- | --- | --- | --- |
| MLP 784-300-10 | MNIST | SGD, batch 128, 3 epochs | 0.03, 0.1, 0.3, 1, 3 |
| MLP 8 x 256 (7 hidden layers) | MNIST | SGD, batch 128, 1 epoch | 0.01, 0.03, 0.1, 0.3, 1 |
| the same, batches of 100 | MNIST | SGD, batch 100, 1 epoch | 0.01, 0.03, 0.1, 0.3, 1 |
| GPT, 4 layers of 64, context 64 | tiny Shakespeare | AdamW, batch 32, 400 steps | 0.0003, 0.001, 0.003, 0.01, 0.03 |
| ResNet18 of width 16 | CIFAR-10, crops and flips | momentum 0.9, batch 64, 512 steps | 0.01, 0.02, 0.05, 0.1, 0.2 |
| the same with dropout | CIFAR-10, crops and flips | momentum 0.9, batch 64, 256 steps | 0.02, 0.05, 0.1 |

Short runs, all methods alike, so that the whole table is a matter of hours: the question is what the block methods lose
against backprop, not how far each network gets.

- Published: λ = 1, γ_h = 0.01, N_h = 1, one step size for all blocks. The last block's gradient is on backprop's scale
  and bounds it.
- Rescaled: 2λγ_h = 0.1, gradients divided by the first-order scale.
- Gauss-Newton: the proximal form with λ = 1 and one Gauss-Newton h-step of at most five conjugate gradient iterations.
- Backprop does not depend on K: it is run once and shown for every K.

Every batch is whole, by the share held out for validation or by the number of steps. With 2^n predictions in a batch
no factor of the exact form rounds; the rows with batches of 100 show what becomes of it where one might. The ResNet's
validation part has 1,000 images, and an accuracy there a standard deviation of 1.5 points: among step sizes that are
nearly as good it chooses by chance.
"""


_QUICK = """
60 steps of the perceptrons alone, with and without dropout, at the smallest K; two seeds unless told. It shows that the
command works, and its figures are not to be quoted. Step sizes are chosen as in the whole table.
"""


def pooled_sd(one: Sequence[float], other: Sequence[float]) -> float:
    """The square root of the mean of two sample variances; 0 for a single value each."""
    if len(one) < 2 or len(other) < 2:
        return 0.0
    return math.sqrt((statistics.variance(one) + statistics.variance(other)) / 2)


def _baselines(outcomes: Sequence[Outcome]) -> dict[str, Outcome]:
    return {outcome.row.panel: outcome for outcome in outcomes if outcome.row.label == "backprop"}


def _difference(outcome: Outcome, baseline: Outcome) -> tuple[float, float]:
    """How much worse than backprop, in the row's measure (accuracy in points, or loss), and the pooled sd."""
    key, sign = ("test_loss", 1.0) if outcome.row.by_loss else ("test_accuracy", -100.0)
    ours, theirs = outcome.values(key), baseline.values(key)
    worse = sign * mean_gap(ours, theirs)
    return worse, abs(sign) * pooled_sd(ours, theirs)


def _tell(study: Study, outcomes: Sequence[Outcome]) -> str:
    """The table, and the check of the exact form."""
    baselines = _baselines(outcomes)
    rows, failed, checked, same = [], [], 0, 0
    for panel in study.panels:
        members = [outcome for outcome in outcomes if outcome.row.panel == panel]
        for outcome in sorted(members, key=lambda one: list(METHODS).index(one.row.label)):
            if len(outcome.summaries) < len(study.seeds_of(outcome.row)):
                continue
            baseline = baselines[panel]
            comparable = bool(outcome.values("test_loss") and baseline.values("test_loss"))
            worse, sd = _difference(outcome, baseline) if comparable else (math.nan, 0.0)
            if outcome.row.label == "exact":
                checked += 1
                same += all(outcome.values(key) == baseline.values(key) for key in ("test_accuracy", "test_loss"))
                if outcome.diverged or not abs(worse) <= sd:
                    failed.append(panel)
            rows.append(_cells(outcome, worse, sd))
    header = [
        "network",
        "method",
        "step size",
        "test accuracy %",
        "test loss",
        "behind backprop, pooled sd",
        "diverged",
    ]
    check = "No row of the exact form is finished yet."
    if checked:
        check = (
            f"Check: the exact form's mean is within one pooled standard deviation of backprop's in "
            f"{checked - len(failed)} of {checked} finished rows"
            + (f"; not in {'; '.join(failed)}. " if failed else ". ")
            + f"In {same} of them test loss and accuracy are backprop's to the last digit, seed by seed."
        )
    note = (
        "Text is judged by loss, images by accuracy. Minus: ahead of backprop. Where seeds diverged, all figures are "
        "of the others alone, which flatters the row. \\*: the smallest or the largest step size that was tried."
    )
    return "\n\n".join([check, markdown_table(header, rows).strip(), note])


def _cells(outcome: Outcome, worse: float, sd: float) -> list[str]:
    behind = "0" if worse == 0 else f"{worse / sd:.1f}" if sd > 0 else "-"
    return [
        outcome.row.panel,
        outcome.row.label,
        f"{outcome.lr:g}" + r"\*" * outcome.at_the_end,
        spread(outcome.values("test_accuracy"), percent),
        spread(outcome.values("test_loss"), lambda value: f"{value:.4f}"),
        "" if outcome.row.label == "backprop" else behind,
        f"{outcome.diverged} of {len(outcome.summaries)}",
    ]


def _draw(study: Study, outcomes: Sequence[Outcome]) -> Any:
    """How far each row is behind backprop: accuracy in points on the left, loss on the right."""
    baselines = _baselines(outcomes)
    figure, (points, losses) = figure_of(study.title, 1, 2, width=7, height=max(4.0, 0.27 * len(study.panels) + 1.5))
    for axes, by_loss in ((points, False), (losses, True)):
        shown = [
            outcome
            for outcome in outcomes
            if outcome.row.by_loss == by_loss
            and outcome.row.label != "backprop"
            and outcome.values("test_loss")
            and baselines[outcome.row.panel].values("test_loss")
        ]
        panels = [panel for panel in study.panels if any(outcome.row.panel == panel for outcome in shown)]
        for index, method in enumerate(list(METHODS)[1:]):
            members = [outcome for outcome in shown if outcome.row.label == method]
            gaps = [_difference(outcome, baselines[outcome.row.panel]) for outcome in members]
            places = [panels.index(outcome.row.panel) + 0.16 * (index - 1.5) for outcome in members]
            sds = [sd for _, sd in gaps]
            axes.errorbar([worse for worse, _ in gaps], places, xerr=sds, fmt="o", ms=4, capsize=2, label=method)
        axes.axvline(0, color="0.3", linewidth=1)
        axes.set_yticks(range(len(panels)), panels, fontsize=8)
        axes.set_ylim(len(panels) - 0.4, -0.6)
        axes.set_xscale("symlog", linthresh=0.02 if by_loss else 0.3)
        axes.set(xlabel="test loss above backprop's" if by_loss else "points of test accuracy behind backprop")
        tidy(axes)
    points.legend(frameon=False, fontsize=9)
    return figure
