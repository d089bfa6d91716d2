"""The optimizer of every block, and how its step size rises and falls over the run."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from blockprop.experiments.optimizers import optimizer_named
from blockprop.experiments.settings import Settings
from blockprop.proximal import proximal_sgd
from blockprop.schedules import delay
from blockprop.wstep import OptimizerFactory

__all__ = ["optimizers_of", "schedulers_of", "warmup_of"]


def optimizers_of(settings: Settings, blocks: Iterable[nn.Module]) -> list[OptimizerFactory]:
    """One optimizer factory per block.

    Raises:
        ValueError: proximal W-steps with another optimizer than sgd.
    """
    assert settings.lr is not None and settings.optimizer is not None and settings.momentum is not None
    rates = settings.block_lr or (settings.lr,) * settings.blocks
    more = (settings.momentum, settings.weight_decay)
    if settings.w_damping is not None and settings.optimizer != "sgd":
        raise ValueError(f"--w-damping is of sgd, not of {settings.optimizer}: leave it out")
    if settings.w_damping is not None:
        pairs = zip(blocks, rates, strict=True)
        return [proximal_sgd(block, rate, *more, damping=settings.w_damping) for block, rate in pairs]
    return [optimizer_named(settings.optimizer, rate, *more) for rate in rates]


def warmup_of(settings: Settings, total_steps: int) -> int:
    """Steps over which step sizes rise; of a pipeline a tenth of the run, unless it is said."""
    if settings.warmup is not None:
        return settings.warmup
    return total_steps // 10 if _pipelined(settings) else 0


def _pipelined(settings: Settings) -> bool:
    return settings.who_does_what == "pipelined" and settings.algorithm == "blockprop"


def schedulers_of(settings: Settings, total_steps: int) -> list[Callable[[Optimizer], Any]] | None:
    """Of each block: warm-up, decay, the rise from a step size over the delay; None if all are constant."""
    warmup = warmup_of(settings, total_steps)
    annealing = settings.delay_annealing if _pipelined(settings) else 0
    # given in steps; a scheduler counts updates
    warmup, annealing = (math.ceil(steps / max(1, settings.accumulate)) for steps in (warmup, annealing))
    if settings.lr_schedule == "constant" and warmup == annealing == 0:
        return None
    updates = max(1, total_steps // settings.accumulate)

    def factor(update: int) -> float:
        rise = min(1.0, (update + 1) / warmup) if warmup else 1.0
        if settings.lr_schedule == "constant":
            return rise
        share = max(0, update - warmup) / max(1, updates - warmup)
        return rise * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))

    def of_block(k: int) -> Callable[[Optimizer], Any]:
        late = max(1.0, delay(settings.blocks, k, settings.parts or 1, settings.messages_late.mean, settings.in_flight))

        def whole(update: int) -> float:
            held = late ** -(1 - min(1.0, update / annealing)) if annealing else 1.0
            return factor(update) * held

        return lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, whole)

    return [of_block(k) for k in range(1, settings.blocks + 1)]
