"""BlockProp beside torch's pipelines and data parallelism: samples/s, and time to backprop's quality.

Every method in turn, round after round, on loopback and over an emulated slow link, which needs root, gcc and iproute2.
A workload on a link that is finished is not measured again.
"""

import argparse
import json
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.pipelines import costs, report, training
from benchmarks.pipelines.bench import Bench, Extent
from benchmarks.pipelines.link import SPEEDS, Link, LinkError, Speed
from benchmarks.pipelines.methods import BASE, Own, Peer, all_peers, own
from benchmarks.pipelines.processes import FailedError
from benchmarks.pipelines.workloads import Workload, workloads

QUICK_LINKS = ("loopback", "slow")
QUICK_CURVES = ("mlp3",)
"""With `--quick`, these alone are trained to quality, and measured over a slow link."""

_STARTED = time.monotonic()


def say(text: str) -> None:
    """Tell how far it is."""
    print(f"{time.monotonic() - _STARTED:6.0f} s  {text}", file=sys.stderr, flush=True)


def wants(name: str, methods: Sequence[str] | None) -> bool:
    """Whether a method is asked for: by the beginning of its name, in any case."""
    return not methods or any(name.lower().startswith(one.lower()) for one in methods)


class Results:
    """What is known so far, in `results.json`.

    Args:
        out: the folder.
        quick: whether it is of a quick run; the two are not mixed.

    Raises:
        ValueError: the folder is of the other kind.
    """

    def __init__(self, out: Path, *, quick: bool) -> None:
        self.out = out
        path = out / "results.json"
        empty: dict[str, Any] = {"quick": quick, "facts": {}, "verified": {}, "quality": {}, "groups": {}}
        self.known = {**empty, **(json.loads(path.read_text()) if path.exists() else {})}
        if self.known["quick"] != quick:
            raise ValueError(f"{path} is of a {'full' if quick else 'quick'} run; name another --out")


def measure(workload: Workload, speeds: Sequence[Speed], results: Results, given: argparse.Namespace) -> None:
    """All that is missing of a workload."""
    known = results.known
    extent = Extent(given.rounds or (2 if given.quick else 3), 0.7 if given.quick else 4.0, given.seeds)
    with Bench(workload, extent, say) as bench:
        known["facts"][workload.name] = {**bench.facts, "cut": workload.cut, "batch": workload.batch}
        check(bench, results, given)
        curves = not given.no_curves and (not given.quick or workload.name in QUICK_CURVES)
        if curves and workload.name not in known["quality"]:
            try:
                known["quality"][workload.name] = quality(bench)
            except FailedError as error:
                say(f"{workload.name}: backprop's own curves failed, so there is no quality: {error}")
        for speed in speeds:
            if given.quick and speed.mbit and workload.name not in QUICK_CURVES and not given.links:
                continue
            group = known["groups"].setdefault(f"{workload.name}/{speed.name}", {})
            group.pop("skipped", None)
            try:
                with Link(speed) as link:
                    on_link(bench, link, group, results, given)
                if link.carried and link.carried.megabytes > 1:  # less where nothing was missing
                    group["link"] = link.carried._asdict()
            except LinkError as error:
                say(f"{workload.name}, {speed.title}: {error}")
                group["skipped"] = str(error)
            finish(results, given)


def check(bench: Bench, results: Results, given: argparse.Namespace) -> None:
    """Once for every schedule: is its gradient backprop's?"""
    found = results.known["verified"].setdefault(bench.workload.name, {})
    for peer in all_peers(bench.workload, bench.facts, linked=True, quick=given.quick):
        if (
            peer.ranks == 2
            and peer.learning == "backprop"
            and peer.name not in found
            and wants(peer.name, given.methods)
        ):
            try:
                found[peer.name] = bench.verify(peer)
            except FailedError as error:
                found[peer.name] = f"failed: {str(error).splitlines()[0]}"


def quality(bench: Bench) -> dict[str, Any]:
    """Q, and backprop's examples to it."""
    level, examples = bench.level(bench.backprop_curves())
    return {"level": level, "examples": examples}


