"""Fresh processes for a measurement, one a core: forked from a server that has torch loaded, bounded in time."""

import contextlib
import ctypes
import multiprocessing
import os
import select
import signal
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

_ENTER_NETWORK = 0x40000000
_PRELOADED = [
    "torch.distributed.pipelining",
    "torch.utils.tensorboard",
    "blockprop.cli",
    "blockprop.experiments.launcher",
    "benchmarks.pipelines.peers",
]
_GRACE = 3.0


@dataclass(frozen=True)
class Place:
    """Where a process runs.

    Attributes:
        namespace: of the network, or None for the machine's own.
        device: of the network that it may use.
        address: on that device.
    """

    namespace: str | None = None
    device: str = "lo"
    address: str = "127.0.0.1"


LOOPBACK = (Place(), Place())


class FailedError(RuntimeError):
    """A process ended with an error, or did not end in time."""


class Crew:
    """Fresh processes that each do `work(rank, settings)` at the same time; a context, after which none is left.

    Args:
        work: what they do.
        settings: for it; `threads` is taken from here as well, default 1.
        places: where each of them runs.
        limit: seconds that they may take.
    """

    def __init__(
        self,
        work: Callable[[int, dict[str, Any]], Any],
        settings: Mapping[str, Any],
        places: Sequence[Place],
        limit: float,
    ) -> None:
        self._work, self._settings, self._places, self._limit = work, settings, places, limit
        self._deadline = time.monotonic() + limit
        self._children: list[Any] = []
        self._pipes: list[Connection] = []
        self._answers: dict[int, Any] = {}

    def __enter__(self) -> "Crew":
        os.environ["OMP_NUM_THREADS"] = "1"
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        try:
            for rank, place in enumerate(self._places):
                ours, theirs = context.Pipe(duplex=False)
                self._pipes.append(ours)
                child = context.Process(
                    target=_child,
                    args=(self._work, rank, dict(self._settings), place, theirs, os.getpid()),
                    daemon=True,
                )
                child.start()
                theirs.close()
                self._children.append(child)
        except BaseException:
            self._end(0.0)
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end(_GRACE if self.over else 0.0)

    def _end(self, grace: float) -> None:
        for child in self._children:
            child.join(grace)
            if child.is_alive():
                child.kill()
            child.join()
            child.close()
        for pipe in self._pipes:
            pipe.close()

    @property
    def over(self) -> bool:
        """Whether all of them have answered."""
        return len(self._answers) == len(self._places)

    def answers(self) -> list[Any]:
        """Wait for what all of them return.

        Raises:
            FailedError: as `hear`.
        """
        while not self.over:
            self.hear(self._limit)
        return [self._answers[rank] for rank in range(len(self._places))]

    def hear(self, seconds: float) -> None:
        """Wait so long, or until one of them has something to say.

        Raises:
            FailedError: one of them failed, or they have taken longer than their limit.
        """
        waiting = [pipe for rank, pipe in enumerate(self._pipes) if rank not in self._answers]
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise FailedError(f"not done in {self._limit:.0f} s")
        for pipe in wait(waiting, timeout=min(seconds, left)):
            rank = self._pipes.index(pipe)  # type: ignore[arg-type]
            try:
                good, answer = pipe.recv()  # type: ignore[union-attr]
            except EOFError:
                raise FailedError(f"process {rank} ended without an answer") from None
            if not good:
                raise FailedError(answer)
            self._answers[rank] = answer


def run(
    work: Callable[[int, dict[str, Any]], Any],
    ranks: int,
    settings: Mapping[str, Any],
    *,
    places: Sequence[Place] = LOOPBACK,
    limit: float = 120.0,
) -> list[Any]:
    """What `work(rank, settings)` returns in so many fresh processes.

    Raises:
        FailedError: one of them raised an error, or they took longer than the limit in seconds.
    """
    with Crew(work, settings, places[:ranks], limit) as crew:
        return crew.answers()


def _child(work: Any, rank: int, settings: dict[str, Any], place: Place, pipe: Connection, main: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_follow, args=(main,), daemon=True).start()
    try:
        if place.namespace is not None:
            libc = ctypes.CDLL(None, use_errno=True)
            with Path(f"/run/netns/{place.namespace}").open() as network:
                if libc.setns(network.fileno(), _ENTER_NETWORK):
                    raise OSError(ctypes.get_errno(), f"cannot enter {place.namespace}")
        os.environ["GLOO_SOCKET_IFNAME"] = place.device
        torch.set_num_threads(settings.get("threads", 1))
        pipe.send((True, work(rank, {**settings, "device": place.device})))
    except BaseException as error:
        first = (str(error).splitlines() or ["no message"])[0]
        pipe.send((False, f"{type(error).__name__}: {first}\n{traceback.format_exc()[-1500:]}"))
    finally:
        pipe.close()
        os._exit(0)  # no waiting for a process group whose other side may be gone


def _follow(main: int) -> None:
    """End this process when the main one does, however it does."""
    with contextlib.suppress(ProcessLookupError):
        select.select([os.pidfd_open(main)], [], [])
    os._exit(1)
