"""Algorithm 2 on MNIST: feedback refreshed on every E-th visit of an example only, beside backpropagation.

First with cached targets under a fresh forward pass (`CachedExecutor`), then as published, with cached inputs
(`ReplayedExecutor`). With --out every finished row is kept, and the same command continues after the last one.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import blockprop
from benchmarks.measure import SEED, arguments, publish, table
from blockprop.cache import Entries, GluingCache
from blockprop.checkpoint import write_atomically
from blockprop.cost import counted
from blockprop.curvature import Constant, Secant
from blockprop.data import Dataset, batches, load
from blockprop.executors.cached import CachedExecutor
from blockprop.executors.executor import DivergedError
from blockprop.executors.replayed import ReplayedExecutor
from blockprop.models import mlp
from blockprop.training import score

BATCH = 128
NETWORKS: dict[int, Callable[[], nn.Sequential]] = {
    2: lambda: mlp(784, 10, width=300, depth=2),
    4: lambda: mlp(784, 10, width=256, depth=4),
}


@dataclass(frozen=True)
class Row:
    """A run.

    Attributes:
        blocks: K; one layer each.
        form: "backprop", "targets" (cached targets), "rest" (nothing is cached) or "published".
        refresh: E.
        curvature: κ, or "auto"; of cached targets.
        along: whether κ acts along the cached slopes alone; of cached targets.
        scale: 2λγ_h; of the published form.
        penalty: λ; of the published form.
        lr: step size of SGD.
        dtype: of the cache.
    """

    blocks: int
    form: str
    refresh: int = 1
    curvature: float | str | None = None
    along: bool = True
    scale: float | None = None
    penalty: float = 1.0
    lr: float = 0.1
    dtype: str = "float32"


def rows(quick: bool) -> Iterator[Row]:
    """All of them, the most telling first."""
    for blocks in (2, 4):
        yield Row(blocks, "backprop")
        for refresh in (2, 4):
            yield Row(blocks, "targets", refresh, "auto")
    for blocks in (2, 4):
        for refresh in (2, 4):
            yield Row(blocks, "rest", refresh)
    for blocks in (2, 4):
        for scale, refresh in [(0.02, 1), (0.02, 2), (1.0, 1), (1.0, 4)]:
            yield Row(blocks, "published", refresh, scale=scale)
    for lr in (0.003, 0.01):
        yield Row(2, "backprop", lr=lr)
        yield Row(2, "published", scale=1.0, penalty=500.0, lr=lr)
    yield Row(2, "published", 2, scale=1.0, penalty=500.0, lr=0.003)
    for blocks in () if quick else (2, 4):
        for refresh in (2, 4):
            yield Row(blocks, "targets", refresh, 0.1)
            yield Row(blocks, "targets", refresh, 0.01, along=False)
        for dtype in ("bfloat16", "int8"):
            yield Row(blocks, "targets", 2, "auto", dtype=dtype)


class _Forgetful(GluingCache):
    """The control: no feedback on the visits between."""

    def read(self, link: int, ids: Tensor) -> Entries:
        anchor, direction = super().read(link, ids)
        return Entries(anchor, torch.zeros_like(direction))


def algorithm(row: Row, model: nn.Sequential, examples: int) -> blockprop.BlockProp:
    """The algorithm of a row."""
    settings: dict[str, Any] = {}
    cache = (_Forgetful if row.form == "rest" else GluingCache)(examples, dtype=getattr(torch, row.dtype))
    if row.form in ("targets", "rest"):
        curvature = Secant() if row.curvature == "auto" else Constant(row.curvature or 0.0)
        executor = CachedExecutor(cache, refresh=row.refresh, curvature=curvature, along=row.along)
        settings = {"executor": executor}
    elif row.form == "published":
        h_solver = blockprop.GradientDescent(1, row.scale / (2 * row.penalty))
        replayed = ReplayedExecutor(cache, refresh=row.refresh)
        settings = {"form": "published", "penalty": row.penalty, "h_solver": h_solver, "executor": replayed}
    return blockprop.BlockProp(
        blockprop.split(model, row.blocks, by="layers"),
        nn.CrossEntropyLoss(),
        lambda parameters: torch.optim.SGD(parameters, lr=row.lr),
        **settings,
    )


def measure(row: Row, data: Dataset, epochs: int) -> dict[str, Any]:
    """Train, and score on the test part after every epoch."""
    torch.manual_seed(SEED)
    algo = algorithm(row, NETWORKS[row.blocks](), len(data.train))
    accuracies: list[float] = []
    steps, refreshed, start = 0, 0, time.process_time()
    work = {True: 0.0, False: 0.0}  # FLOPs of a step, refreshed or not
    try:
        for epoch in range(epochs):
            for ids in batches(len(data.train), BATCH, seed=SEED, epoch=epoch):
                inputs, targets = data.train.batch(ids)
                if steps % 40 == 7:  # counting slows a step down
                    report, flops = counted(algo.step, inputs, targets, ids)
                    work[report.links[0].steps > 0] = flops
                else:
                    report = algo.step(inputs, targets, ids)
                steps += 1
                refreshed += report.links[0].steps > 0
            accuracies.append(100 * (score(algo, data.test).accuracy or 0.0))
    except DivergedError:
        accuracies.append(float("nan"))
    share = refreshed / steps
    return {
        **asdict(row),
        "accuracies": accuracies,
        "refreshed": share,
        "flops": share * work[True] + (1 - share) * work[False],
        "seconds": time.process_time() - start,
    }


def _finished(path: Path | None) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["results"] if path and path.exists() else []


def results(given: argparse.Namespace, epochs: int) -> list[dict[str, Any]]:
    """Those of the rows that an earlier run has finished, and then the others'."""
    kept = given.out.with_suffix(".json") if given.out else None
    found = _finished(kept)
    data = load("mnist", given.data_dir)
    data = data.first(12_000) if given.quick else data
    for row in rows(given.quick):
        if any(all(one.get(key) == value for key, value in asdict(row).items()) for one in found):
            continue
        found.append(measure(row, data, epochs))
        print(row, [f"{value:.2f}" for value in found[-1]["accuracies"]], flush=True)
        if kept:
            write_atomically(kept, json.dumps({"results": found}).encode())
    return found


