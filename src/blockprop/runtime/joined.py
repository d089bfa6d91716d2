"""The executor of a process that torchrun started: a script's own way into a run with a process for every block."""

import atexit
import os
import sys
import threading
from types import TracebackType
from typing import Any, Literal

from blockprop.errors import first_line
from blockprop.executors import Executor, PipelinedExecutor
from blockprop.runtime import failure as failures
from blockprop.runtime.edge import Post
from blockprop.runtime.failure import fail, guard, why_lost
from blockprop.runtime.freerunning import FreeRunningExecutor
from blockprop.runtime.group import LostError
from blockprop.runtime.message import Precision
from blockprop.runtime.neighbours import Neighbours
from blockprop.runtime.rendezvous import LOOPBACK, Place, Rendezvous, serves_the_store

__all__ = ["processes"]


def processes(
    *,
    policy: Literal["lock-step", "free-running"] = "lock-step",
    replicas: int = 1,
    messages: Precision = "float32",
    listen: str = LOOPBACK,
    **more: Any,
) -> Executor:
    """Meet the other processes that torchrun started, and run one block here.

    Args:
        policy: "lock-step", with the numbers of the same pipeline in one process (default), or "free-running".
        replicas: R, processes for each block; the number of processes is K x R. Default 1.
        messages: numbers in outputs and feedback on their way: "float32" (default), "bfloat16" or "int8".
        listen: this machine's address for connections; default: none from outside.
        more: for [`PipelinedExecutor`][blockprop.executors.pipelined.PipelinedExecutor] or
            [`FreeRunningExecutor`][blockprop.runtime.freerunning.FreeRunningExecutor].

    Raises:
        ValueError: not started by torchrun, or a setting out of its range.
        LostError: a neighbour does not come.
    """
    if policy not in ("lock-step", "free-running"):
        raise ValueError(f"policy is {policy!r}; expected 'lock-step' or 'free-running'")
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        raise ValueError(
            "the executor 'processes' runs one block in each process; expected torchrun to have started them: "
            "torchrun --nproc-per-node K SCRIPT"
        )
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if isinstance(replicas, bool) or not isinstance(replicas, int) or replicas < 1 or world % replicas:
        raise ValueError(f"replicas is {replicas} for {world} processes; expected a whole number that divides them")
    if policy == "free-running" and replicas > 1:
        raise ValueError(
            "replicas update at the same time, which free-running ones do not; expected policy='lock-step'"
        )
    place = Place.of_rank(rank, world // replicas, replicas)
    rendezvous = Rendezvous.of_torchrun(listen)
    _say_what_ends_it(rendezvous, place)
    finished = threading.Event()
    posts: list[Post] = []

    def lose(why: str) -> None:
        if posts:
            posts[0].lose(why)

    def end(why: str) -> None:
        if not hasattr(sys, "ps1"):  # not at a prompt
            print(f"blockprop: {place.name} {why}", file=sys.stderr, flush=True)
            os._exit(1)

    # a script has a time in which it may come to its next step, and hear of the failure there
    watching = guard(rendezvous, place, finished, lose, patience=failures.SILENCE, end=end)
    atexit.register(watching.join, 1.0)
    atexit.register(finished.set)  # before the other: the latest is called first
    remote = Neighbours(place, rendezvous, listen=listen, precision=messages, parted=finished)
    posts.append(remote.post)
    if policy == "free-running":
        return FreeRunningExecutor(remote, **more)
    return PipelinedExecutor(remote=remote, **more)


def _say_what_ends_it(rendezvous: Rendezvous, place: Place) -> None:
    """Let an exception that ends this script end the others, which say in one line what and where it was."""
    before = getattr(sys.excepthook, "before", sys.excepthook)  # not that of an earlier meeting

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, LostError):
            print(f"blockprop: {place.name} {why_lost(rendezvous, place, error)}", file=sys.stderr)
        else:
            stopped = issubclass(kind, KeyboardInterrupt)
            before(kind, error, trace)
            why = "it was stopped" if stopped else f"{kind.__name__}: {first_line(error)}"
            fail(rendezvous, place, why, serving=serves_the_store())
        sys.stdout.flush()
        sys.stderr.flush()
        if not hasattr(sys, "ps1"):  # not at a prompt: threads that wait for a neighbour would abort the interpreter
            os._exit(1)

    hook.before = before  # type: ignore[attr-defined]
    sys.excepthook = hook
