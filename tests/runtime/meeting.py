"""A pipeline with a thread for every process: the same code, edges and groups, without the start of an interpreter."""

import copy
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import blockprop
from blockprop.executors import PipelinedExecutor
from blockprop.runtime import Neighbours, Place, Rendezvous
from blockprop.runtime.rendezvous import LOOPBACK
from conftest import flat, sgd


def together(count: int, work: Callable[[int, Rendezvous], Any], timeout: float = 60.0) -> list[Any]:
    """What each of so many threads made of its rank and a rendezvous; the first error, if there was one."""
    host = Rendezvous((LOOPBACK, 0), host=True)
    address = host.address
    made: dict[int, Any] = {}
    failed: list[BaseException] = []

    def one(rank: int) -> None:
        try:
            made[rank] = work(rank, Rendezvous(address))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(count)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + timeout
    while any(thread.is_alive() for thread in threads) and not failed:
        assert time.monotonic() < deadline, "a thread hangs"
        time.sleep(0.01)
    if failed:
        raise failed[0]  # the others wait for this one in vain
    del host
    return [made[rank] for rank in range(count)]


Batches = list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def numbered(batches: list[tuple[torch.Tensor, torch.Tensor]], examples: int) -> Batches:
    """With example numbers: epoch after epoch of the same examples in the same batches."""
    size = len(batches[0][0])
    return [(x, y, (torch.arange(len(x)) + index * size) % examples) for index, (x, y) in enumerate(batches)]


def alone(model: nn.Module, K: int, batches: Batches, executor: PipelinedExecutor, lr: float = 0.1) -> torch.Tensor:
    """The weights after training in one process."""
    algo = blockprop.BlockProp(blockprop.split(model, K), nn.CrossEntropyLoss(), sgd(lr), executor=executor)
    for x, y, ids in batches:
        algo.step(x, y, ids)
    algo.finish()
    return flat(algo.blocks.model.parameters())


def apart(
    model: nn.Module,
    K: int,
    batches: Batches,
    executor: Callable[[Neighbours], Any],
    *,
    lr: float = 0.1,
    replicas: int = 1,
    after: Callable[[Any, Neighbours], Any] = lambda algo, _: flat(algo.blocks[_.place.block - 1].parameters()),
    **more: Any,
) -> list[Any]:
    """What `after` makes of each process's trained block, bottom first; by default its weights."""

    def work(rank: int, rendezvous: Rendezvous) -> Any:
        place = Place.of_rank(rank, K, replicas)
        blocks = blockprop.split(copy.deepcopy(model), K)
        neighbours = Neighbours(place, rendezvous, **more)
        algo = blockprop.BlockProp(blocks, nn.CrossEntropyLoss(), sgd(lr), executor=executor(neighbours))
        for x, y, ids in batches:
            x, y, ids = (value.tensor_split(replicas)[place.replica] for value in (x, y, ids))
            algo.step(x if neighbours.first else None, y if neighbours.last else None, ids)
        algo.finish()
        found = after(algo, neighbours)
        algo.close()
        return found

    return together(K * replicas, work)