def _cells(one: dict[str, Any], baseline: dict[str, Any]) -> list[object]:
    accuracies = one["accuracies"]
    where = "" if one["along"] else ", all directions"
    return [
        one["blocks"],
        one["form"] if one["dtype"] == "float32" else f"{one['form']}, {one['dtype']}",
        one["refresh"],
        "" if one["curvature"] is None else f"{one['curvature']}{where}",
        "" if one["scale"] is None else f"{one['scale']:g}, λ = {one['penalty']:g}",
        f"{one['lr']:g}",
        ", ".join(f"{value:.1f}" for value in accuracies),
        f"{accuracies[-1]:.2f}",
        f"{accuracies[-1] - baseline['accuracies'][-1]:+.2f}",
        f"{one['refreshed']:.0%}",
        f"{one['flops'] / baseline['flops']:.2f}",
        f"{one['seconds'] / baseline['seconds']:.2f}",
    ]


def main() -> None:
    given = arguments(__doc__, data=True)
    torch.set_num_threads(1)
    epochs = 6 if given.quick else 8
    found = results(given, epochs)
    baselines = {(one["blocks"], one["lr"]): one for one in found if one["form"] == "backprop"}
    head = ["K", "form", "E", "κ", "2λγ_h", "SGD", "test accuracy after each epoch, %", "at the end", "to backprop"]
    head += ["refreshed", "FLOPs / backprop's", "seconds / backprop's"]
    which = "MNIST, the first 12,000 examples" if given.quick else "MNIST"
    body = [
        f"{which}; one layer a block (784-300-10 at K = 2, 784-256-256-256-10 at K = 4), SGD, batch {BATCH}, "
        f"{epochs} epochs, one seed. `targets`: cached targets under a fresh forward pass. `published`: Algorithm 2 "
        "with cached inputs, N_h = 1. `rest` is the control: between refreshes the blocks below the top do not "
        "learn.",
        table(head, [_cells(one, baselines[one["blocks"], one["lr"]]) for one in found]),
        "Seconds are the processor's. FLOPs are those of matrix products that ran, of training alone.",
    ]
    publish("caching", given, "The gluing cache", body, found)


if __name__ == "__main__":
    main()
