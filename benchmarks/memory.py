"""Peak memory and time of one training step: backprop, BlockProp, BlockProp with recompute, plain checkpointing.

Peak memory is the process's peak resident set during one step (VmHWM, set back by /proc/self/clear_refs just
before) above the resident set before it, in a fresh process in which only a step on a few examples was taken, so
that libraries are loaded. glibc is told to give memory back at once, so that what is resident is what is alive.
Time is measured in other processes, without that.
"""

import copy
import gc
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint_sequential

from benchmarks.measure import (
    Spread,
    Step,
    Worker,
    Workload,
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
from blockprop.models import mlp, resnet18

K = 4
TARGET = 0.55
MIB = 2**20
ENV = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
WORKLOADS = {
    "mlp": Workload("MLP 256-256x31-10, batch 8192", lambda: mlp(256, 10, width=256, depth=32), (256,), 8192),
    "resnet18": Workload("resnet18(width=16), 3x32x32, batch 256", lambda: resnet18(width=16), (3, 32, 32), 256),
}
CONTENDERS = {
    "backprop": "Backprop",
    "blockprop": "BlockProp",
    "recompute": "BlockProp(recompute=True)",
    "checkpoint": "plain loop, checkpoint_sequential",
}


class _Checkpointed(nn.Module):
    """The blocks as checkpointed segments of a plain network."""

    def __init__(self, model: nn.Sequential, sample: Tensor) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*cut(model, K, sample))

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = checkpoint_sequential(self.blocks, K, inputs, use_reentrant=False)
        return output


def step_of(contender: str, model: nn.Sequential, inputs: Tensor, targets: Tensor) -> Step:
    """One step of a contender; it holds a copy of the model."""
    if contender == "checkpoint":
        return plain_step(_Checkpointed(copy.deepcopy(model), inputs), inputs, targets)
    if contender == "backprop":
        return algorithm_step("backprop", model, K, inputs, targets)
    return algorithm_step("blockprop", model, K, inputs, targets, recompute=contender == "recompute")


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def peak(contender: str, workload: Workload) -> int:
    """Bytes by which a step's peak exceeds what was there before it."""
    model, inputs, targets = workload.make(8)
    step_of(contender, model, inputs, targets)()
    model, inputs, targets = workload.make()
    step = step_of(contender, model, inputs, targets)
    gc.collect()
    baseline = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    step()
    return _resident("VmHWM") - baseline


def activation_bytes(workload: Workload) -> list[int]:
    """Bytes that autograd keeps of every block's forward pass, weights aside."""
    model, inputs, _ = workload.make()
    found = []
    h = inputs
    for block in cut(model, K, inputs):
        weights = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
        kept: dict[int, Tensor] = {}

        def keep(tensor: Tensor, kept: dict[int, Tensor] = kept, weights: set[int] = weights) -> Tensor:
            pointer = tensor.untyped_storage().data_ptr()
            if pointer not in weights:
                kept[pointer] = tensor  # held, so that no other storage gets the same address
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = block(h.detach().requires_grad_())
        found.append(sum(tensor.untyped_storage().nbytes() for tensor in kept.values()))
        h = output.detach()
    return found


def work(settings: dict[str, Any]) -> None:
    """The worker: answers "peak", and a number of steps with the seconds of each."""
    torch.set_num_threads(1)
    workload = WORKLOADS[settings["workload"]]
    if settings["what"] == "peak":
        serve(lambda _: peak(settings["contender"], workload))
        return
    step = step_of(settings["contender"], *workload.make())
    step()
    serve(lambda steps: timed(step, steps))


def of_workload(name: str, repeats: int, rounds: int) -> dict[str, Any]:
    """Peaks, times and the sizes they are to be judged by."""
    peaks: dict[str, list[int]] = {contender: [] for contender in CONTENDERS}
    for _ in range(repeats):
        for contender, found in peaks.items():
            worker = Worker("benchmarks.memory", {"workload": name, "contender": contender, "what": "peak"}, ENV)
            found.append(worker.ask("peak"))
            worker.close()
    workers = {
        contender: Worker("benchmarks.memory", {"workload": name, "contender": contender, "what": "time"})
        for contender in CONTENDERS
    }
    for worker in workers.values():
        worker.ask(1)
    seconds = interleaved({key: (lambda worker=worker: worker.ask(1)) for key, worker in workers.items()}, rounds)
    for worker in workers.values():
        worker.close()
    model = WORKLOADS[name].make(2)[0]
    return {
        "weights": sum(parameter.nbytes for parameter in model.parameters()),
        "activations": activation_bytes(WORKLOADS[name]),
        "peaks": peaks,
        "seconds": {contender: Spread.of(found) for contender, found in seconds.items()},
        "time ratios": {contender: ratios(found, seconds["backprop"]) for contender, found in seconds.items()},
    }


def section(title: str, found: dict[str, Any]) -> list[str]:
    """A workload's part of the page."""
    base = statistics.median(found["peaks"]["backprop"])
    weights, activations = found["weights"], found["activations"]
    rows = []
    for contender, label in CONTENDERS.items():
        peaks = found["peaks"][contender]
        middle = statistics.median(peaks)
        rows.append(
            [
                label,
                f"{middle / MIB:.1f} ({min(peaks) / MIB:.1f} to {max(peaks) / MIB:.1f})",
                f"{middle / base:.3f}",
                f"{(middle + weights) / (base + weights):.3f}",
                f"{1e3 * found['seconds'][contender].median:.0f}",
                found["time ratios"][contender],
            ]
        )
    ratio = statistics.median(found["peaks"]["recompute"]) / base
    head = ["one step of", "peak, MiB", "of Backprop's", "weights included", "ms", "time of Backprop's"]
    shares = ", ".join(f"{size / MIB:.1f}" for size in activations)
    return [
        f"## {title}",
        table(head, rows),
        f"Kept activations of the {K} blocks, bottom first: {shares} MiB; the largest block has "
        f"{max(activations) / sum(activations):.1%} of the network's {sum(activations) / MIB:.1f} MiB. "
        f"The weights are {weights / MIB:.1f} MiB. Recompute at most {TARGET} of Backprop's peak: "
        f"**{'yes' if ratio <= TARGET else 'no'}, {ratio:.3f}**.",
    ]


def main() -> None:
    given = arguments(__doc__)
    if given.worker:
        work(given.worker)
        return
    repeats, rounds = (1, 3) if given.quick else (2, 5)
    data = {workload.title: of_workload(name, repeats, rounds) for name, workload in WORKLOADS.items()}
    body = [
        f"One training step at K = {K} on one thread, exact form, SGD. The peak is that of activations, gradients "
        "and everything else that a step needs, above what was resident before it (weights and inputs are not in "
        "it; the fourth column adds the weights to both sides). The checkpointed segments are the same blocks.",
        *[line for title, found in data.items() for line in section(title, found)],
        f"Peaks: median (smallest to largest) of {repeats} fresh processes each, with "
        + ", ".join(f"`{key}={value}`" for key, value in ENV.items())
        + f". Times: a process each, without those, single steps in turn; median ratio (quartiles) of {rounds} "
        "rounds on a shared, noisy machine.",
    ]
    publish("memory", given, "Peak memory of a training step", body, data)


if __name__ == "__main__":
    main()
