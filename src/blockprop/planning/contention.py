"""How much slower a process computes while another one computes on the same machine."""

import copy
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from queue import Empty
from typing import Any

import torch
from torch import Tensor, nn

from blockprop.cost import timed

__all__ = ["measure_contention"]


ROUNDS = 6


def measure_contention(model: nn.Module, inputs: Tensor, seconds: float = 12.0) -> float:
    """Processor seconds of a training step with a second process beside it, over those of one alone; at least 1.

    Time in which the processor does something else is in neither, so that it is the caches and the memory that count.
    Two processes compute in turn and together, time and again, and the median of the ratios counts: what another
    program does for a while then falls on both.

    Args:
        model: on the CPU; a copy of it is trained.
        inputs: a batch of floating point numbers or tokens, shape [N, ...].
        seconds: how long to measure in all; default 12.

    Raises:
        RuntimeError: a process ended before it had measured.
    """
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(2, timeout=60 + 10 * seconds), context.Queue()
    arguments = (copy.deepcopy(model), inputs, seconds / (2 * ROUNDS), barrier, queue)
    processes = [context.Process(target=_in_turn, args=(place, *arguments), daemon=True) for place in range(2)]
    for process in processes:
        process.start()
    try:
        ratios = [ratio for _ in processes for ratio in _answer(queue, processes, 120 + 20 * seconds)]
    finally:
        for process in processes:
            process.terminate()
            process.join()
    return float(max(1.0, statistics.median(ratios)))


def _answer(queue: Any, processes: Sequence[BaseProcess], patience: float) -> list[float]:
    """What one of the processes has measured; they are looked after meanwhile."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        failed = any(process.exitcode for process in processes)
        try:
            found: list[float] = queue.get(timeout=0.2)
            return found
        except Empty:
            if failed:
                raise RuntimeError(
                    "a process that measures contention ended before it had measured; its error is above. A script "
                    "that calls this does so under if __name__ == '__main__'"
                ) from None
    raise RuntimeError(f"the processes that measure contention have not answered within {patience:g} seconds")


def _in_turn(place: int, model: nn.Module, inputs: Tensor, seconds: float, barrier: Any, queue: Any) -> None:
    """In each of two processes: the ratios of the rounds in which this one was alone first."""
    torch.set_num_threads(1)
    step = _step(model, inputs)
    ratios = []
    for number in range(ROUNDS):
        barrier.wait()
        alone = _seconds(step, seconds) if number % 2 == place else None
        barrier.wait()
        together = _seconds(step, seconds)
        if alone is not None:
            ratios.append(together / alone)
    queue.put(ratios)


def _step(model: nn.Module, inputs: Tensor) -> Callable[[], None]:
    """A training step of the model, made once to warm up."""
    model = model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)

    def step() -> None:
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    return step


def _seconds(step: Callable[[], None], seconds: float) -> float:
    """Median processor time of the steps that fit into so many seconds, at least two."""
    found: list[float] = []
    end = time.perf_counter() + seconds
    while len(found) < 2 or time.perf_counter() < end:
        found.append(timed(step)[1])
    return statistics.median(found)
