"""Figure 2 of the paper: the perceptron on MNIST, over N_h and over λ; and what explains it."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from blockprop.experiments.settings import Settings
from blockprop.hsolvers import GradientDescent
from blockprop.penalties import Squared
from blockprop.studies.drawing import band, curves, figure_of, tidy
from blockprop.studies.publish import markdown_table, percent, spread
from blockprop.studies.study import Outcome, Row, Study

__all__ = ["figure2"]

H_LR = 0.01
"""γ_h, of the paper's ResNet; it prints none for this network."""

PENALTIES = (0.1, 1.0, 10.0, 50.0)
_STEPS, _FOUR, _TWO = "N_h at λ = 1", "λ at N_h = 4", "λ at N_h = 2"
_SENSITIVITY = "γ_h, γ_B and width, at λ = 1 and N_h = 1, 8"
_SWEPT = {1: "", 8: " at N_h = 8"}


def link_scale(penalty: float, h_lr: float, h_steps: int) -> float:
    """The factor s = 1 - (1 - 2λγ_h)^N_h that N_h gradient steps put on what a link passes down."""
    return GradientDescent(h_steps, h_lr).scale(Squared(penalty))


def _pair(
    panel: str,
    name: str,
    base: Settings,
    color: str,
    *,
    penalty: float,
    h_steps: int,
    h_lr: float = H_LR,
    at: str = "",
) -> Iterable[Row]:
    """The published form, and backprop with block 1's step size times s."""
    published = replace(base, form="published", penalty=(penalty,), h_steps=h_steps, h_lr=h_lr)
    assert base.lr is not None
    rates = (base.lr * link_scale(penalty, h_lr, h_steps), base.lr)
    matched = replace(base, algorithm="backprop", block_lr=rates)
    yield Row(panel, f"published{at}, {name}", published, style=(("color", color),))
    yield Row(panel, f"matched{at}, {name}", matched, style=(("color", color), ("linestyle", "--")))


def _references(panel: str, base: Settings) -> Iterable[Row]:
    backprop = replace(base, algorithm="backprop")
    yield Row(panel, "backprop", backprop, style=(("color", "k"),))
    yield Row(panel, "exact", base, style=(("color", "0.6"), ("linestyle", ":"), ("linewidth", 2.5)))


def _rows(base: Settings) -> Iterable[Row]:
    yield from _references(_STEPS, base)
    for index, h_steps in enumerate((1, 2, 4, 8)):
        yield from _pair(_STEPS, f"N_h = {h_steps}", base, f"C{index}", penalty=1.0, h_steps=h_steps)
    for panel, h_steps in ((_FOUR, 4), (_TWO, 2)):
        yield from _references(panel, base)
        for index, penalty in enumerate(PENALTIES):
            yield from _pair(panel, f"λ = {penalty:g}", base, f"C{index}", penalty=penalty, h_steps=h_steps)
    for name, changed, h_lr in (
        ("as above", base, H_LR),
        ("γ_h = 0.003", base, 0.003),
        ("γ_h = 0.03", base, 0.03),
        ("γ_B = 0.03", replace(base, lr=0.03), H_LR),
        ("γ_B = 0.3", replace(base, lr=0.3), H_LR),
        ("width 100", replace(base, width=100), H_LR),
        ("width 1000", replace(base, width=1000), H_LR),
    ):
        yield Row(_SENSITIVITY, f"backprop, {name}", replace(changed, algorithm="backprop"))
        for h_steps, at in _SWEPT.items():
            yield from _pair(_SENSITIVITY, name, changed, "C0", penalty=1.0, h_steps=h_steps, h_lr=h_lr, at=at)


def figure2(
    *, data_dir: Path | None = None, seeds: Sequence[int] = (), quick: bool = False, epochs: int | None = None
) -> Study:
    """The study.

    Args:
        data_dir: folder of the published data.
        seeds: default 0, 1, 2; with `quick` 0, 1.
        quick: 200 steps, unless epochs are given.
        epochs: passes over the training data; default 3.
    """
    short = quick and epochs is None
    every = 40 if short else 200
    base = Settings(
        data="mnist",
        data_dir=data_dir,
        model="mlp",
        width=300,
        depth=2,
        lr=0.1,
        epochs=None if short else epochs or 3,
        steps=200 if short else None,
        validation=0,
        evaluate_on="test",
        evaluate_every=every,
        log_every=every,
        threads=1,
    )
    return Study(
        name="figure-2",
        title="Figure 2: 784-300-10 on MNIST, K = 2",
        about=_ABOUT.format(length="200 steps" if short else f"{epochs or 3} epochs"),
        rows=tuple(_rows(base)),
        seeds=tuple(seeds) or ((0, 1) if quick else (0, 1, 2)),
        draw=_draw,
        tell=_tell,
    )


