"""Many runs in one folder: finished ones are kept, stopped ones continued, diverged ones recorded."""

import os
import re
import shutil
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from typing import Any

from blockprop.executors.executor import DivergedError
from blockprop.experiments.folder import claimed, origin, read_json, settings_of, versions, write_json
from blockprop.experiments.run import resume, run
from blockprop.experiments.settings import Settings

__all__ = ["Plan", "Planned", "compare", "folder_name", "work_off"]


@dataclass(frozen=True)
class Planned:
    """A run to be made.

    Attributes:
        name: what it is called in progress and reports.
        settings: its settings, seed included.
        folder: where it goes.
    """

    name: str
    settings: Settings
    folder: Path

    def check(self) -> None:
        """Raise ValueError if the settings exclude each other, or the folder holds a run with others."""
        settings = self.settings.resolved()
        if (self.folder / "config.json").exists() and not _same(settings_of(self.folder), settings):
            raise ValueError(f"{self.folder} holds a run with other settings; name another --out")


@dataclass(frozen=True)
class Plan:
    """Runs in any order; and what follows from their summaries (in the order of `runs`), if anything does."""

    runs: Sequence[Planned]
    then: "Callable[[list[dict[str, Any]]], Plan] | None" = None


OnRun = Callable[[Planned, dict[str, Any], float], None]
OnStart = Callable[[Planned], None]


def compare(
    variants: dict[str, Settings],
    seeds: Sequence[int],
    out: Path,
    *,
    jobs: int = 1,
    quiet: bool = False,
    on_run: OnRun | None = None,
) -> list[Path]:
    """Run every variant with every seed, on the same data in the same order.

    Args:
        variants: settings by name; a name is its folder's as well.
        seeds: seeds, the same for every variant.
        out: the comparison's folder; run folders are `out/VARIANT/seed-N`.
        jobs: runs at a time, each in a process of its own if more than one; default 1.
        quiet: show no progress.
        on_run: called with each run, its summary, and the seconds it took.

    Returns:
        The folders of all runs, diverged ones included (their summary says so).

    Raises:
        ValueError: no variant or seed, a seed twice, jobs below 1, a folder that holds a run with other settings, or a
            user's mistake in a variant.
    """
    if not variants or not seeds or len(set(seeds)) != len(seeds):
        raise ValueError("expected at least one variant and one seed, and no seed twice")
    runs = [
        Planned(name, replace(settings, seed=seed), out / folder_name(name) / f"seed-{seed}")
        for name, settings in variants.items()
        for seed in seeds
    ]
    work_off([Plan(runs)], jobs=jobs, quiet=quiet, on_run=on_run)
    return [planned.folder for planned in runs]


def folder_name(name: str) -> str:
    """A name with everything that does not belong into a folder's turned into a dash."""
    return re.sub(r"[^\w.=+-]+", "-", name)


