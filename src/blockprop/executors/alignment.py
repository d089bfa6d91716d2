"""How near the gradient of late feedback is to backprop's of today."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from blockprop.losses import OutputLoss
from blockprop.objective import LossTerm
from blockprop.probe import Probe
from blockprop.stage import Stage

__all__ = ["late_alignment"]


def late_alignment(
    stages: Sequence[Stage],
    k: int,
    inputs: Tensor,
    labels: Tensor,
    total: float | None,
    before: Sequence[Tensor | None],
) -> tuple[float, float]:
    """Cosine and norm ratio of what was added to block k's gradient, to backprop's at the weights of today.

    Args:
        stages: of all blocks, bottom first.
        k: the block, from 1.
        inputs: of the microbatch, shape [N, ...].
        labels: N rows.
        total: predictions of the whole batch, where this is a microbatch.
        before: the block's gradients, one per parameter, before the microbatch's was added (`WStep.hold`).

    Returns:
        The two; NaN for a block without gradients.
    """
    loss, wstep = stages[-1].above, stages[k - 1].wstep
    assert isinstance(loss, OutputLoss)
    h = inputs
    with torch.enable_grad():
        for stage in stages:
            h = Probe(stage).aside(h)
        mean, _ = LossTerm(loss, labels.to(h.device), total).mean(h)
    today = torch.autograd.grad(mean / wstep.accumulate, wstep.parameters, allow_unused=True)
    ours, theirs = [], []
    for parameter, old, new in zip(wstep.parameters, before, today, strict=True):
        if parameter.grad is None or new is None:
            continue
        ours.append((parameter.grad if old is None else parameter.grad - old).double().flatten())
        theirs.append(new.double().flatten())
    if not ours:
        return math.nan, math.nan
    one, other = torch.cat(ours), torch.cat(theirs)
    norms = float(one.norm()), float(other.norm())
    return float(one @ other) / max(norms[0] * norms[1], 1e-300), norms[0] / max(norms[1], 1e-300)
