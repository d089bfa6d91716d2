"""What training costs: counted, timed, and predicted for a cluster."""

import json as json_text
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from rich.console import Console

from blockprop.experiments.cost import cost as cost_of
from blockprop.experiments.cost import record
from blockprop.experiments.cost import table as cost_table
from blockprop.experiments.plan import contention_of, costs_of
from blockprop.experiments.plan import record as plan_record
from blockprop.experiments.plan import table as plan_table
from blockprop.planning.allocator import keep_freed_memory
from blockprop.planning.cluster import Cluster, Link
from blockprop.planning.plan import Setting, plan
from blockprop.studies.drawing import require_matplotlib
from blockprop.studies.winners import draw, winners

__all__ = ["cost", "plan_command"]


def cost(
    model: Annotated[str, Parameter(help="mlp, resnet18, preact-resnet18 or gpt.")],
    *,
    width: Annotated[int | None, Parameter(help="Hidden units, channels or embedding size.")] = None,
    depth: Annotated[int | None, Parameter(help="Weight layers of an mlp, blocks of a gpt.")] = None,
    dropout: Annotated[float, Parameter(help="Share of activations dropped, in [0, 1).")] = 0.0,
    norm: Annotated[Literal["batch", "layer"] | None, Parameter(help="Normalisation of an mlp.")] = None,
    blocks: Annotated[int, Parameter(help="K, the number of blocks.")] = 2,
    h_steps: Annotated[int, Parameter(help="N_h, steps of the h-step.")] = 1,
    batch_size: Annotated[int, Parameter(help="Examples a step.")] = 64,
    context: Annotated[int, Parameter(help="Characters in an example of a gpt.")] = 64,
    repeats: Annotated[int, Parameter(help="Rounds of timing.")] = 7,
    json: Annotated[bool, Parameter(help="Print JSON instead of the table.", negative=())] = False,
) -> None:
    """Count and time what a training step costs in every form, beside backprop and Appendix A's bounds."""
    sizes = {"width": width, "depth": depth, "dropout": dropout, "norm": norm, "context": context}
    counts = {"blocks": blocks, "h_steps": h_steps, "batch_size": batch_size, "repeats": repeats}
    made, flops, seconds = cost_of(model, **sizes, **counts)  # type: ignore[arg-type]
    if json:
        print(json_text.dumps({"model": model, "batch_size": batch_size, **record(made, flops, seconds)}, indent=1))
        return
    title = f"{model}, K = {blocks}, batch of {batch_size}, N_h = {h_steps}: {made.cut}"
    Console(width=None if sys.stdout.isatty() else 120).print(cost_table(flops, seconds, title))


def plan_command(
    model: Annotated[str, Parameter(help="mlp, resnet18, preact-resnet18 or gpt.")],
    *,
    width: Annotated[int | None, Parameter(help="Hidden units, channels or embedding size.")] = None,
    depth: Annotated[int | None, Parameter(help="Weight layers of an mlp, blocks of a gpt.")] = None,
    context: Annotated[int, Parameter(help="Characters in an example of a gpt.")] = 64,
    batch_size: Annotated[int, Parameter(help="Examples of a batch, over all devices together.")] = 128,
    blocks: Annotated[int, Parameter(help="K, the number of blocks and devices.")] = 2,
    speeds: Annotated[
        tuple[float, ...],
        Parameter(
            help="Of the devices, relative to this one: K numbers, or one for all.", consume_multiple=True, negative=()
        ),
    ] = (1.0,),
    bandwidth: Annotated[float, Parameter(help="Of a link, each way, in Mbit/s.")] = 1000.0,
    latency: Annotated[float, Parameter(help="Of a link, one way, in ms.")] = 1.0,
    overhead: Annotated[float, Parameter(help="Of the software, a message, in ms; as measured.")] = 0.3,
    handling: Annotated[float, Parameter(help="Of the device at either end, a message, in ms; as measured.")] = 0.45,
    copying: Annotated[float, Parameter(help="The same for each MB of a message, in ms; as measured.")] = 0.28,
    duplex: Annotated[float, Parameter(help="Share of the bandwidth each way has while the other is busy.")] = 1.0,
    contention: Annotated[
        float | Literal["measured"],
        Parameter(help="How many times longer a device takes beside another one; measured: for two on this machine."),
    ] = 1.0,
    microbatches: Annotated[int, Parameter(help="Of GPipe, 1F1B and zero bubble.")] = 4,
    parts: Annotated[int, Parameter(help="Microbatches of BlockProp.")] = 1,
    refresh: Annotated[int, Parameter(help="E, BlockProp, cached: feedback in every E-th epoch.")] = 2,
    in_flight: Annotated[int, Parameter(help="Free-running: microbatches on their way for each block above.")] = 2,
    repeats: Annotated[int, Parameter(help="Rounds of timing.")] = 5,
    json: Annotated[bool, Parameter(help="Print JSON instead of the table.", negative=())] = False,
    plot: Annotated[
        Path | None,
        Parameter(help="Draw which method wins over bandwidth and K = 2, 4, ..., --blocks: a PNG and an SVG."),
    ] = None,
) -> None:
    """Predict how fast every method would train a model on a cluster, from costs measured here and a simulation."""
    if blocks < 1:
        raise ValueError(f"--blocks is {blocks}; expected a whole number of at least 1")
    if len(speeds) not in (1, blocks):
        raise ValueError(f"--speeds has {len(speeds)} numbers; expected one for all devices, or {blocks}")
    if plot is not None:
        require_matplotlib()
        _check_picture(plot)
    all_speeds = speeds * blocks if len(speeds) == 1 else speeds
    link = Link(bandwidth, latency, overhead, handling, copying, duplex)
    cluster = Cluster(all_speeds, link, 1.0 if contention == "measured" else contention)
    setting = Setting(batch_size, microbatches, parts, refresh, in_flight)
    sizes: dict[str, Any] = {"width": width, "depth": depth, "context": context, "batch_size": batch_size}
    keep_freed_memory()
    layers = costs_of(model, **sizes, repeats=repeats)
    if contention == "measured":
        cluster = replace(cluster, contention=contention_of(model, **sizes))
    found = plan(layers, cluster, setting)
    if json:
        print(json_text.dumps({"model": model, **plan_record(found, layers, cluster, setting)}, indent=1))
    else:
        title = (
            f"{model}, {len(layers)} layers, K = {blocks}, batch of {batch_size}, {bandwidth:g} Mbit/s, {latency:g} ms"
        )
        Console(width=None if sys.stdout.isatty() else 120).print(plan_table(found, layers, title))
    if plot is not None:
        title = f"{model}, {len(layers)} layers, batch of {batch_size}, latency {latency:g} ms"
        draw(winners(layers, cluster, setting), plot, title)


def _check_picture(path: Path) -> None:
    if path.suffix not in ("", ".png", ".svg"):
        raise ValueError(f"--plot is {path}; expected a name that ends in .png, .svg or nothing: both are made")
    for made in (path.with_suffix(".png"), path.with_suffix(".svg")):
        if made.exists():
            raise ValueError(f"{made} is there already; move it away, or name another --plot")