_ABOUT = """
The published form with SGD, batch 64, {length}, over the steps N_h of the h-step and over λ. The paper prints neither
γ_h nor γ_B nor the width of this network. Here γ_h = 0.01, as for its ResNet; γ_B = 0.1; 300 hidden units; the last
panel varies each alone, at one and at eight h-steps.

Beside the paper's curves:

- *matched* (dashed): backprop with block 1's step size times s = 1 - (1 - 2λγ_h)^N_h, to first order the
  published form at K = 2;
- *exact*: the exact form.

The curves are test accuracy, as in the paper. Nothing was chosen by them: all settings were fixed before.
"""


def _tell(study: Study, outcomes: Sequence[Outcome]) -> str:
    """A table of every panel, and how far published and matched are from each other and from backprop."""
    by_name = {outcome.row.name: outcome for outcome in outcomes}
    parts: list[str] = []
    to_matched: dict[Settings, list[float]] = {}  # some settings stand in several panels
    to_backprop: dict[Settings, float] = {}
    for panel in study.panels:
        rows = []
        for outcome in outcomes:
            kind, _, name = outcome.row.label.partition(", ")
            if outcome.row.panel != panel or not kind.startswith("published"):
                continue
            at = kind.removeprefix("published")
            settings = outcome.row.settings
            assert settings.h_lr is not None
            matched = by_name[f"{panel}: matched{at}, {name}"]
            backprop = by_name.get(f"{panel}: backprop, {name}") or by_name[f"{panel}: backprop"]
            trio = [one.values("test_accuracy") for one in (outcome, matched, backprop)]
            scale = link_scale(settings.penalty[0], settings.h_lr, settings.h_steps)
            rows.append([name + at, f"{scale:.3g}", *(spread(values, percent) for values in trio)])
            to_matched |= {settings: outcome.gains(matched, "test_accuracy")}
            if gains := outcome.gains(backprop, "test_accuracy"):
                to_backprop[settings] = -100 * fmean(gains)
        table = markdown_table([panel, "s", "published", "matched", "backprop"], rows)
        parts.append(table.strip())
    exact = by_name[f"{_STEPS}: exact"].gains(by_name[f"{_STEPS}: backprop"], "test_accuracy")
    apart = [abs(100 * gap) for gaps in to_matched.values() for gap in gaps]
    if to_backprop and apart and exact:
        behind = to_backprop.values()
        parts.append(
            f"Test accuracy in % after training. Over {len(behind)} settings the published form is "
            f"{min(behind):.2f} to {max(behind):.2f} points behind backprop in the mean over seeds, and no "
            f"run of it is more than {max(apart):.2f} from the matched backprop of the same seed. No run of the exact "
            f"form is more than {max(abs(100 * gap) for gap in exact):.2f} from backprop's of the same seed."
        )
    return "\n\n".join(parts)


def _draw(study: Study, outcomes: Sequence[Outcome]) -> Any:
    figure, axes = figure_of(study.title, 2, 2, width=6, height=4.2)
    for panel, ax in zip(study.panels, axes, strict=True):
        members = [outcome for outcome in outcomes if outcome.row.panel == panel]
        if panel == _SENSITIVITY:
            _draw_sensitivity(ax, members)
        else:
            _draw_curves(ax, members)
        ax.set_title(panel, fontsize=10)
        tidy(ax)
    return figure


def _draw_curves(ax: Any, members: Sequence[Outcome]) -> None:
    for outcome in members:
        style = dict(outcome.row.style)
        if not outcome.row.label.startswith("matched"):
            style["label"] = outcome.row.label.removeprefix("published, ")
        band(ax, curves(outcome, "test", "accuracy"), style, scale=100)
    ax.plot([], [], "k--", label="matched to the\nsame color")
    finals = [line.get_ydata()[-1] for line in ax.lines if len(line.get_ydata())]
    if finals:
        ax.set_ylim(bottom=min(finals) - 0.6 * (max(finals) - min(finals)) - 0.5)
    ax.set(xlabel="iteration", ylabel="test accuracy (%)")
    ax.legend(frameon=False, fontsize=8, loc="lower right", ncols=2)


def _draw_sensitivity(ax: Any, members: Sequence[Outcome]) -> None:
    names = list(dict.fromkeys(outcome.row.label.partition(", ")[2] for outcome in members))
    kinds = {"backprop": "k"}
    for index, at in enumerate(_SWEPT.values()):
        kinds |= {f"published{at}": f"C{2 * index}", f"matched{at}": f"C{2 * index + 1}"}
    for offset, (kind, color) in enumerate(kinds.items()):
        for outcome in members:
            label, _, name = outcome.row.label.partition(", ")
            values = [100 * value for value in outcome.values("test_accuracy")]
            if label == kind and values:
                place = names.index(name) + 0.15 * (offset - 2)
                ax.plot([place] * len(values), values, "_", color=color, alpha=0.6)
                ax.plot(place, sum(values) / len(values), "o", ms=5, color=color)
        ax.plot([], [], "o", color=color, label=kind)
    ax.set_xticks(range(len(names)), names, rotation=20, fontsize=8)
    ax.set(ylabel="test accuracy after training (%)")
    ax.legend(frameon=False, fontsize=8)
