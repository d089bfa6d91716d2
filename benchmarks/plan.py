"""The planner's predictions beside what was measured on two processes of this machine.

    python -m benchmarks.plan RESULTS.json

RESULTS.json is what `python -m benchmarks.pipelines` leaves. It has the costs of the layers, and what two processes
lose to each other, beside the rows that were measured with them. Of rows without, both are measured here and now.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.measure import table
from benchmarks.pipelines.costs import Costs, measured
from benchmarks.pipelines.link import SPEEDS
from benchmarks.pipelines.workloads import workloads
from blockprop.planning.cluster import LOOPBACK, Link
from blockprop.planning.comparison import Comparison, compare

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


def shown(found: list[Comparison]) -> str:
    """The table: multiples of one thread, and the error of the prediction."""
    lines = [f"{'workload':10}{'link':10}{'method':36}{'measured':>9}{'predicted':>10}{'error':>9}"]
    for each in found:
        flag = "" if near(each) else "  above 15 %"
        lines.append(
            f"{each.workload:10}{each.link:10}{each.method:36}{each.measured:9.2f}{each.predicted:10.2f}"
            f"{each.error:+9.0%}{flag}"
        )
    return "\n".join([*lines, f"{counted(found)} within 15 %; numbers are multiples of one thread"])


def near(each: Comparison) -> bool:
    """Whether the prediction is within 15 %."""
    return abs(each.error) <= 0.15


def counted(found: Sequence[Comparison]) -> str:
    """How many predictions are."""
    return f"{sum(map(near, found))} of {len(found)}"


def kind(method: str) -> str:
    """What a row counts to."""
    if method.startswith("BlockProp"):
        return f"BlockProp {'with' if 'microbatches' in method else 'without'} microbatches"
    return method.split(",", maxsplit=1)[0]


def by_kind(found: Sequence[Comparison]) -> str:
    """How many predictions are within 15 %, by kind of method and by link."""
    kinds, places = (dict.fromkeys(map(of, found)) for of in (lambda one: kind(one.method), lambda one: one.link))
    rows = [
        [name, *(counted([one for one in found if (kind(one.method), one.link) == (name, link)]) for link in places)]
        for name in kinds
    ]
    return table(["within 15 %", *places], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="results.json of the pipelines benchmark")
    parser.add_argument("--repeats", type=int, default=7, help="rounds of measuring layers, where that is to be done")
    parser.add_argument("--again", action="store_true", help="measure all layers here and now")
    parser.add_argument("--out", type=Path, help="write the comparison as JSON as well")
    given = parser.parse_args()
    results = json.loads(given.results.read_text())
    rows = [{**row, "costs": None} if given.again else row for row in results["rows"]]
    known = {one.name: one for one in workloads(None)}
    cases = {
        beside: Costs.of_json(found).case(known[key.partition("/")[0]])
        for key, group in results["groups"].items()
        for beside, found in group.get("costs", {}).items()
    }
    for name in dict.fromkeys(row["workload"] for row in rows if row.get("costs") not in cases):
        cases[name] = measured(known[name], given.repeats, 12.0).case(known[name])
        print(f"{name}: layers measured now, two processes take {cases[name].contention:.3f} times as long as one")
    found = compare(rows, cases, links())
    print(shown(found))
    print(by_kind(found))
    beside = {(row["workload"], row["method"], row["link"]) for row in rows if row.get("costs") in cases}
    those = [one for one in found if (one.workload, one.method, one.link) in beside]
    print(f"of those whose layers were measured beside them {counted(those)}")
    if given.out:
        given.out.write_text(json.dumps([{**asdict(each), "error": each.error} for each in found], indent=1))


if __name__ == "__main__":
    main()
