"""Figure 3 of the paper: ResNet18 on CIFAR-10 at K = 2; with dropout; and the published form over K and cuts."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from blockprop.experiments.settings import Settings
from blockprop.studies.drawing import band, curves, figure_of, tidy
from blockprop.studies.publish import markdown_table, percent, spread
from blockprop.studies.study import Outcome, Row, Study

__all__ = ["figure3"]

H_LR = 0.01
"""γ_h, as in the paper."""

LR = 0.05
"""γ_B of both blocks, unless a row says otherwise."""

_MAIN, _DROPOUT, _DECAY = "K = 2", "K = 2, dropout 0.2", "K = 2, weight decay"
_BLOCKS, _CUTS = "over K", "over cuts at K = 2"
_TRAIN_SIZE = 50_000
_BATCH = 128


def _published(base: Settings, penalty: float, **more: Any) -> Settings:
    return replace(base, form="published", penalty=(penalty,), h_lr=H_LR, **more)


def _references(panel: str, base: Settings) -> Iterable[Row]:
    yield Row(panel, "backprop", replace(base, algorithm="backprop"), style=(("color", "k"),))
    yield Row(panel, "exact", base, style=(("color", "0.6"), ("linestyle", ":"), ("linewidth", 2.5)))


def _matched(panel: str, base: Settings, penalty: float, color: str, name: str = "") -> Row:
    """Backprop with block 1's step size times s = 2λγ_h."""
    rates = (LR * 2 * penalty * H_LR, LR)
    matched = replace(base, algorithm="backprop", block_lr=rates)
    label = f"matched, {name or f'λ = {penalty:g}'}"
    return Row(panel, label, matched, style=(("color", color), ("linestyle", "--")))


def _decay(steps: int) -> float:
    """Weight decay that shrinks a block which learns nothing to a quarter by the end of the run.

    But by no more than 0.5 % a step, or BatchNorm's running statistics lag behind the weights and no row can be
    evaluated; a short run shrinks it less.
    """
    return min(1.5 / steps, 0.005) / (10 * LR)


def _by_penalty(panel: str, base: Settings, penalties: Sequence[float]) -> Iterable[Row]:
    for index, penalty in enumerate(penalties):
        yield Row(panel, f"λ = {penalty:g}", _published(base, penalty), style=(("color", f"C{index}"),))


def _rows(base: Settings, steps: int, quick: bool) -> Iterable[Row]:
    penalties = (1e-3, 1.0, 50.0) if quick else (1e-3, 1.0, 10.0, 50.0)
    yield from _references(_MAIN, base)
    yield from _by_penalty(_MAIN, base, penalties)
    yield _matched(_MAIN, base, 1e-3, "C0")
    if not quick:
        yield _matched(_MAIN, base, 1.0, "C1")
    # block 1's step size raised by 1 / (2λγ_h), or part of the way; and block 2's lowered
    for index, (penalty, below, above) in enumerate(
        ((1e-3, 2500.0, LR), (1.0, 2.5, LR), (1.0, 0.5, LR), (1.0, LR, 0.01))
    ):
        if not quick or index == 0:
            label = f"λ = {penalty:g}, γ_B1 = {below:g}, γ_B2 = {above:g}"
            settings = _published(base, penalty, block_lr=(below, above))
            yield Row(_MAIN, label, settings, style=(("color", f"C{5 + index}"),))
    dropped = replace(base, dropout=0.2)
    yield from _references(_DROPOUT, dropped)
    yield from _by_penalty(_DROPOUT, dropped, penalties)
    decayed = replace(base, weight_decay=_decay(steps))
    yield from _references(_DECAY, decayed)
    yield from _by_penalty(_DECAY, decayed, (1e-3, 50.0))
    yield _matched(_DECAY, decayed, 1e-3, "C0")
    yield from _references(_BLOCKS, base)
    for color, blocks in enumerate((2, 4) if quick else (2, 3, 4)):
        for style, penalty in (("-", 1.0),) if quick else (("-", 1.0), ("--", 10.0), ("-.", 50.0)):
            settings = _published(base, penalty, blocks=blocks)
            label = f"K = {blocks}, λ = {penalty:g}"
            yield Row(_BLOCKS, label, settings, style=(("color", f"C{color}"), ("linestyle", style)))
    yield from _references(_CUTS, base)
    cuts = ("layer1_1", "layer4_2") if quick else ("layer1_1", "layer2_1", "layer3_1", "layer4_1", "layer4_2")
    for color, name in enumerate(cuts):
        settings = _published(base, 1.0, split_at=(name,))
        yield Row(_CUTS, f"block 2 from {name}", settings, style=(("color", f"C{color}"),))
    yield _matched(_CUTS, replace(base, split_at=("layer1_1",)), 1.0, "C0", "block 2 from layer1_1")


