"""Predictions beside what was measured: two processes of this machine, by the names that the measurements have."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from blockprop.planning.cluster import Cluster, Link
from blockprop.planning.costs import Layer
from blockprop.planning.methods import Block
from blockprop.planning.plan import Setting, plan
from blockprop.schedules import delay

__all__ = ["BASE", "Case", "Comparison", "compare"]

BASE = "one thread"
_METHODS = {"GPipe": "gpipe", "1F1B": "1f1b", "ZBV": "zero bubble"}


@dataclass(frozen=True)
class Comparison:
    """A measured row and its prediction, both in multiples of the row "one thread" of the same workload.

    Attributes:
        workload: its name.
        method: its name in the measurement.
        link: its name.
        measured: samples per second over those of one thread, measured.
        predicted: the same, predicted.
    """

    workload: str
    method: str
    link: str
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        """Of the prediction, as a share of what was measured."""
        return self.predicted / self.measured - 1


@dataclass(frozen=True)
class Case:
    """A workload on two processes, and how it was measured.

    Attributes:
        layers: the costs of its layers.
        batch_size: examples of a batch.
        contention: what the two processes lose to each other.
        cut: where the second block begins, as the number of a layer.
        recomputing_cut: the same, for blocks that recompute.
        four: the three further stages of ZBV.
    """

    layers: Sequence[Layer]
    batch_size: int
    contention: float
    cut: int
    recomputing_cut: int
    four: tuple[int, int, int]

    def predict(self, method: str, link: Link, speed: float = 1.0) -> float | None:
        """Samples per second of a method by its name in the measurement; None for one that the planner has not.

        Args:
            method: its name.
            link: between the two.
            speed: of both devices, default that of the thread which the layers were measured on.

        Known are "one thread", "two independent copies", "two halves apart, 3 passes below" (or 4), "DDP",
        "GPipe, M", "1F1B, M", "ZBV, M", "1F1B, 8 x 128" for 8 batches at a time, "BlockProp, lock-step",
        "BlockProp, lock-step, stashed", "BlockProp, free-running", all three with ", 4 microbatches", and
        "BlockProp, cached, E = 2".
        """
        if method == "two independent copies":
            one = self.predict(BASE, link, speed)
            return None if one is None else 2 * one / self.contention
        if found := re.fullmatch(r"two halves apart, ([34]) passes below", method):
            return speed * self._halves(again=found[1] == "4")
        in_flight = 4 if link.latency else 2  # over a slow link the benchmark has more on their way
        request = self._request(method, in_flight)
        if request is None:
            return None
        name, cut, changes = request
        setting = replace(Setting(self.batch_size, microbatches=1, in_flight=in_flight), **changes)
        cluster = Cluster((speed, speed), link, self.contention)
        return plan(self.layers, cluster, setting, [name], (0, *cut))[0].samples_per_second

    def _request(self, method: str, in_flight: int) -> tuple[str, tuple[int, ...], dict[str, int]] | None:
        """The planner's name of a method, where it is cut, and what differs from the plain setting."""
        if found := re.fullmatch(r"(GPipe|1F1B|ZBV), (\d+)(?: x (\d+))?", method):
            count = int(found[2])
            batch = self.batch_size * (count if found[3] else 1)
            cut = self.four if found[1] == "ZBV" else (self.cut,)
            return _METHODS[found[1]], cut, {"batch_size": batch, "microbatches": count}
        if found := re.fullmatch(r"BlockProp, cached, E = (\d+)", method):
            return "blockprop cached", (self.cut,), {"refresh": int(found[1])}
        if found := re.fullmatch(r"BlockProp, lock-step(, stashed)?(?:, (\d+) microbatches)?", method):
            kind = "stashed" if found[1] else "lock-step"
            at = self.cut if found[1] or found[2] else self.recomputing_cut
            return f"blockprop {kind}", (at,), {"parts": int(found[2] or 1)}
        if found := re.fullmatch(r"BlockProp, free-running(?:, (\d+) microbatches)?", method):
            parts = int(found[1] or 1)
            again = delay(2, 1, parts, in_flight=in_flight) >= 1
            return "blockprop free-running", (self.recomputing_cut if again else self.cut,), {"parts": parts}
        whole = {BASE: "one device", "DDP": "ddp"}
        return (whole[method], (), {}) if method in whole else None

    def _halves(self, *, again: bool) -> float:
        cut = self.recomputing_cut if again else self.cut
        below = Block.of(self.layers[:cut], self.batch_size, bottom=True)
        top = Block.of(self.layers[cut:], self.batch_size, bottom=False)
        seconds = [block.forward + block.backward + block.update for block in (below, top)]
        seconds[0] += again * below.forward
        return self.batch_size / (max(seconds) * self.contention)


def compare(
    rows: Sequence[Mapping[str, Any]], cases: Mapping[str, Case], links: Mapping[str, Link]
) -> list[Comparison]:
    """Set predictions beside measured rows. Rows that the planner does not know are left out.

    Args:
        rows: each with "workload", "method", "link" and "samples_per_second", as `benchmarks.pipelines` leaves them; a
            row "one thread" for every workload, measured with the link's rows or else on any link. One that was
            measured apart has its "ratio" to one thread beside it, and may name the "costs" that were.
        cases: by the workload's name, or by what a row names as its costs.
        links: by the link's name.

    Raises:
        ValueError: a row without one of the four, or a workload without a row "one thread".
    """
    base: dict[str, float] = {}  # by workload, and by workload and link
    for row in rows:
        if missing := {"workload", "method", "link", "samples_per_second"} - row.keys():
            raise ValueError(f"a row has no {min(missing)!r}; expected workload, method, link and samples_per_second")
        if row["method"] == BASE:
            base.setdefault(row["workload"], row["samples_per_second"])
            base[f"{row['workload']}/{row['link']}"] = row["samples_per_second"]
    found = []
    for row in rows:
        name, method, link = row["workload"], row["method"], row["link"]
        case = cases.get(row.get("costs") or name, cases.get(name))
        if case is None or link not in links or method == BASE:
            continue
        if name not in base:
            raise ValueError(f"workload {name!r} has no row {BASE!r} to compare with; expected one on any link")
        rate = row["samples_per_second"]
        ratio = row.get("ratio", rate / base.get(f"{name}/{link}", base[name]))
        measured, one = rate / ratio, case.predict(BASE, links[link])
        assert one is not None
        # layers measured one by one may be faster than in training, by what the caches then lack: one thread's row
        # says how fast a device really is beside the link
        predicted = case.predict(method, links[link], measured / one)
        if predicted is not None:
            found.append(Comparison(name, method, link, ratio, predicted / measured))
    return found
