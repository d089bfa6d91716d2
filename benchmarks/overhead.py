"""Time per step of BlockProp (exact form, default executor) beside a hand-written autograd loop, on one thread.

Every contender has a copy of the model of its own; they take single steps in turn, in one process, and the
ratios are of steps of the same round. The whole is repeated in fresh processes.
"""

import copy
import time
from typing import Any

import torch

from benchmarks.measure import (
    MLP3,
    RESNET,
    Spread,
    Worker,
    algorithm_step,
    arguments,
    cut,
    interleaved,
    plain_step,
    publish,
    ratios,
    serve,
    table,
    timed,
)

TARGET = 1.05
CUTS = (2, 4)
WARM_UP = 3
WORKLOADS = {"mlp3": (MLP3, 120), "resnet18": (RESNET, 10)}  # with the rounds of a process


def measure(name: str, rounds: int) -> dict[str, list[float]]:
    """Seconds per step of every contender in every round; under "cpu NAME", the processor's."""
    torch.set_num_threads(1)
    model, inputs, targets = WORKLOADS[name][0].make()
    steps = {"plain": plain_step(copy.deepcopy(model), inputs, targets)}
    for blocks in CUTS:
        own = copy.deepcopy(model)
        steps[f"plain {blocks}"] = plain_step(own, inputs, targets, cut(own, blocks, inputs))
    for kind in ("backprop", "blockprop"):
        for blocks in CUTS:
            steps[f"{kind} {blocks}"] = algorithm_step(kind, model, blocks, inputs, targets)
    processor: dict[str, list[float]] = {f"cpu {key}": [] for key in steps}

    def clock(key: str) -> float:
        start = time.process_time()
        seconds = timed(steps[key])
        processor[f"cpu {key}"].append(time.process_time() - start)
        return seconds

    clocks = {key: (lambda key=key: clock(key)) for key in steps}
    interleaved(clocks, WARM_UP)
    seconds = interleaved(clocks, rounds)
    return {**seconds, **{key: found[WARM_UP:] for key, found in processor.items()}}


def compared(runs: list[dict[str, list[float]]]) -> dict[str, Any]:
    """Ratios to the plain loop, and BlockProp's to `Backprop`'s, over all rounds of all processes."""
    pooled = {key: [value for run in runs for value in run[key]] for key in runs[0]}
    found: dict[str, Any] = {"plain, ms": Spread.of([1e3 * value for value in pooled["plain"]])}
    for blocks in CUTS:
        ours, theirs = f"blockprop {blocks}", f"backprop {blocks}"
        found[f"K={blocks}"] = {
            "blockprop / plain": ratios(pooled[ours], pooled["plain"]),
            "medians of the processes": [ratios(run[ours], run["plain"]).median for run in runs],
            "blockprop / plain, processor time": ratios(pooled[f"cpu {ours}"], pooled["cpu plain"]),
            "plain, an SGD a block / plain": ratios(pooled[f"plain {blocks}"], pooled["plain"]),
            "Backprop / plain": ratios(pooled[theirs], pooled["plain"]),
            "blockprop / Backprop": ratios(pooled[ours], pooled[theirs]),
        }
    return found


def main() -> None:
    given = arguments(__doc__)
    if given.worker:
        serve(lambda _: measure(**given.worker))
        return
    processes, share = (1, 5) if given.quick else (3, 1)
    data, rows = {}, []
    for name, (workload, rounds) in WORKLOADS.items():
        runs = []
        for _ in range(processes):
            worker = Worker("benchmarks.overhead", {"name": name, "rounds": max(5, rounds // share)})
            runs.append(worker.ask("measure"))
            worker.close()
        data[workload.title] = found = compared(runs)
        for blocks in CUTS:
            of_cut = found[f"K={blocks}"]
            medians = of_cut["medians of the processes"]
            rows.append(
                [
                    workload.title,
                    blocks,
                    f"{found['plain, ms'].median:.1f}",
                    of_cut["blockprop / plain"],
                    f"{min(medians):.3f} to {max(medians):.3f}",
                    of_cut["blockprop / plain, processor time"],
                    of_cut["plain, an SGD a block / plain"],
                    of_cut["Backprop / plain"],
                    of_cut["blockprop / Backprop"],
                    "yes" if of_cut["blockprop / plain"].median <= TARGET else "no",
                ]
            )
    head = ["workload", "K", "plain, ms", "BlockProp / plain", "of which medians of the processes"]
    head += [
        "the same in processor time",
        "plain, an SGD a block / plain",
        "Backprop / plain",
        "BlockProp / Backprop",
        f"at most {TARGET}",
    ]
    body = [
        "Time per training step on one thread, as a ratio to a hand-written autograd loop (`loss.backward()`, one "
        "SGD). `BlockProp` is the exact form with the default executor, `Backprop` is this library's baseline; both "
        "have one SGD per block, and report the loss.",
        table(head, rows),
        f"Median of the ratios of steps taken in the same round (lower to upper quartile); {processes} fresh "
        "processes, one warmed-up round-robin of single steps in each, the order turned every round. Random inputs. "
        "The machine is shared and noisy: wall-clock time unless said; processor time leaves out waiting for a core.",
    ]
    publish("overhead", given, "Overhead of BlockProp over plain autograd", body, data)


if __name__ == "__main__":
    main()
