"""How much slower a process computes while another one computes on the same machine."""

import copy
import multiprocessing
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

from blockprop.cost import timed

__all__ = ["measure_contention"]


def measure_contention(model: nn.Module, inputs: Tensor, seconds: float = 4.0) -> float:
    """Processor seconds of a training step with a second process beside it, over those of one alone; at least 1.

    Time in which the processor does something else is in neither, so that it is the caches and the memory that count.

    Args:
        model: on the CPU; a copy of it is trained.
        inputs: a batch of floating point numbers or tokens, shape [N, ...].
        seconds: how long to measure, alone and together; default 4.
    """
    alone = _step_seconds(model, inputs, seconds)
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(2), context.Queue()
    arguments = (copy.deepcopy(model), inputs, seconds, barrier, queue)
    processes = [context.Process(target=_beside, args=arguments, daemon=True) for _ in range(2)]
    for process in processes:
        process.start()
    together = [queue.get(timeout=120 + 10 * seconds) for _ in processes]
    for process in processes:
        process.join()
    return max(1.0, statistics.fmean(together) / alone)


def _beside(model: nn.Module, inputs: Tensor, seconds: float, barrier: Any, queue: Any) -> None:
    torch.set_num_threads(1)
    _step_seconds(model, inputs, 0.0)
    barrier.wait()
    queue.put(_step_seconds(model, inputs, seconds))


def _step_seconds(model: nn.Module, inputs: Tensor, seconds: float) -> float:
    """Median of the steps that fit into so many seconds, at least two."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)

    def step() -> None:
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    found: list[float] = []
    end = time.perf_counter() + seconds
    while len(found) < 2 or time.perf_counter() < end:
        found.append(timed(step)[1])
    return statistics.median(found)
