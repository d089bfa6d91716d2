"""Predict what every method reaches on a cluster: the cut, samples per second, and how busy each device is."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from blockprop.planning import methods
from blockprop.planning.cluster import Cluster, Link
from blockprop.planning.costs import Layer
from blockprop.planning.events import Program, simulate
from blockprop.planning.methods import Block
from blockprop.planning.partition import partition
from blockprop.schedules import delay

__all__ = ["METHODS", "SYNCHRONOUS", "Prediction", "Setting", "all_reduce", "no_faster", "plan"]

Cut = Sequence[int] | None
BUCKET, FIRST_BUCKET = 25 * 2**20, 2**20  # bytes of gradients that DDP sums up at a time
SEGMENT = 2**20  # bytes that gloo's ring passes on at a time


@dataclass(frozen=True)
class Setting:
    """How the methods train.

    Args:
        batch_size: examples of a batch, over all devices together.
        microbatches: M of GPipe, 1F1B and zero bubble; default 4.
        parts: M of BlockProp's pipelines; default 1.
        refresh: E, of the cached method every E-th epoch has feedback; default 2.
        in_flight: free-running, cached: microbatches that a block may have on their way for each block above it;
            default 2.

    Raises:
        ValueError: a number below 1, or more parts than examples.
    """

    batch_size: int
    microbatches: int = 4
    parts: int = 1
    refresh: int = 2
    in_flight: int = 2

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name.replace('_', ' ')} is {value}; expected a whole number of at least 1")
        for name in ("microbatches", "parts"):
            if getattr(self, name) > self.batch_size:
                raise ValueError(
                    f"cannot cut {self.batch_size} examples into {getattr(self, name)} {name}; expected at most "
                    f"{self.batch_size}"
                )


@dataclass(frozen=True)
class Prediction:
    """What a method reaches.

    Attributes:
        method: its name, one of `METHODS`.
        samples_per_second: examples that every block has learnt from, per second.
        busy: share of the time that each device computes.
        cut: the number of the layer that each block begins with, bottom first; (0,) for an uncut network. Zero bubble
            has two blocks a device where there are layers enough: 1 and 2K on the first, 2 and 2K - 1 on the second.
    """

    method: str
    samples_per_second: float
    busy: tuple[float, ...]
    cut: tuple[int, ...]


def plan(
    layers: Sequence[Layer],
    cluster: Cluster,
    setting: Setting,
    only: Sequence[str] | None = None,
    cut: Sequence[int] | None = None,
) -> list[Prediction]:
    """Predict every method, each with the cut that suits its own arithmetic.

    Args:
        layers: their costs, bottom first, as [`measure_layers`][blockprop.planning.costs.measure_layers] gives them.
        cluster: devices and links; K devices, K blocks.
        setting: batch, microbatches and so on.
        only: names of methods, default all of `METHODS`.
        cut: the number of the layer that each block begins with, if it is not to be chosen.

    Raises:
        ValueError: more devices than layers, an unknown method, or a cut of another length.

    >>> from blockprop.planning.cluster import Link
    >>> from blockprop.planning.costs import Passes
    >>> layer = Layer("a", {8: Passes(1, 2, 1, 1)}, 0, 1000, 0)
    >>> found = plan([layer] * 8, Cluster((1, 1), Link(1e6)), Setting(8), ["one device", "gpipe"])
    >>> [round(each.samples_per_second, 3) for each in found]
    [0.348, 0.542]
    """
    names = METHODS if only is None else only
    for name in names:
        if name not in METHODS:
            raise ValueError(f"unknown method {name!r}; expected one of {', '.join(METHODS)}")
    if cut is not None and (cut[0] != 0 or any(a >= b for a, b in pairwise([*cut, len(layers)]))):
        raise ValueError(f"the cut is {list(cut)}; expected rising numbers of layers, from 0 to below {len(layers)}")
    return [_METHODS[name](layers, cluster, setting, name, cut) for name in names]


def no_faster(layers: Sequence[Layer], cluster: Cluster, setting: Setting) -> float:
    """Samples per second that no method of `SYNCHRONOUS` exceeds: a microbatch goes up and down once in every batch.

    Args:
        layers: their costs.
        cluster: devices and links.
        setting: batch and microbatches.
    """
    examples = setting.batch_size / setting.microbatches
    passes = [layer.at(examples) for layer in layers]
    work = sum(each.forward for each in passes) + sum(each.input_gradient for each in passes[1:])
    message = cluster.link.seconds(examples * min(layer.output_bytes for layer in layers))
    return setting.batch_size / (work / max(cluster.speeds) + 2 * (len(cluster) - 1) * message)


def _one_device(layers: Sequence[Layer], cluster: Cluster, setting: Setting, name: str, _: Cut) -> Prediction:
    block = Block.of(layers, setting.batch_size, bottom=True)
    seconds = (block.forward + block.backward + block.update) / max(cluster.speeds)
    fastest = cluster.speeds.index(max(cluster.speeds))
    busy = tuple(float(k == fastest) for k in range(len(cluster)))
    return Prediction(name, setting.batch_size / seconds, busy, (0,))


def _data_parallel(layers: Sequence[Layer], cluster: Cluster, setting: Setting, name: str, _: Cut) -> Prediction:
    """Each of R devices takes its share of the batch; gradients are summed up in buckets while the backward goes on.

    Each byte is also copied into the bucket and back and added up, which takes the processor as long as an update each;
    and what is sent and received is copied.
    """
    ranks = min(len(cluster), setting.batch_size)
    speeds = sorted(cluster.speeds, reverse=True)[:ranks]
    shares = [setting.batch_size // ranks + (r < setting.batch_size % ranks) for r in range(ranks)]
    slower = cluster.contention if ranks > 1 else 1.0
    moved = 2.0 + (ranks - 1) / ranks if ranks > 1 else 0.0
    sent = 2 * (ranks - 1) / ranks * sum(layer.weight_bytes for layer in layers)
    talk = 2 * cluster.link.copying * sent / 1e9  # as much is received; copying is in ms a MB

    def clock(speed: float, share: int) -> tuple[list[float], float]:
        """When the gradients of each layer are there, top first; and the seconds after the last all-reduce."""
        pace = slower / speed
        passes = [layer.at(share) for layer in layers]
        now = pace * sum(each.forward for each in passes)
        ready = []
        for index, each in reversed(list(enumerate(passes))):
            now += pace * (each.backward if index else each.weight_gradient)
            ready.append(now)
        return ready, pace * (1 + moved) * sum(layer.update for layer in layers) + talk

    kinds = list(zip(speeds, shares, strict=True))
    clocks = {kind: clock(*kind) for kind in set(kinds)}
    ready = [max(times) for times in zip(*(times for times, _ in clocks.values()), strict=True)]
    done, size, room = 0.0, 0.0, float(FIRST_BUCKET)
    for index, layer in enumerate(reversed(layers)):
        size += layer.weight_bytes
        if ranks > 1 and (size >= room or index == len(layers) - 1):
            done = max(done, ready[index]) + all_reduce(size, ranks, cluster.link)
            size, room = 0.0, float(BUCKET)
    seconds = max(done, ready[-1]) + max(after for _, after in clocks.values())
    order = sorted(range(len(cluster)), key=lambda k: -cluster.speeds[k])
    of_device = {k: (clocks[kind][0][-1] + clocks[kind][1]) / seconds for k, kind in zip(order, kinds, strict=False)}
    shown = tuple(of_device.get(k, 0.0) for k in range(len(cluster)))
    return Prediction(name, setting.batch_size / seconds, shown, (0,))


def all_reduce(size: float, ranks: int, link: Link) -> float:
    """Seconds in which R devices sum up as many bytes; 2 (R - 1) / R of them go over every link.

    Two devices do it as gloo does, in a ring: each of R parts goes round twice, in two segments or more of at most
    1 MiB. Of two devices both send to the other at once. Two segments are on their way at a time; the next one is
    asked for when the first of them is there, and with two devices the question waits behind the other's own
    segment, so that the link is idle for a latency. More devices take that or 2 log2 R rounds of halving and
    doubling, whichever is faster.

    Args:
        size: bytes, above 0.
        ranks: R, at least 2.
        link: between any two.

    >>> all_reduce(1_000_000, 2, Link(bandwidth=8))
    1.0
    """
    parts = max(2, math.ceil(size / ranks / SEGMENT))
    segment = link.occupied(size / ranks / parts, both=ranks == 2) - link.overhead / 1e3
    latency = link.latency / 1e3
    each = segment + latency if ranks == 2 else max(segment, segment / 2 + latency)
    ring = 2 * (link.seconds(0.0) + latency + 2 * segment + (parts * (ranks - 1) - 2) * each)
    if ranks == 2:
        return ring
    wire = link.occupied(2 * (ranks - 1) / ranks * size, both=True) - link.overhead / 1e3
    return min(ring, wire + 2 * math.ceil(math.log2(ranks)) * link.seconds(0.0))


def _blocks(layers: Sequence[Layer], cut: Sequence[int], examples: float) -> list[Block]:
    return [Block.of(layers[start:end], examples, bottom=start == 0) for start, end in pairwise([*cut, len(layers)])]


def _cut(
    layers: Sequence[Layer],
    speeds: Sequence[float],
    cluster: Cluster,
    parts: int,
    examples: float,
    *,
    again: float = 0.0,
    spared: float = 0.0,
) -> list[int]:
    """The cut for batches of so many parts.

    `again` is the share of the batches that blocks below the top evaluate twice; `spared` is the share of those in
    which a block spares the gradient in its own input.
    """
    passes = [layer.at(examples) for layer in layers]
    below, top, inward = [], [], []
    for layer, each in zip(layers, passes, strict=True):
        once = parts * (each.forward + each.backward + layer.update)
        top.append(once)
        below.append(once + parts * again * each.forward)
        inward.append(spared * parts * max(0.0, each.backward - each.weight_gradient))
    inward[0] = parts * max(0.0, passes[0].backward - passes[0].weight_gradient)  # nobody is below the first
    inward = [min(value, cost) for value, cost in zip(inward, top, strict=True)]
    messages = [parts * cluster.link.occupied(layer.output_bytes * examples) for layer in layers]
    return partition(below, top, speeds, spared=inward, messages=messages)


def _synchronous(layers: Sequence[Layer], cluster: Cluster, setting: Setting, name: str, given: Cut) -> Prediction:
    """GPipe and 1F1B: between two updates, M microbatches up and down."""
    parts = setting.microbatches
    examples = setting.batch_size / parts
    cut = given or _cut(layers, cluster.speeds, cluster, parts, examples)
    make = methods.gpipe if name == "gpipe" else methods.one_f_one_b
    return _simulated(name, make(_blocks(layers, cut, examples), parts), cluster, setting, cut, 4)


def _zero_bubble(layers: Sequence[Layer], cluster: Cluster, setting: Setting, name: str, given: Cut) -> Prediction:
    parts = setting.microbatches
    examples = setting.batch_size / parts
    devices = len(cluster)
    speeds = [*cluster.speeds]
    if 1 < devices <= len(layers) // 2:
        speeds += speeds[::-1]
    cut = given or _cut(layers, speeds, cluster, parts, examples)
    programs = methods.zero_bubble(_blocks(layers, cut, examples), devices, parts)
    return _simulated(name, programs, cluster, setting, cut, 4)


def _lock_step(layers: Sequence[Layer], cluster: Cluster, setting: Setting, name: str, given: Cut) -> Prediction:
    examples, again = setting.batch_size / setting.parts, name != "blockprop stashed"
    share = min(1.0, delay(len(cluster), 1, setting.parts)) if again else 0.0  # of the first block, which has most
    cut = given or _cut(layers, cluster.speeds, cluster, setting.parts, examples, again=share)
    programs = methods.lock_step(_blocks(layers, cut, examples), setting.parts, again=again)
    return _simulated(name, programs, cluster, setting, cut, 24)


def _batches(cluster: Cluster, setting: Setting) -> int:
    """Batches of a simulation without ticks: past the first queue, and more where that is cheap.

    Devices take turns unevenly: for 16 of them the rate came out up to 8 % low with 26 batches, within 1 % with 126.
    """
    return 2 * max(setting.in_flight, methods.QUEUE) + 10 + min(150, 20_000 // len(cluster))


def _free_running(layers: Sequence[Layer], cluster: Cluster, setting: Setting, name: str, given: Cut) -> Prediction:
    examples = setting.batch_size / setting.parts
    # of the first block's microbatches, which has most on their way, so many are late
    share = min(1.0, delay(len(cluster), 1, setting.parts, in_flight=setting.in_flight))
    cut = given or _cut(layers, cluster.speeds, cluster, setting.parts, examples, again=share)
    programs = methods.free_running(_blocks(layers, cut, examples), setting.parts, setting.in_flight)
    return _simulated(name, programs, cluster, setting, cut, _batches(cluster, setting))


def _cached(layers: Sequence[Layer], cluster: Cluster, setting: Setting, name: str, given: Cut) -> Prediction:
    """The mean over E epochs: one free-running, the others on cached feedback, all at the same cut.

    Nobody evaluates a batch again.
    """
    examples, share = setting.batch_size / setting.parts, 1 / setting.refresh
    cut = given or _cut(layers, cluster.speeds, cluster, setting.parts, examples, spared=1 - share)
    blocks, batches = _blocks(layers, cut, examples), _batches(cluster, setting)
    refresh = methods.free_running(blocks, setting.parts, setting.in_flight, again=False)
    found = [_simulated(name, refresh, cluster, setting, cut, batches)]
    if share < 1:
        between = methods.streaming(blocks, setting.parts)
        found.append(_simulated(name, between, cluster, setting, cut, batches))
    # seconds an example, of each kind of epoch
    seconds = [w / each.samples_per_second for w, each in zip((share, 1 - share), found, strict=False)]
    total = sum(seconds)
    busy = tuple(
        sum(s * b for s, b in zip(seconds, of_device, strict=True)) / total
        for of_device in zip(*(each.busy for each in found), strict=True)
    )
    return Prediction(name, 1 / total, busy, tuple(cut))


def _simulated(
    name: str, programs: list[Program], cluster: Cluster, setting: Setting, cut: Sequence[int], batches: int
) -> Prediction:
    if len(programs) != len(cluster):
        raise ValueError(f"the cut makes {len(programs)} blocks; expected {len(cluster)}, one for each device")
    run = simulate(programs, cluster, batches)
    return Prediction(name, run.rate() * setting.batch_size, tuple(run.busy()), tuple(cut))


_METHODS: dict[str, Callable[[Sequence[Layer], Cluster, Setting, str, Cut], Prediction]] = {
    "one device": _one_device,
    "ddp": _data_parallel,
    "gpipe": _synchronous,
    "1f1b": _synchronous,
    "zero bubble": _zero_bubble,
    "blockprop lock-step": _lock_step,
    "blockprop stashed": _lock_step,
    "blockprop free-running": _free_running,
    "blockprop cached": _cached,
}

METHODS = tuple(_METHODS)
"""The names of the methods."""

SYNCHRONOUS = ("gpipe", "1f1b", "zero bubble")
"""Those of pipelines that run empty between two updates."""
