"""The planner's predictions beside what was measured on two processes of this machine.

    python -m benchmarks.plan ROWS.json

ROWS.json are the rows that `python -m benchmarks.pipelines` leaves: a list of objects with workload, method, link and
samples_per_second. Layer costs and contention are measured here and now, on the same machine.
"""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

import torch

from benchmarks.pipelines.link import SPEEDS
from benchmarks.pipelines.workloads import Workload, workloads
from blockprop.experiments.cost import random_data
from blockprop.experiments.optimizers import optimizer_named
from blockprop.models import build
from blockprop.planning.allocator import keep_freed_memory
from blockprop.planning.cluster import LOOPBACK, Link
from blockprop.planning.comparison import Case, Comparison, compare
from blockprop.planning.contention import measure_contention
from blockprop.planning.costs import Layer, measure_layers
from blockprop.split import layers_of

GOODPUT = Path(__file__).parents[1] / "docs" / "results" / "goodput.json"
"""Share of an emulated link's bandwidth that TCP brings, one way and both ways at once: of `benchmarks.goodput`."""


def links() -> dict[str, Link]:
    """The links of the measurements, by name and by title."""
    measured = json.loads(GOODPUT.read_text())["results"]
    found: dict[str, Link] = {}
    for speed in SPEEDS:
        link = LOOPBACK
        if speed.mbit:
            one, both = (measured[speed.name][ways]["median"] for ways in ("one", "both"))
            duplex = min(1.0, both / one)
            link = replace(link, bandwidth=one * speed.mbit, latency=speed.delay_ms, duplex=duplex)
        found |= {speed.name: link, speed.title: link}
    return found


def case(workload: Workload, repeats: int) -> Case:
    """Measure a workload's layers and contention."""
    given = workload.settings
    assert given.model is not None
    torch.manual_seed(0)
    data = random_data(given.model, 2 * workload.batch, 64)
    model = build(given.model, data, width=given.width, depth=given.depth)
    inputs = data.train.batch(torch.arange(workload.batch))[0]
    make = optimizer_named(*workload.optimizer)
    layers = measure_layers(layers_of(model), inputs, repeats=repeats, optimizer=make)
    lower, again, *four = (_index(layers, at) for at in (workload.cut, workload.recomputing_cut, *workload.four))
    contention = measure_contention(model, inputs)
    return Case(layers, workload.batch, contention, lower, again, (four[0], four[1], four[2]))


def _index(layers: list[Layer], name: str) -> int:
    return next(i for i, layer in enumerate(layers) if layer.name == name or layer.name.startswith(f"{name}."))


def shown(found: list[Comparison]) -> str:
    """The table: multiples of one thread, and the error of the prediction."""
    lines = [f"{'workload':10}{'link':10}{'method':36}{'measured':>9}{'predicted':>10}{'error':>9}"]
    for each in found:
        flag = "" if abs(each.error) <= 0.15 else "  above 15 %"
        lines.append(
            f"{each.workload:10}{each.link:10}{each.method:36}{each.measured:9.2f}{each.predicted:10.2f}"
            f"{each.error:+9.0%}{flag}"
        )
    within = sum(abs(each.error) <= 0.15 for each in found)
    return "\n".join([*lines, f"{within} of {len(found)} within 15 %; numbers are multiples of one thread"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="measured rows, JSON")
    parser.add_argument("--repeats", type=int, default=7, help="rounds of measuring the layers")
    parser.add_argument("--out", type=Path, help="write the comparison as JSON as well")
    given = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    rows = json.loads(given.rows.read_text())
    rows = rows if isinstance(rows, list) else rows["rows"]
    names = {row["workload"] for row in rows}
    cases = {one.name: case(one, given.repeats) for one in workloads(None) if one.name in names}
    for name, one in cases.items():
        print(f"{name}: two processes take {one.contention:.3f} times as long as one", flush=True)
    found = compare(rows, cases, links())
    print(shown(found))
    if given.out:
        given.out.write_text(json.dumps([{**asdict(each), "error": each.error} for each in found], indent=1))


if __name__ == "__main__":
    main()
