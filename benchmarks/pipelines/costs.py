"""What a workload's layers cost on this machine in the hour of its rows: what predictions of these rows start from."""

import multiprocessing
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass, replace
from typing import Any

from benchmarks.pipelines.workloads import Workload
from blockprop.experiments.optimizers import optimizer_named
from blockprop.experiments.plan import contention_of, costs_of
from blockprop.planning.allocator import keep_freed_memory
from blockprop.planning.comparison import Case
from blockprop.planning.costs import Layer, Passes


@dataclass(frozen=True)
class Costs:
    """Of a workload.

    Attributes:
        layers: the costs of each, bottom first.
        contention: what two processes lose to each other.
    """

    layers: tuple[Layer, ...]
    contention: float

    def as_json(self) -> dict[str, Any]:
        """For `results.json`; `of_json` reads it."""
        layers = [
            {**vars(one), "passes": {n: astuple(passes) for n, passes in one.passes.items()}} for one in self.layers
        ]
        return {"contention": self.contention, "layers": layers}

    @classmethod
    def of_json(cls, found: dict[str, Any]) -> "Costs":
        """What `as_json` made."""

        def layer(one: dict[str, Any]) -> Layer:
            return Layer(**{**one, "passes": {int(n): Passes(*passes) for n, passes in one["passes"].items()}})

        return cls(tuple(layer(one) for one in found["layers"]), found["contention"])

    def case(self, workload: Workload) -> Case:
        """For predictions of the workload's rows."""
        names = (workload.cut, workload.recomputing_cut, *workload.four)
        lower, again, *four = (self._index(name) for name in names)
        return Case(self.layers, workload.batch, self.contention, lower, again, (four[0], four[1], four[2]))

    def _index(self, name: str) -> int:
        found = (layer.name for layer in self.layers)
        return next(index for index, own in enumerate(found) if own == name or own.startswith(f"{name}."))


def measured(workload: Workload, repeats: int, seconds: float) -> Costs:
    """Measure in a process of its own, of one thread, that keeps what it frees.

    Args:
        workload: the workload; its data are made up.
        repeats: rounds through all layers.
        seconds: for the contention.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measured, workload, repeats, seconds).result()


def _measured(workload: Workload, repeats: int, seconds: float) -> Costs:
    keep_freed_memory()
    given = workload.settings
    assert given.model is not None
    sizes: dict[str, Any] = {"width": given.width, "depth": given.depth, "batch_size": workload.batch}
    layers = costs_of(given.model, **sizes, repeats=repeats, optimizer=optimizer_named(*workload.optimizer))
    return Costs(tuple(layers), contention_of(given.model, **sizes, seconds=seconds))


def middle(found: Sequence[Costs]) -> Costs:
    """The median of every number, of measurements of the same workload."""

    def layer(ones: Sequence[Layer]) -> Layer:
        passes = {
            n: Passes(*map(statistics.median, zip(*(astuple(one.passes[n]) for one in ones), strict=True)))
            for n in ones[0].passes
        }
        own = {name: statistics.median(getattr(one, name) for one in ones) for name in ("update", "taken", "copied")}
        return replace(ones[0], passes=passes, **own)

    layers = tuple(layer(ones) for ones in zip(*(one.layers for one in found), strict=True))
    return Costs(layers, statistics.median(one.contention for one in found))
