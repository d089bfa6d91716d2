"""One run: from settings to a folder with configuration, metrics, checkpoints, summary and the trained model."""

import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from blockprop.checkpoint import Checkpoints, write_atomically
from blockprop.experiments.execution import executor_of
from blockprop.experiments.folder import check_empty, claimed, read_json, settings_of, write_json
from blockprop.experiments.ingredients import (
    config_of,
    cut_of,
    dataset_of,
    network_of,
    summary_of,
    trainer_of,
    training_of,
    weights_of,
)
from blockprop.experiments.launcher import launch
from blockprop.experiments.progress import Progress
from blockprop.experiments.settings import Settings
from blockprop.metrics import Metrics
from blockprop.training import Training

__all__ = ["checked", "resume", "resumed", "run"]

# What a resumed run may be given anew: how long it goes on, and what does not touch the numbers.
_MAY_CHANGE = {"epochs", "steps", "threads", "log_every", "checkpoint_every", "data_dir"}


def run(settings: Settings, out: Path, *, quiet: bool = False) -> dict[str, Any]:
    """Train by the settings, and leave everything in a folder.

    Args:
        settings: what to do.
        out: the run's folder; must not exist, or be empty.
        quiet: show no progress.

    Returns:
        The summary, as written to `summary.json`.

    Raises:
        ValueError: a user's mistake, said before the folder is made where it can be; a loss that is not finite.
    """
    check_empty(out)
    settings = checked(settings)
    if settings.executor == "processes":
        return launch(settings, out, quiet=quiet)
    return _train(settings, out, None, quiet=quiet)


def checked(settings: Settings) -> Settings:
    """The settings of a new run, resolved.

    Raises:
        ValueError: one has no effect beside the others, or they exclude each other.
    """
    for why in settings.unused().values():
        raise ValueError(why)
    _check_threads(settings)
    return settings.resolved()


def _check_threads(settings: Settings) -> None:
    """Only of what is asked for here: a run may have been made on a larger machine."""
    most = 16 * (os.cpu_count() or 1)  # far beyond it the system refuses, in many words
    if settings.threads is not None and settings.threads > most:
        raise ValueError(f"--threads is {settings.threads}; expected a whole number from 1 to {most} on this machine")


def resume(given: Settings, out: Path, *, quiet: bool = False) -> dict[str, Any]:
    """Continue the run in a folder from its newest checkpoint, bit for bit.

    Args:
        given: settings; those left at their defaults are taken from the run. Only the length of the run and
            what does not touch its numbers may differ.
        out: the run's folder.
        quiet: show no progress.

    Raises:
        ValueError: the folder holds no run or no checkpoint, a checkpoint is damaged or of another model, or a
            setting differs from the run's.
    """
    settings = resumed(given, out)
    if settings.executor == "processes":
        return launch(settings, out, resume=True, quiet=quiet)
    with claimed(out):
        return _train(settings, out, Checkpoints(out / "checkpoints").newest(), quiet=quiet)


def resumed(given: Settings, out: Path) -> Settings:
    """The settings of the run in a folder, with those that are given anew.

    Raises:
        ValueError: as in `resume`.
    """
    _check_threads(given)
    recorded = settings_of(out)
    changes = {}
    for field in fields(Settings):
        value, was = getattr(given, field.name), getattr(recorded, field.name)
        if value in (field.default, was):
            continue
        if field.name not in _MAY_CHANGE:
            flag = field.name.replace("_", "-")
            raise ValueError(f"--{flag} is {value}, but the run in {out} has {was}; leave it out, or start a new run")
        changes[field.name] = value
    if changes.keys() & {"epochs", "steps"}:
        changes = {"epochs": None, "steps": None, **changes}
        steps = read_json(out / "config.json").get("warmup_steps")  # not in older runs
        if recorded.warmup is None and isinstance(steps, int):
            changes["warmup"] = steps  # a share of the run as it was: the step size must not fall again
    return replace(recorded, **changes).resolved()


def _train(settings: Settings, out: Path, state: dict[str, Any] | None, *, quiet: bool) -> dict[str, Any]:
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    dataset = dataset_of(settings)
    torch.manual_seed(settings.seed)
    blocks = cut_of(settings, network_of(settings, dataset), dataset.sample)
    more: dict[str, Any] = {"devices": settings.devices or None}
    if settings.algorithm == "blockprop":
        more |= {"executor": executor_of(settings, len(dataset.train)), "recompute": settings.recompute}
    algo = trainer_of(settings, blocks, dataset, **more)
    with Progress(settings, quiet=quiet) as progress:
        training = training_of(settings, algo, dataset, progress.update)
        # all that can be wrong with the settings has been said: from here on, files are written
        if state is not None:  # `resume` has claimed the folder, before it read the checkpoint
            return _write(settings, training, out, state)
        with claimed(out):
            check_empty(out)
            return _write(settings, training, out, None)


def _write(settings: Settings, training: Training, out: Path, state: dict[str, Any] | None) -> dict[str, Any]:
    """Train, and leave everything in the folder."""
    training.metrics = Metrics(out / "metrics.jsonl", out / "tensorboard")
    training.checkpoints = Checkpoints(out / "checkpoints")
    try:
        if state is not None:
            training.resume(state)
        write_json(out / "config.json", config_of(settings, training))
        training.run()
    finally:
        training.metrics.close()
    summary = summary_of(settings, training)
    write_atomically(out / "model.safetensors", weights_of(training))
    write_json(out / "summary.json", summary)
    return summary