def figure3(
    *,
    data_dir: Path | None = None,
    seeds: Sequence[int] = (),
    quick: bool = False,
    width: int | None = None,
    epochs: int | None = None,
    train_size: int | None = None,
) -> Study:
    """The study.

    Args:
        data_dir: folder of the published data.
        seeds: default 0, 1, 2; with `quick` 0.
        quick: fewer rows, a narrow network, a few steps.
        width: channels of the network's first stage; default 64, the paper's network, with `quick` 4.
        epochs: passes over the training data; default 10, with `quick` 1.
        train_size: use the first so many training examples; default all 50,000, with `quick` 3,200.
    """
    width = width or (4 if quick else 64)
    epochs = epochs or (1 if quick else 10)
    train_size = train_size or (3_200 if quick else None)
    steps = epochs * -(-(train_size or _TRAIN_SIZE) // _BATCH)
    every = -(-steps // (2 if quick else max(epochs, 5)))
    base = Settings(
        data="cifar10",
        data_dir=data_dir,
        model="resnet18",
        width=width,
        epochs=epochs,
        train_size=train_size,
        batch_size=_BATCH,
        lr=LR,
        validation=0,
        evaluate_on="test",
        evaluate_every=every,
        log_every=every,
        threads=1,
    )
    size = f"width {width}, {epochs} epoch{'s' * (epochs > 1)} of {train_size or _TRAIN_SIZE:,} images"
    return Study(
        name="figure-3",
        title=f"Figure 3: ResNet18 on CIFAR-10, {size}",
        about=_ABOUT.replace("SIZE", size).replace("DECAY", f"{_decay(steps):.2g}"),
        rows=tuple(_rows(base, steps, quick)),
        seeds=tuple(seeds) or ((0,) if quick else (0, 1, 2)),
        draw=_draw,
        tell=_tell,
    )


_ABOUT = """
The published form with N_h = 1 and γ_h = 0.01 at K = 2, over λ and over the blocks' step sizes γ_B1 and γ_B2; the same
with dropout before the last layer, and with a weight decay of DECAY; over K; and over cuts at λ = 1, where block 2
from `layer3_1` on is the even one, that of all other panels at K = 2. SGD with
momentum 0.9, batch 128, crops and flips; γ_B = 0.05 where nothing else is said. The full network has width 64 and
50,000 images an epoch; here: SIZE.

- *matched* (dashed): backprop with block 1's step size times 2λγ_h.
- *exact*: the exact form.

The curves are on the test part, as in the paper. Nothing was chosen by them. The gluing loss is
‖h\\*_{k+1} - b_k(h_k)‖² at the forward pass's h_k, summed over the links: at K = 2 the paper's, and above that without
what h\\*_k adds to it. The exact form's is of its own h-step, of 2λγ_h = 1.
"""


def _tell(study: Study, outcomes: Sequence[Outcome]) -> str:
    """A table of every panel."""
    parts = []
    for panel in study.panels:
        rows = [
            [
                outcome.row.label,
                spread(outcome.values("test_accuracy"), percent),
                spread(outcome.values("test_loss"), lambda value: f"{value:.3f}"),
                spread(outcome.values("train_loss"), lambda value: f"{value:.3f}"),
                f"{outcome.diverged} of {len(outcome.summaries)}",
            ]
            for outcome in outcomes
            if outcome.row.panel == panel
        ]
        header = [panel, "test accuracy %", "test loss", "training loss, last epoch", "diverged"]
        parts.append(markdown_table(header, rows).strip())
    parts.append("Where seeds diverged, the figures are of the others alone, which flatters the row.")
    return "\n\n".join(parts)


_QUANTITIES = (
    ("gluing loss ‖h* - b(h)‖², without λ", "train", "gluing_loss", 1.0),
    ("cross-entropy at the last layer", "train", "loss", 1.0),
    ("test accuracy (%)", "test", "accuracy", 100.0),
    ("test loss", "test", "loss", 1.0),
)


def _draw(study: Study, outcomes: Sequence[Outcome]) -> Any:
    """A line of panels for each of the four parts: the paper's four quantities."""
    figure, axes = figure_of(study.title, len(study.panels), len(_QUANTITIES), width=4.4, height=3.6)
    for row, panel in enumerate(study.panels):
        members = [outcome for outcome in outcomes if outcome.row.panel == panel]
        for column, (title, kind, key, scale) in enumerate(_QUANTITIES):
            ax = axes[row * len(_QUANTITIES) + column]
            for outcome in members:
                found = curves(outcome, kind, key)
                band(ax, found, {**dict(outcome.row.style), "label": outcome.row.label}, scale=scale)
            if key == "gluing_loss":
                ax.set_yscale("log")
            if title == "test loss":
                _cut_spikes(ax, members)
                ax.legend(frameon=False, fontsize=6)
            ax.set_title(f"{panel}: {title}", fontsize=8)
            ax.set_xlabel("iteration", fontsize=8)
            tidy(ax)
    return figure


def _cut_spikes(ax: Any, members: Sequence[Outcome]) -> None:
    """One unstable row must not flatten the others."""
    finals = [value for outcome in members for value in outcome.values("test_loss")]
    if finals:
        ax.set_ylim(0.9 * min(finals), min(ax.get_ylim()[1], 2 * max(2.4, min(finals))))
