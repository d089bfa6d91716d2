"""One run: from settings to a folder with configuration, metrics, checkpoints, summary and the trained model."""

import json
import platform
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import save
from torch import nn

import blockprop
from blockprop import Backprop, BlockProp, OutputLoss, split
from blockprop.checkpoint import Checkpoints, write_atomically
from blockprop.data import Dataset, load
from blockprop.experiments.progress import Progress
from blockprop.experiments.settings import Settings
from blockprop.metrics import Metrics, finite
from blockprop.models import build
from blockprop.training import Score, Training, score

__all__ = ["check_folder", "read_json", "resume", "run", "settings_of", "write_json"]

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
    check_folder(out)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} already holds a run or other files; name another --out, or continue it with --resume")
    for why in settings.unused().values():
        raise ValueError(why)
    settings = settings.resolved()
    return _train(settings, out, None, quiet=quiet)


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
    state = Checkpoints(out / "checkpoints").newest()
    return _train(replace(recorded, **changes), out, state, quiet=quiet)


def check_folder(out: Path) -> None:
    """Refuse a folder that cannot be made because a file is in its place.

    Raises:
        ValueError: it, or a folder it would be in, is a file.
    """
    for path in (out, *out.parents):
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path} is a file, not a folder; name another --out")


def settings_of(out: Path) -> Settings:
    """The settings recorded in a run's folder, resolved; what an older run did not record is at its default.

    Raises:
        ValueError: there is no run, or its configuration is not one of ours.
    """
    recorded = read_json(out / "config.json")
    if missing := {"data", "model", "algorithm", "seed"} - recorded.keys():
        raise ValueError(f"{out / 'config.json'} lacks {min(missing)!r}; expected one written by a run")
    if "lr_schedule" not in recorded and "schedule" in recorded:
        recorded["lr_schedule"] = recorded.pop("schedule")  # its name in older runs
    defaults = Settings()
    values = {field.name: recorded.get(field.name, getattr(defaults, field.name)) for field in fields(Settings)}
    for key in ("penalty", "split_at", "block_lr", "devices"):
        values[key] = tuple(values[key])
    values["data_dir"] = None if values["data_dir"] is None else Path(values["data_dir"])
    return Settings(**values).resolved()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ValueError: the file is missing or is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"there is no {path}; expected the folder of a run") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}); expected a file written by a run") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object; expected a file written by a run")
    return content


def _algorithm(settings: Settings, dataset: Dataset, total_steps: int) -> BlockProp | Backprop:
    torch.manual_seed(settings.seed)
    assert settings.model is not None
    model = build(
        settings.model,
        dataset,
        width=settings.width,
        depth=settings.depth,
        dropout=settings.dropout,
        norm=settings.norm,
    )
    if settings.split_at:
        blocks = split(model, at=settings.split_at)
    else:
        blocks = split(model, settings.blocks, by=settings.split_by, sample=dataset.sample)
    loss = OutputLoss(nn.CrossEntropyLoss(), class_dim=-1 if dataset.task == "language" else 1)
    common: dict[str, Any] = {
        "scheduler": settings.schedulers(total_steps),
        "clip": settings.clip,
        "accumulate": settings.accumulate,
        "precision": torch.bfloat16 if settings.precision == "bfloat16" else None,
        "devices": settings.devices or None,
    }
    if settings.algorithm == "backprop":
        return Backprop(blocks, loss, settings.optimizers(blocks), **common)
    return BlockProp(
        blocks,
        loss,
        settings.optimizers(blocks),
        form=settings.form,
        penalty=settings.penalties(),
        h_solver=settings.solver(),
        executor=settings.executor_for(len(dataset.train)),
        recompute=settings.recompute,
        **common,
    )


def _train(settings: Settings, out: Path, state: dict[str, Any] | None, *, quiet: bool) -> dict[str, Any]:
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    dataset = load(
        settings.data,
        settings.data_dir,
        validation=settings.validation,
        context=settings.context,
        augment=settings.augment,
    )
    if settings.train_size is not None:
        dataset = dataset.first(settings.train_size)
    steps_per_epoch = -(-len(dataset.train) // max(1, settings.batch_size))
    total_steps = (settings.epochs or 0) * steps_per_epoch if settings.steps is None else settings.steps
    algo = _algorithm(settings, dataset, total_steps)
    with Progress(settings, quiet=quiet) as progress:
        training = Training(
            algo,
            dataset,
            batch_size=settings.batch_size,
            epochs=settings.epochs,
            steps=settings.steps,
            seed=settings.seed,
            log_every=settings.log_every,
            evaluate_every=settings.evaluate_every,
            checkpoint_every=settings.checkpoint_every,
            evaluate_on=settings.evaluate_on,
            diagnose_every=settings.diagnose_every,
            on_step=progress.update,
        )
        # all that can be wrong with the settings has been said: from here on, files are written
        training.metrics = Metrics(out / "metrics.jsonl", out / "tensorboard")
        training.checkpoints = Checkpoints(out / "checkpoints")
        try:
            if state is not None:
                training.resume(state)
            config = {**settings.as_dict(), "cut": algo.blocks.cut.as_dict(), "versions": _versions()}
            write_json(out / "config.json", config)
            training.run()
        finally:
            training.metrics.close()
    return _finish(settings, out, training)


def _finish(settings: Settings, out: Path, training: Training) -> dict[str, Any]:
    algo, dataset = training.algo, training.dataset
    scores: dict[str, Score | None] = {"validation": None, training.evaluate_on: training.score}
    test = scores.get("test") or score(algo, dataset.test)
    validation = scores["validation"] or (score(algo, dataset.validation) if len(dataset.validation) else None)
    weights = {name: value.cpu().contiguous() for name, value in algo.blocks.model.state_dict().items()}
    write_atomically(out / "model.safetensors", save(weights))
    summary = {
        "algorithm": settings.algorithm,
        "form": settings.form if settings.algorithm == "blockprop" else None,
        "data": settings.data,
        "model": settings.model,
        "blocks": settings.blocks,
        "cut": algo.blocks.cut.as_dict(),
        "seed": settings.seed,
        "epochs": round(training.step / training.steps_per_epoch, 4),
        "steps": training.step,
        "samples": training.samples,
        "seconds": training.seconds,
        "samples_per_second": training.samples / training.seconds if training.seconds else 0.0,
        "train_loss": training.last_epoch.get("loss"),
        "validation_loss": validation.loss if validation else None,
        "validation_accuracy": validation.accuracy if validation else None,
        "test_loss": test.loss,
        "test_accuracy": test.accuracy,
        "gluing_loss": training.last_epoch.get("gluing_loss", []),
        "unstable_steps": training.last_epoch.get("unstable_steps", 0),
        "versions": _versions(),
    }
    if settings.epochs is not None:
        summary["epochs"] = settings.epochs
    write_json(out / "summary.json", summary)
    return summary


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object to a file, atomically; NaN and infinity become null."""
    write_atomically(path, (json.dumps(finite(content), indent=2) + "\n").encode())


def _versions() -> dict[str, str]:
    return {
        "blockprop": blockprop.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
    }
