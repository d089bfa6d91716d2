"""Several settings over several seeds, on the same data in the same order."""

import re
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from blockprop.executors.executor import DivergedError
from blockprop.experiments.run import read_json, resume, run, settings_of, write_json
from blockprop.experiments.settings import Settings

__all__ = ["compare"]


def compare(
    variants: dict[str, Settings],
    seeds: Sequence[int],
    out: Path,
    *,
    jobs: int = 1,
    quiet: bool = False,
    on_run: Callable[[str, int, dict[str, Any]], None] | None = None,
) -> list[Path]:
    """Run every variant with every seed; finished runs found in the folder are kept, stopped ones continued.

    Args:
        variants: settings by name; a name is its folder's as well.
        seeds: seeds, the same for every variant.
        out: the comparison's folder; run folders are `out/VARIANT/seed-N`.
        jobs: runs at a time, each in a process of its own if more than one; default 1.
        quiet: show no progress.
        on_run: called with variant, seed and summary after each run.

    Returns:
        The folders of all runs, diverged ones included (their summary says so).

    Raises:
        ValueError: no variant or seed, a seed twice, jobs below 1, a folder that holds a run with other settings, or a
            user's mistake in a variant.
    """
    if not variants or not seeds or len(set(seeds)) != len(seeds):
        raise ValueError("expected at least one variant and one seed, and no seed twice")
    if jobs < 1:
        raise ValueError(f"jobs is {jobs}; expected a whole number of at least 1")
    tasks = {}
    for name, settings in variants.items():
        for seed in seeds:
            folder = out / re.sub(r"[^\w.=+-]+", "-", name) / f"seed-{seed}"
            one = replace(settings, seed=seed).resolved()
            if (folder / "config.json").exists() and settings_of(folder) != one:
                raise ValueError(f"{folder} holds a run with other settings; name another --out")
            tasks[folder] = (name, seed, one)
    if jobs == 1:
        for folder, (name, seed, one) in tasks.items():
            _report(on_run, name, seed, _one(one, folder, quiet=quiet))
        return list(tasks)
    # spawned, since forking a process that has used torch's threads can hang
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        running = {
            pool.submit(_one, one, folder, quiet=True): (name, seed) for folder, (name, seed, one) in tasks.items()
        }
        for future in as_completed(running):
            _report(on_run, *running[future], future.result())
    return list(tasks)


def _report(
    on_run: Callable[[str, int, dict[str, Any]], None] | None, name: str, seed: int, summary: dict[str, Any]
) -> None:
    if on_run:
        on_run(name, seed, summary)


def _one(settings: Settings, folder: Path, *, quiet: bool) -> dict[str, Any]:
    """A run, unless it is finished; a divergence is a result here, and is recorded."""
    if (folder / "summary.json").exists():
        return read_json(folder / "summary.json")
    try:
        if any((folder / "checkpoints").glob("*.safetensors")):
            return resume(settings, folder, quiet=quiet)
        if (folder / "config.json").exists():  # a run stopped before its first checkpoint
            shutil.rmtree(folder)
        return run(settings, folder, quiet=quiet)
    except DivergedError as error:
        summary = {"algorithm": settings.algorithm, "seed": settings.seed, "diverged": True, "why": str(error)}
        write_json(folder / "summary.json", summary)
        return summary
