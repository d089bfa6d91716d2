"""Feedback that examples had before: kept by example at a link, and made a target again at a later visit."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blockprop.cache import GluingCache
from blockprop.curvature import Curvature
from blockprop.gluing import Gluing
from blockprop.objective import TargetTerm
from blockprop.ways import averaged, projected

__all__ = ["Recall", "Recalled"]


@dataclass(frozen=True)
class Recalled:
    """What is remembered of a batch's examples.

    Attributes:
        target: of the output, around where each example's was when its feedback was taken.
        anchor: those outputs; today's, of examples without an entry, which say nothing.
        squared: ‖h* - anchor‖², summed over the batch: a scalar tensor.
        age: visits since the entries were made, mean over the batch.
        curvature: κ of the target; mean over the batch, where every example has its own.
    """

    target: TargetTerm
    anchor: Tensor
    squared: Tensor
    age: float
    curvature: float


class Recall:
    """What a block remembers of the feedback on its outputs.

    Args:
        cache: of one link.
        curvature: κ along each example's slope.
        link: its number there, from 0 at the bottom.
    """

    def __init__(self, cache: GluingCache, curvature: Curvature, link: int) -> None:
        self._cache, self._curvature, self._link = cache, curvature, link
        self._count = 1.0  # predictions per example, of the latest feedback

    @property
    def size(self) -> int:
        """Bytes."""
        return self._cache.size(self._cache.shapes) if self._cache.shapes else 0

    def keep(self, ids: Tensor, old: Tensor, gluing: Gluing, share: float, tick: int) -> None:
        """Keep feedback by example; what is replaced tells the curvature along the slope, at no cost.

        Args:
            ids: the examples' numbers, int64 [N].
            old: the output that it was taken at, shape [N, ...].
            gluing: the feedback; its anchor is not looked at.
            share: the microbatch's share of its batch.
            tick: now.
        """
        now = gluing.direction * gluing.count
        self._count = gluing.count * share / len(old)
        self._cache.fit([old.shape[1:]])
        if (self._cache.written(ids) >= 0).all():
            anchor, then = (value.to(old) for value in self._cache.read(0, ids))
            self._curvature.measure(self._link, projected(old - anchor, then), now - then, then)
        self._cache.write(0, ids, old, now, step=tick)

    def target(self, ids: Tensor, output: Tensor, share: float) -> Recalled:
        """The target of a fresh output, from the feedback that its examples had before; it counts as a visit.

        Args:
            ids: the examples' numbers, int64 [N].
            output: b_k(h_k), detached, shape [N, ...].
            share: the microbatch's share of its batch.
        """
        self._cache.fit([output.shape[1:]])
        known = (self._cache.written(ids)[0] >= 0).view(-1, *[1] * (output.ndim - 1))
        anchor, direction = (value.to(output) for value in self._cache.read(0, ids))
        anchor = torch.where(known.to(output.device), anchor, output)
        self._cache.visit(ids)
        count = self._count * len(output) / share
        slope = Gluing(anchor, direction / count, count)
        kappa = self._curvature.at(self._link, direction)
        target = TargetTerm(anchor, slope.direction, slope.count, kappa, along=True)
        age = float(self._cache.visits(ids)[0].float().mean())
        return Recalled(target, anchor, slope.squared_sum, age, averaged(kappa))

    def state_dict(self) -> dict[str, Any]:
        """All entries: a tree for a checkpoint. The curvature has its own."""
        return {"count": self._count, "cache": self._cache.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self._count = state["count"]
        if state["cache"] is not None:
            self._cache.load_state_dict(state["cache"])
