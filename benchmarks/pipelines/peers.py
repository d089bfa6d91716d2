"""What a process does in a measurement: one function for every peer, all with the same batches, model and optimizer.

Each takes a rank and settings, and gives back samples/s, bytes that left by the network, and tensor bytes. With
`verify` it takes three steps on few examples in float64 instead, with the statistics of BatchNorm held fixed, and tells
how far its weights are from one process's backprop.
"""

import copy
import gc
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleZBVZeroBubble
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import blockprop
from benchmarks.pipelines.memory import InFlight, kept
from blockprop.experiments.optimizers import optimizer_named

Step = Callable[[Tensor, Tensor], object]
_TIMEOUT = timedelta(seconds=100)
_VERIFIED, _EXAMPLES = 3, 16
_WARM_UP = 3


class Batches:
    """The model and the batches of a file, gone through again and again; `many` of them at once."""

    def __init__(self, settings: dict[str, Any], many: int = 1) -> None:
        content = torch.load(settings["file"], weights_only=False)
        self.model: nn.Sequential = content["model"]
        self.inputs, self.targets = content["inputs"], content["targets"]
        if settings.get("verify"):
            self.model = self.model.double()
            self.inputs = [x[:_EXAMPLES].double() if x.is_floating_point() else x[:_EXAMPLES] for x in self.inputs]
            self.targets = [y[:_EXAMPLES] for y in self.targets]
            for module in self.model.modules():
                if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                    module.eval()  # its statistics are of the microbatch: no schedule gives one process's with them
        self._many = many
        self.taken = 0

    def __call__(self) -> tuple[Tensor, Tensor]:
        """The next ones."""
        at = [(self.taken * self._many + i) % len(self.inputs) for i in range(self._many)]
        self.taken += 1
        return torch.cat([self.inputs[i] for i in at]), torch.cat([self.targets[i] for i in at])


