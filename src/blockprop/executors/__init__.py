"""Who runs the stages.

One after the other (`local`), or in parallel threads (`threads`), with the same numbers; or by a schedule in which
feedback comes late (`PipelinedExecutor`).
"""

from collections.abc import Callable

from blockprop.executors.cached import CachedExecutor
from blockprop.executors.executor import Executor, StepReport
from blockprop.executors.local import LocalExecutor
from blockprop.executors.pipelined import PipelinedExecutor
from blockprop.executors.replayed import ReplayedExecutor
from blockprop.executors.threads import ThreadsExecutor

__all__ = [
    "EXECUTORS",
    "CachedExecutor",
    "Executor",
    "LocalExecutor",
    "PipelinedExecutor",
    "ReplayedExecutor",
    "StepReport",
    "ThreadsExecutor",
]

EXECUTORS: dict[str, Callable[[], Executor]] = {"local": LocalExecutor, "threads": ThreadsExecutor}