def on_link(bench: Bench, link: Link, group: dict[str, Any], results: Results, given: argparse.Namespace) -> None:
    """The rows of a workload on a link that are not there yet."""
    linked = bool(link.speed.mbit)
    rows = group.setdefault("rows", {})
    peers: list[Peer] = all_peers(bench.workload, bench.facts, linked=linked, quick=given.quick)
    ours: list[Own] = own(bench.workload, linked=linked, quick=given.quick)
    asked = [one for one in (*peers, *ours) if wants(one.name, given.methods)]
    missing = [one for one in asked if given.again or "ratio" not in rows.get(one.name, {})]
    lacks = training.missing() if any(isinstance(one, Own) for one in missing) else None
    if lacks:
        for one in (one for one in missing if isinstance(one, Own)):
            rows[one.name] = {
                "workload": bench.workload.name,
                "link": link.speed.name,
                "method": one.name,
                "failed": lacks,
            }
        missing = [one for one in missing if isinstance(one, Peer)]
    if missing:
        base = [one for one in peers if one.name == BASE and one not in missing]
        layers: list[costs.Costs] = []

        def first() -> None:
            if not given.quick:
                say(f"{bench.workload.name}: its layers")
                layers.append(costs.measured(bench.workload, repeats=3, seconds=4.0))

        fresh = bench.rounds(
            [*base, *(one for one in missing if isinstance(one, Peer))],
            [one for one in missing if isinstance(one, Own)],
            link,
            first,
        )
        beside = f"{bench.workload.name}, {link.speed.name}, {datetime.now(UTC):%Y-%m-%d %H:%M}"
        for name in (one.name for one in missing):
            made = report.row(bench.workload.name, link.speed.name, name, fresh[name])
            made |= {"costs": beside} if layers else {}
            rows[name] = report.with_quality_of(made, rows.get(name, {}))
        if layers:
            group.setdefault("costs", {})[beside] = costs.middle(layers).as_json()
        order = [one.name for one in (*peers, *ours)]
        group["rows"] = rows = {name: rows[name] for name in order if name in rows}
        told = {made.get("costs") for made in rows.values()}
        group["costs"] = {name: found for name, found in group.get("costs", {}).items() if name in told}
        group["measured"] = report.made_on()
        finish(results, given)
    wanted = results.known["quality"].get(bench.workload.name)
    if wanted is None or given.no_curves:
        return
    for one in asked:
        if "ratio" in rows.get(one.name, {}) and "examples" not in rows[one.name]:
            rows[one.name] = judged(bench, one, rows[one.name], link, wanted, results)
            finish(results, given)


def judged(
    bench: Bench, one: Peer | Own, made: report.Row, link: Link, wanted: dict[str, Any], results: Results
) -> report.Row:
    """A row with its examples and time to quality: known, or trained now."""
    if isinstance(one, Own):
        # in lock-step the numbers do not depend on the link
        alike = results.known["groups"].get(f"{bench.workload.name}/loopback", {}).get("rows", {}).get(one.name, {})
        if one.policy == "lock-step" and alike.get("examples"):
            return report.with_quality(made, [float("inf") if seen is None else seen for seen in alike["examples"]])
        try:
            examples = bench.own_examples(one, link, wanted["level"])
        except FailedError as error:
            return {**made, "quality_failed": str(error).splitlines()[0]}
        return report.with_quality(made, [seen / wanted["examples"] for seen in examples])
    if one.learning == "large batch":
        if "large" not in wanted:
            lr, large = bench.large_batch(wanted["level"])
            wanted |= {"large_lr": lr, "large": [seen / wanted["examples"] for seen in large]}
        return report.with_quality({**made, "lr": wanted["large_lr"]}, wanted["large"])
    if one.learning == "backprop":
        return report.with_quality(made, [1.0], "≈" if bench.workload.batch_norm and one.ranks > 1 else "=")
    return made


def finish(results: Results, given: argparse.Namespace) -> None:
    """Write what is known."""
    titles = {one.name: one.title for one in workloads(None, quick=given.quick)}
    report.write(results.known, titles, results.out, given.command)


def parsed() -> argparse.Namespace:
    """The command line."""
    names, links = [one.name for one in workloads(None)], [one.name for one in SPEEDS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the shape of the table in minutes, not to quote")
    parser.add_argument("--data-dir", type=Path, help="folder with the data's published files")
    parser.add_argument("--out", type=Path, help="default: studies/pipelines, with --quick studies/pipelines-quick")
    parser.add_argument("--workloads", nargs="+", choices=names, help="default: all")
    parser.add_argument(
        "--methods", nargs="+", metavar="NAME", help="beginnings of their names, such as DDP; default: all"
    )
    parser.add_argument("--links", nargs="+", choices=links, help="default: all; with --quick without the fast one")
    parser.add_argument("--rounds", type=int, help="default: 3, with --quick 2")
    parser.add_argument("--seeds", type=int, nargs="+", help="of the curves; default: 0 1 2, with --quick 0")
    parser.add_argument("--again", action="store_true", help="measure speed anew where it is known; curves stay")
    parser.add_argument("--no-curves", action="store_true", help="speed alone: train nothing to quality")
    given = parser.parse_args()
    given.command = shlex.join(["python", "-m", "benchmarks.pipelines", *_told_apart(sys.argv[1:])])
    given.seeds = tuple(given.seeds or ((0,) if given.quick else (0, 1, 2)))
    given.out = given.out or Path("studies", "pipelines-quick" if given.quick else "pipelines")
    return given


def _told_apart(typed: Sequence[str]) -> list[str]:
    """The command line without the machine's own paths."""
    found, skip = [], False
    for word in typed:
        if not skip and word not in ("--data-dir", "--out") and not word.startswith(("--data-dir=", "--out=")):
            found.append(word)
        skip = word in ("--data-dir", "--out")
    return found


def main() -> None:
    given = parsed()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        results = Results(given.out, quick=given.quick)
    except ValueError as error:
        sys.exit(f"benchmarks.pipelines: {error}")
    speeds = [one for one in SPEEDS if one.name in (given.links or (QUICK_LINKS if given.quick else [one.name]))]
    for workload in workloads(given.data_dir and given.data_dir.resolve(), quick=given.quick):
        if not given.workloads or workload.name in given.workloads:
            measure(workload, speeds, results, given)
    finish(results, given)
    print((given.out / "README.md").read_text())
    say(f"results.json, README.md and pipelines.png: {given.out}")


if __name__ == "__main__":
    main()