def loss_of(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy over predictions."""
    return functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def one(rank: int, settings: dict[str, Any]) -> dict[str, Any]:
    """One process with the whole model; with two ranks, two independent copies."""
    batches = Batches(settings)
    optimizer = optimizer_named(*settings["optimizer"])(batches.model.parameters())

    def step(inputs: Tensor, targets: Tensor) -> None:
        loss_of(batches.model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()

    if settings.get("ranks", 1) > 1:
        _join(rank, settings)
    return _apart(settings, batches, step, [batches.model], [optimizer])


def half(rank: int, settings: dict[str, Any]) -> dict[str, Any]:
    """The lower or the upper half, with what comes from the other one made up: no communication at all."""
    batches = Batches(settings)
    blocks = blockprop.split(batches.model, at=[settings["cut"]])
    block = blocks[rank]
    optimizer = optimizer_named(*settings["optimizer"])(block.parameters())
    with torch.no_grad():
        arriving = [blocks[0](inputs) for inputs in batches.inputs]
    feedback = torch.randn_like(arriving[0]) / arriving[0].numel()
    recompute = settings["recompute"]

    def lower(inputs: Tensor, _targets: Tensor) -> None:
        if recompute:
            with torch.no_grad():
                block(inputs)
        block(inputs).backward(feedback)

    def upper(_inputs: Tensor, targets: Tensor) -> None:
        loss_of(block(arriving[(batches.taken - 1) % len(arriving)].requires_grad_()), targets).backward()

    def step(inputs: Tensor, targets: Tensor) -> None:
        (upper if rank else lower)(inputs, targets)
        optimizer.step()
        optimizer.zero_grad()
        for one_batch in arriving:
            one_batch.grad = None

    _join(rank, settings)
    return _apart(settings, batches, step, [block], [optimizer])


def ddp(rank: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Data parallelism: half of each batch in either process."""
    _join(rank, settings)
    batches = Batches(settings)
    reference = _reference(settings)
    before = copy.deepcopy(list(batches.model.parameters()))
    wrapped = DistributedDataParallel(batches.model, gradient_as_bucket_view=True)
    optimizer = optimizer_named(*settings["optimizer"])(wrapped.parameters())

    def step(inputs: Tensor, targets: Tensor) -> None:
        mine = slice(rank * len(inputs) // 2, (rank + 1) * len(inputs) // 2)
        loss_of(wrapped(inputs[mine]), targets[mine]).backward()
        optimizer.step()
        optimizer.zero_grad()

    if settings.get("verify"):
        return _verified(batches, step, before, [batches.model], reference)
    return _together(settings, batches, step, [batches.model], [optimizer])


def pipeline(rank: int, settings: dict[str, Any]) -> dict[str, Any]:
    """A schedule of torch.distributed.pipelining; settings name it, its cuts and its microbatches."""
    _join(rank, settings)
    batches = Batches(settings, settings.get("many", 1))
    reference = _reference(settings)
    name, count = settings["schedule"], settings["microbatches"]
    blocks = list(blockprop.split(batches.model, at=settings["cuts"]))
    mine = [rank, 3 - rank] if name == "zbv" else [rank]
    before = [p.detach().clone() for index in mine for p in blocks[index].parameters()]
    stages = [PipelineStage(blocks[index], index, len(blocks), torch.device("cpu")) for index in mine]
    if name == "zbv":
        schedule: Any = ScheduleZBVZeroBubble(stages, count, loss_fn=loss_of)
    else:
        schedule = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}[name](stages[0], count, loss_fn=loss_of)
    modules = [blocks[index] for index in mine]
    optimizer = optimizer_named(*settings["optimizer"])([p for module in modules for p in module.parameters()])
    last = len(blocks) - 1 in mine

    def step(inputs: Tensor, targets: Tensor) -> None:
        given = (inputs,) if 0 in mine else ()
        schedule.step(*given, target=targets if last else None, return_outputs=False)
        optimizer.step()
        optimizer.zero_grad()

    if settings.get("verify"):
        return _verified(batches, step, before, modules, reference)
    return _together(settings, batches, step, modules, [optimizer])


def _join(rank: int, settings: dict[str, Any]) -> None:
    store = dist.FileStore(settings["meeting"], 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=_TIMEOUT)


def _apart(
    settings: dict[str, Any],
    batches: Batches,
    step: Step,
    modules: Sequence[nn.Module],
    optimizers: Sequence[torch.optim.Optimizer],
) -> dict[str, Any]:
    """Of a process that waits for no other: steps for so many seconds, all processes at the same time."""
    for _ in range(_WARM_UP):
        step(*batches())
    if dist.is_initialized():
        dist.barrier()
    start, count = time.perf_counter(), 0
    while (spent := time.perf_counter() - start) < settings["seconds"] or count < 2:
        step(*batches())
        count += 1
    spent = time.perf_counter() - start
    rate = count * len(batches.inputs[0]) / spent
    return {"samples_per_second": rate, "steps": count, "sent": None, **_tensors(batches, step, modules, optimizers)}


def _together(
    settings: dict[str, Any],
    batches: Batches,
    step: Step,
    modules: Sequence[nn.Module],
    optimizers: Sequence[torch.optim.Optimizer],
) -> dict[str, Any]:
    """Of processes that step at the same time: the first one says how many steps fill the seconds."""
    start = time.perf_counter()
    for warm in range(_WARM_UP):
        start = time.perf_counter() if warm == _WARM_UP - 1 else start
        step(*batches())
    planned = torch.tensor(max(3, round(settings["seconds"] / (time.perf_counter() - start))))
    dist.broadcast(planned, src=0)
    count = int(planned)
    dist.barrier()
    sent, start = _sent(settings["device"]), time.perf_counter()
    for _ in range(count):
        inputs, targets = batches()
        step(inputs, targets)
    spent = time.perf_counter() - start
    sent = (_sent(settings["device"]) - sent) / count if settings["device"] != "lo" else None  # type: ignore[assignment]
    found = {"samples_per_second": count * len(inputs) / spent, "steps": count, "sent": sent}
    found |= _tensors(batches, step, modules, optimizers)
    dist.barrier()
    return found


def _tensors(
    batches: Batches, step: Step, modules: Sequence[nn.Module], optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, Any]:
    """Tensor bytes, with those in flight from a step of its own."""
    gc.collect()
    with InFlight(modules) as flight:
        step(*batches())
    return {"memory": {**kept(modules, optimizers), "activations": flight.peak}}


def _sent(device: str) -> int:
    """Bytes that left by a device of this process's network, headers of all layers included."""
    line = next(line for line in Path("/proc/self/net/dev").read_text().splitlines() if line.strip().startswith(device))
    return int(line.split(":")[1].split()[8])


def _reference(settings: dict[str, Any]) -> dict[str, Tensor]:
    """The weights that one process's backprop has after the verified steps."""
    if not settings.get("verify"):
        return {}
    batches = Batches(settings, settings.get("many", 1))
    optimizer = optimizer_named(*settings["optimizer"])(batches.model.parameters())
    for _ in range(_VERIFIED):
        inputs, targets = batches()
        loss_of(batches.model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    return dict(batches.model.named_parameters())


def _verified(
    batches: Batches,
    step: Step,
    before: Sequence[Tensor],
    modules: Sequence[nn.Module],
    reference: dict[str, Tensor],
) -> dict[str, Any]:
    """How far this process's weights moved otherwise than in the reference, relative to how far they moved."""
    for _ in range(_VERIFIED):
        step(*batches())
    names = {id(p): name for name, p in batches.model.named_parameters()}
    ours = [p for module in modules for p in module.parameters()]
    wanted = [reference[names[id(p)]] for p in ours]
    with torch.no_grad():
        off = sum(float((a - b).square().sum()) for a, b in zip(ours, wanted, strict=True))
        way = sum(float((b - c).square().sum()) for b, c in zip(wanted, before, strict=True))
    dist.barrier()
    return {"difference": (off / way) ** 0.5}