def work_off(
    plans: Iterable[Plan],
    *,
    jobs: int = 1,
    quiet: bool = False,
    lean: bool = False,
    on_run: OnRun | None = None,
    on_start: OnStart = lambda _planned: None,
) -> None:
    """Make all runs of the plans, the first plans first; what is finished is not made again.

    Args:
        plans: what to run.
        jobs: runs at a time, each in a process of its own if more than one; default 1.
        quiet: show no progress of the runs themselves.
        lean: keep configuration, metrics and summary of a finished run alone, not its weights and checkpoints.
        on_run: called with each run, its summary, and the seconds it took: for a finished run that was found in its
            folder, those of its training.
        on_start: called with each run before it.

    Raises:
        ValueError: jobs below 1, a folder that holds a run with other settings, a user's mistake in the settings, or a
            run's process that died.
    """
    if jobs < 1:
        raise ValueError(f"jobs is {jobs}; expected a whole number of at least 1")
    plans = list(plans)
    for plan in plans:
        _check(plan)
    # spawned, since forking a process that has used torch's threads can hang
    before = set(active_children())
    pool = ProcessPoolExecutor(jobs, get_context("spawn"), _end_with_parent) if jobs > 1 else _Here()
    upcoming = deque(_Open(plan) for plan in plans)
    ready: deque[tuple[_Open, Planned]] = deque()
    running: dict[Future[tuple[dict[str, Any], float]], tuple[_Open, Planned]] = {}
    try:
        while ready or running or upcoming:
            while len(running) < jobs and (ready or upcoming):
                if not ready:
                    opened = upcoming.popleft()
                    ready.extend((opened, planned) for planned in opened.plan.runs)
                    continue
                opened, planned = ready.popleft()
                on_start(planned)
                future = pool.submit(_one, planned, quiet=quiet or jobs > 1, lean=lean)
                running[future] = (opened, planned)
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                opened, planned = running.pop(future)
                summary, seconds = future.result()
                if on_run:
                    on_run(planned, summary, seconds)
                if following := opened.finished(planned, summary):
                    _check(following)
                    opened = _Open(following)
                    ready.extendleft((opened, planned) for planned in reversed(following.runs))
    except KeyboardInterrupt:
        for child in set(active_children()) - before:
            child.terminate()
        raise
    except BrokenProcessPool as error:
        raise ValueError(
            "a run's process died, perhaps for lack of memory; the same command continues, with fewer --jobs if need be"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _check(plan: Plan) -> None:
    for planned in plan.runs:
        planned.check()


class _Open:
    """A plan being worked off."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.summaries: dict[Path, dict[str, Any]] = {}

    def finished(self, planned: Planned, summary: dict[str, Any]) -> Plan | None:
        """Note a summary; the plan that follows, once all are there."""
        self.summaries[planned.folder] = summary
        if self.plan.then is None or len(self.summaries) < len(self.plan.runs):
            return None
        return self.plan.then([self.summaries[planned.folder] for planned in self.plan.runs])


class _Here(Executor):
    """Runs in this process, at once."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Call the function; what it raises is raised here."""
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def _end_with_parent() -> None:
    """Nobody would take the result of a run whose parent was killed; its last checkpoint is there.

    Ctrl-C is the parent's to hear, which ends this process: a thread that the interruption hits may hang.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        if (parent := parent_process()) is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _same(one: Settings, other: Settings) -> bool:
    """Whether two runs are the same but for where the data lie and how many threads compute."""
    return replace(one, data_dir=None, threads=None) == replace(other, data_dir=None, threads=None)


def _one(planned: Planned, *, quiet: bool, lean: bool) -> tuple[dict[str, Any], float]:
    """A run, unless it is finished, and the seconds it took; a divergence is a result here, and is recorded."""
    settings, folder = planned.settings, planned.folder
    if (folder / "summary.json").exists():
        summary = read_json(folder / "summary.json")
        seconds = summary.get("seconds", 0.0)
    else:
        start = time.perf_counter()
        try:
            summary = _make(settings, folder, quiet=quiet)
        except DivergedError as error:
            summary = {
                "algorithm": settings.algorithm,
                "seed": settings.seed,
                "diverged": True,
                "seconds": time.perf_counter() - start,
                "why": str(error),
                "versions": versions(),
                "origin": origin(),
            }
            write_json(folder / "summary.json", summary)
        seconds = time.perf_counter() - start
    if lean:
        (folder / "model.safetensors").unlink(missing_ok=True)
        for name in ("checkpoints", "tensorboard"):
            shutil.rmtree(folder / name, ignore_errors=True)
    return summary, seconds


def _make(settings: Settings, folder: Path, *, quiet: bool) -> dict[str, Any]:
    settings = settings.resolved()
    if any((folder / "checkpoints").glob("*.safetensors")):
        return resume(settings, folder, quiet=quiet)
    if (folder / "config.json").exists():  # a run stopped before its first checkpoint
        with claimed(folder):
            shutil.rmtree(folder)
    return run(settings, folder, quiet=quiet)
