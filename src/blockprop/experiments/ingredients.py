"""What a run is made of, from its settings: data, network, training, summary; in one process or in many."""

from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from blockprop import Backprop, BlockProp, OutputLoss, split
from blockprop.blocks import Blocks
from blockprop.data import Dataset, load
from blockprop.experiments.folder import origin, versions
from blockprop.experiments.rates import optimizers_of, schedulers_of, warmup_of
from blockprop.experiments.settings import Settings
from blockprop.models import build
from blockprop.training import Score, Training, score, weights_here

__all__ = ["config_of", "cut_of", "dataset_of", "network_of", "summary_of", "trainer_of", "training_of", "weights_of"]


def dataset_of(settings: Settings) -> Dataset:
    """The data, as much of it as is trained on."""
    dataset = load(
        settings.data,
        settings.data_dir,
        validation=settings.validation,
        context=settings.context,
        augment=settings.augment,
    )
    return dataset if settings.train_size is None else dataset.first(settings.train_size)


def network_of(settings: Settings, dataset: Dataset) -> nn.Sequential:
    """The network, with weights drawn from the generator as it stands."""
    assert settings.model is not None
    sizes = {"width": settings.width, "depth": settings.depth}
    return build(settings.model, dataset, **sizes, dropout=settings.dropout, norm=settings.norm)


def cut_of(settings: Settings, model: nn.Sequential, sample: Tensor) -> Blocks:
    """The network, cut."""
    if settings.split_at:
        return split(model, at=settings.split_at)
    return split(model, settings.blocks, by=settings.split_by, sample=sample, passes=settings.passes)


def trainer_of(settings: Settings, blocks: Blocks, dataset: Dataset, **more: Any) -> BlockProp | Backprop:
    """The algorithm; `more` are further arguments of it."""
    steps_per_epoch = -(-len(dataset.train) // max(1, settings.batch_size))
    total_steps = (settings.epochs or 0) * steps_per_epoch if settings.steps is None else settings.steps
    loss = OutputLoss(nn.CrossEntropyLoss(), class_dim=-1 if dataset.task == "language" else 1)
    common: dict[str, Any] = {
        "scheduler": schedulers_of(settings, total_steps),
        "clip": settings.clip,
        "accumulate": settings.accumulate,
        "precision": torch.bfloat16 if settings.precision == "bfloat16" else None,
        **more,
    }
    if settings.algorithm == "backprop":
        return Backprop(blocks, loss, optimizers_of(settings, blocks), **common)
    return BlockProp(
        blocks,
        loss,
        optimizers_of(settings, blocks),
        form=settings.form,
        penalty=settings.penalties(),
        h_solver=settings.solver(),
        **common,
    )


def training_of(
    settings: Settings, algo: BlockProp | Backprop, dataset: Dataset, on_step: Callable[[Training], None]
) -> Training:
    """The loop, with nothing written yet."""
    return Training(
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
        on_step=on_step,
    )


def config_of(settings: Settings, training: Training) -> dict[str, Any]:
    """What `config.json` says: the settings, what followed from model and data, and the versions."""
    return {
        **settings.as_dict(),
        "warmup_steps": warmup_of(settings, training.total_steps),
        "cut": training.algo.blocks.cut.as_dict(),
        "versions": versions(),
    }


def weights_of(training: Training) -> bytes:
    """The trained weights that are in this process, as a safetensors file."""
    weights = weights_here(training.algo.blocks.model)
    return save({name: value.cpu().contiguous() for name, value in weights.items()})


def summary_of(settings: Settings, training: Training) -> dict[str, Any]:
    """What came of a run: its last evaluation, or a new one, and where it stands."""
    algo, dataset = training.algo, training.dataset
    scores: dict[str, Score | None] = {"validation": None, training.evaluate_on: training.score}
    test = scores.get("test") or score(algo, dataset.test)
    validation = scores["validation"] or (score(algo, dataset.validation) if len(dataset.validation) else None)
    epochs = round(training.step / training.steps_per_epoch, 4)
    samples = training.samples * settings.replicas
    return {
        "algorithm": settings.algorithm,
        "form": settings.form if settings.algorithm == "blockprop" else None,
        "data": settings.data,
        "model": settings.model,
        "blocks": settings.blocks,
        "cut": algo.blocks.cut.as_dict(),
        "seed": settings.seed,
        "epochs": epochs if settings.epochs is None else settings.epochs,
        "steps": training.step,
        "samples": samples,
        "seconds": training.seconds,
        "samples_per_second": samples / training.seconds if training.seconds else 0.0,
        "train_loss": training.last_epoch.get("loss"),
        "validation_loss": validation.loss if validation else None,
        "validation_accuracy": validation.accuracy if validation else None,
        "test_loss": test.loss,
        "test_accuracy": test.accuracy,
        "gluing_loss": training.last_epoch.get("gluing_loss", []),
        "unstable_steps": training.last_epoch.get("unstable_steps", 0),
        "versions": versions(),
        "origin": origin(),
    }
