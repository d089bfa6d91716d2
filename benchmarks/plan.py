"""The planner's predictions beside what was measured on two processes of this machine.

    python -m benchmarks.plan RESULTS.json

RESULTS.json is what `python -m benchmarks.pipelines` leaves. It has the costs of the layers, and what two processes
lose to each other, beside the rows that were measured with them. Of rows without, both are measured here and now.
"""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

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
        flag = "" if abs(each.error) <= 0.15 else "  above 15 %"
        lines.append(
            f"{each.workload:10}{each.link:10}{each.method:36}{each.measured:9.2f}{each.predicted:10.2f}"
            f"{each.error:+9.0%}{flag}"
        )
    within = sum(abs(each.error) <= 0.15 for each in found)
    return "\n".join([*lines, f"{within} of {len(found)} within 15 %; numbers are multiples of one thread"])


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
    if given.out:
        given.out.write_text(json.dumps([{**asdict(each), "error": each.error} for each in found], indent=1))


if __name__ == "__main__":
    main()
