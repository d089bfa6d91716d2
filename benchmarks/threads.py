"""What W-steps in parallel threads gain on two cores, beside autograd's own two threads.

Every configuration has a process of its own; they work in turn, never at the same time.
"""

from typing import Any

import torch

from benchmarks.measure import (
    MLP3,
    MLP8,
    RESNET,
    Spread,
    Worker,
    algorithm_step,
    arguments,
    interleaved,
    plain_step,
    publish,
    ratios,
    serve,
    table,
    timed,
)

CUTS = (2, 4)
WORKLOADS = {"mlp3": (MLP3, 10), "mlp8": (MLP8, 5), "resnet18": (RESNET, 1)}  # with the steps of a turn
BASE = "plain, 1 thread"


def configurations() -> dict[str, dict[str, Any]]:
    """Everything that is compared: executor, K and the calling thread's intra-op threads."""
    found: dict[str, dict[str, Any]] = {f"plain, {n} thread{'s' * (n > 1)}": {"threads": n} for n in (1, 2)}
    for blocks in CUTS:
        for executor in ("local", "threads"):
            for n in (1, 2):
                label = f"K={blocks}, executor={executor!r}, {n} thread{'s' * (n > 1)}"
                found[label] = {"threads": n, "executor": executor, "blocks": blocks}
    return found


def work(settings: dict[str, Any]) -> None:
    """The worker: answers a number of steps with the seconds of each."""
    torch.set_num_threads(settings["threads"])
    model, inputs, targets = WORKLOADS[settings["workload"]][0].make()
    if "executor" in settings:
        step = algorithm_step("blockprop", model, settings["blocks"], inputs, targets, executor=settings["executor"])
    else:
        step = plain_step(model, inputs, targets)
    serve(lambda steps: timed(step, steps))


def of_workload(name: str, rounds: int) -> dict[str, list[float]]:
    """Seconds per step of every configuration in every round."""
    workers = {
        label: Worker("benchmarks.threads", {"workload": name, **settings})
        for label, settings in configurations().items()
    }
    steps = WORKLOADS[name][1]
    clocks = {label: (lambda worker=worker: worker.ask(steps)) for label, worker in workers.items()}
    interleaved(clocks, 1)
    seconds = interleaved(clocks, rounds)
    for worker in workers.values():
        worker.close()
    return seconds


def section(title: str, seconds: dict[str, list[float]]) -> tuple[list[str], dict[str, Any]]:
    """A workload's part of the page, and its data: speeds relative to one thread of plain autograd and of `local`."""
    rows, data = [], {}
    for label, found in seconds.items():
        blocks = label.split(",")[0]
        local = f"{blocks}, executor='local', 1 thread"
        data[label] = {"ms": Spread.of([1e3 * value for value in found])}
        data[label]["speed of plain"] = ratios(seconds[BASE], found)
        if local in seconds:
            data[label]["speed of local"] = ratios(seconds[local], found)
            data[label]["speed of plain, 2 threads"] = ratios(seconds["plain, 2 threads"], found)
        rows.append(
            [
                label,
                f"{data[label]['ms'].median:.1f}",
                data[label]["speed of plain"],
                data[label].get("speed of local", ""),
                data[label].get("speed of plain, 2 threads", ""),
            ]
        )
    head = ["", "ms", "speed over plain, 1 thread", "over local, same K, 1 thread", "over plain, 2 threads"]
    return [f"## {title}", table(head, rows)], data


def main() -> None:
    given = arguments(__doc__)
    if given.worker:
        work(given.worker)
        return
    rounds = 3 if given.quick else 7
    body = [
        'One training step of the exact form with one block\'s W-step per thread (`executor="threads"`), beside the '
        'same blocks in turn (`local`) and a hand-written autograd loop. Above 1 is faster. "Threads" are the '
        "intra-op threads of the calling thread (`torch.set_num_threads`); W-steps in the pool have one each.",
    ]
    data = {}
    for name, (workload, _) in WORKLOADS.items():
        lines, data[workload.title] = section(workload.title, of_workload(name, rounds))
        body += lines
    body.append(
        f"Medians (quartiles) of ratios within {rounds} rounds; in a round each configuration's process takes "
        f"{', '.join(f'{steps} steps ({name})' for name, (_, steps) in WORKLOADS.items())} in its turn, the order "
        "turned every round; one round of warm-up. Random inputs; the machine is shared and noisy. The parallel "
        "W-steps need a backward pass of their own, so their executor has more to do in all."
    )
    publish("threads", given, "What parallel W-steps gain", body, data)


if __name__ == "__main__":
    main()
