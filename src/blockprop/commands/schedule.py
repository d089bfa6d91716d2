"""Schedules, shown."""

import itertools
from collections.abc import Iterator
from typing import Annotated, Literal

from cyclopts import Parameter

from blockprop import schedules

__all__ = ["schedule"]


def schedule(
    kind: Annotated[
        Literal["sequential", "parallel", "pipelined"],
        Parameter(help="sequential: Algorithm 1; parallel: Algorithm 2; pipelined: all busy, feedback late."),
    ] = "pipelined",
    *,
    blocks: Annotated[int, Parameter(help="K, the number of blocks.")] = 4,
    microbatches: Annotated[int, Parameter(help="Parts of a batch in the pipeline.")] = 1,
    latency: Annotated[int, Parameter(help="Every message takes up to so many ticks longer.")] = 0,
    latency_chances: Annotated[
        tuple[float, ...],
        Parameter(help="How likely delays of 0, 1, ... up to --latency ticks are.", consume_multiple=True),
    ] = (),
    lost: Annotated[float, Parameter(help="Share of the feedback messages that are lost.")] = 0.0,
    copies: Annotated[
        int | None, Parameter(help="How often feedback is sent, with the messages that follow. Default: 2 with --lost.")
    ] = None,
    seed: Annotated[int, Parameter(help="Of the random latency and losses.")] = 0,
    ticks: Annotated[int, Parameter(help="How many ticks to show.")] = 12,
    draw: Annotated[bool, Parameter(help="A timeline instead of a list.", negative=())] = False,
) -> None:
    """Show who does what when, and how late the feedback is."""
    if ticks < 1:
        raise ValueError(f"--ticks is {ticks}; expected a whole number of at least 1")
    if kind != "pipelined" and (microbatches, latency, latency_chances, lost, copies) != (1, 0, (), 0.0, None):
        raise ValueError(
            "--microbatches, --latency, --latency-chances, --lost and --copies are of the pipelined schedule: leave "
            "them out"
        )
    if copies is not None and not lost:
        raise ValueError("--copies has no effect without --lost: leave it out")

    def made() -> Iterator[schedules.Tick]:
        if kind == "pipelined":
            delay = schedules.Latency(latency, lost, seed, copies, latency_chances)
            return schedules.pipelined(blocks, microbatches=microbatches, latency=delay)
        return schedules.sequential(blocks) if kind == "sequential" else schedules.parallel(blocks)

    if draw:
        print(schedules.draw(made(), blocks, ticks))
    else:
        for now, tick in enumerate(itertools.islice(made(), ticks)):
            print(f"{now}:", ", ".join(f"{action} {batch} by {block}" for block, action, batch in tick))
    count = 200 * microbatches
    late = schedules.delays(made(), blocks, count)
    means = ", ".join(f"{sum(delay) / len(delay):.2g}" if delay else "-" for delay in late)
    print(f"updates between a block's forward and its backward, block 1 to {blocks}: {means}")
    if latency:
        busy = sum(action[:2] == (1, "forward") for tick in itertools.islice(made(), count) for action in tick)
        print(f"ticks in which the first block takes a batch in: {busy / count:.0%}")
