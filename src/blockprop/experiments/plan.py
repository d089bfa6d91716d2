"""The planner for a model of the zoo: what its layers cost, and a table of what every method would reach."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from blockprop.experiments.cost import one_thread, random_data
from blockprop.models import NAMES, build
from blockprop.planning.cluster import Cluster
from blockprop.planning.contention import measure_contention
from blockprop.planning.costs import Layer, measure_layers
from blockprop.planning.plan import Prediction, Setting
from blockprop.split import layers_of
from blockprop.wstep import OptimizerFactory

__all__ = ["TITLES", "contention_of", "costs_of", "record", "table"]

TITLES = {
    "one device": "one device",
    "ddp": "DDP",
    "gpipe": "GPipe",
    "1f1b": "1F1B",
    "zero bubble": "zero bubble",
    "blockprop lock-step": "BlockProp, lock-step",
    "blockprop stashed": "BlockProp, stashed",
    "blockprop free-running": "BlockProp, free-running",
    "blockprop cached": "BlockProp, cached",
}


def _model(name: str, batch_size: int, context: int, width: int | None, depth: int | None, device: str) -> Any:
    if name not in NAMES:
        raise ValueError(f"unknown model {name!r}; expected one of {', '.join(NAMES)}")
    for what, value in (("batch size", batch_size), ("context", context)):
        if value < 1:
            raise ValueError(f"{what} is {value}; expected a whole number of at least 1")
    data = random_data(name, max(2, batch_size), context)
    inputs = data.train.batch(torch.arange(batch_size))[0]
    with torch.random.fork_rng(devices=[]), torch.device(device):
        return build(name, data, width=width, depth=depth), inputs


def costs_of(
    name: str,
    *,
    width: int | None = None,
    depth: int | None = None,
    batch_size: int = 128,
    context: int = 64,
    repeats: int = 5,
    optimizer: OptimizerFactory | None = None,
) -> list[Layer]:
    """Measure the layers of a model of the zoo on one thread, without ever holding the whole model in memory.

    Args:
        name: one of [`NAMES`][blockprop.models.catalogue.NAMES], with inputs as for `blockprop cost`.
        width: the model's; None for its default.
        depth: the model's; None for its default.
        batch_size: examples of a batch, default 128.
        context: tokens of an example of "gpt", default 64.
        repeats: measurements of each layer and size, default 5.
        optimizer: makes one for a layer's weights; default plain SGD.

    Raises:
        ValueError: an unknown model, or a setting out of its range.
    """
    model, inputs = _model(name, batch_size, context, width, depth, "meta")
    with one_thread():
        return measure_layers(layers_of(model), inputs, repeats=repeats, optimizer=optimizer)


def contention_of(
    name: str,
    *,
    width: int | None = None,
    depth: int | None = None,
    batch_size: int = 128,
    context: int = 64,
    seconds: float = 12.0,
) -> float:
    """What two processes lose to each other on this machine when both train the model; for models that fit into it."""
    model, inputs = _model(name, batch_size, context, width, depth, "cpu")
    with one_thread():
        return measure_contention(model, inputs, seconds)


def table(predictions: Sequence[Prediction], layers: Sequence[Layer], title: str) -> Table:
    """Samples per second, beside one device, how busy the devices are, and the cut."""
    made = Table(title=title, title_justify="left", caption_justify="left", box=SIMPLE_HEAD, collapse_padding=True)
    made.add_column("", no_wrap=True)
    for head in ("samples/s", "× one device", "busy, mean", "least", "most"):
        made.add_column(head, justify="right", no_wrap=True)
    made.add_column("blocks begin at")
    one = next((each.samples_per_second for each in predictions if each.method == "one device"), None)
    for each in predictions:
        ratio = "" if one is None else f"{each.samples_per_second / one:.2f}"
        mean = sum(each.busy) / len(each.busy)
        names = [layers[first].name for first in each.cut[1:]]
        shown = names if len(names) <= 4 else [*names[:2], "…", names[-1]]
        made.add_row(
            TITLES[each.method],
            _digits(each.samples_per_second),
            ratio,
            *(f"{100 * share:.0f} %" for share in (mean, min(each.busy), max(each.busy))),
            ", ".join(shown),
        )
    return made


def _digits(number: float) -> str:
    return f"{number:,.0f}" if number >= 99.5 else f"{number:.3g}"


def record(
    predictions: Sequence[Prediction], layers: Sequence[Layer], cluster: Cluster, setting: Setting
) -> dict[str, Any]:
    """The same, JSON-ready, with all that it rests on."""
    passes = {layer.name: asdict(layer.at(setting.batch_size)) | {"update": layer.update} for layer in layers}
    return {
        "cluster": asdict(cluster),
        "setting": asdict(setting),
        "seconds": passes,
        "methods": [{**asdict(each), "cut": [layers[first].name for first in each.cut]} for each in predictions],
    }
