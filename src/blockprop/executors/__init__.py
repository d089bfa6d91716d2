"""Who runs the stages: one after the other (`local`), or in parallel threads (`threads`). The numbers are the same."""

from collections.abc import Callable

from blockprop.executors.executor import Executor, StepReport
from blockprop.executors.local import LocalExecutor
from blockprop.executors.threads import ThreadsExecutor

__all__ = ["EXECUTORS", "Executor", "LocalExecutor", "StepReport", "ThreadsExecutor"]

EXECUTORS: dict[str, Callable[[], Executor]] = {"local": LocalExecutor, "threads": ThreadsExecutor}
