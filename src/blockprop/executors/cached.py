"""Cached targets: every batch goes up fresh, and on most visits no feedback comes down.

On the first visit of an example, and on every E-th after it, the batch is *refreshed*: one step of the exact form,
and the feedback of every link is stored by example, with the output that it was taken at. On the visits between,
each block learns from its cached feedback (`TargetTerm`) at the fresh input, and no h-step is made: there is no
gradient to compute in any block's input, and nobody waits for anybody above.

This is Algorithm 2 with cached targets and streamed inputs; [`ReplayedExecutor`][blockprop.executors.replayed]
is the published one, where inputs are cached as well.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from blockprop.cache import Entries, GluingCache
from blockprop.curvature import Curvature, Secant
from blockprop.evaluation import Evaluation
from blockprop.executors.executor import LinkReport, StepReport, Synchronous, check_finite
from blockprop.gluing import Gluing
from blockprop.losses import OutputLoss
from blockprop.objective import TargetTerm
from blockprop.stage import Link, Stage
from blockprop.ways import averaged, projected

__all__ = ["CachedExecutor"]


class CachedExecutor(Synchronous):
    """Runs the stages in turn, with feedback that is computed on every E-th visit only.

    A batch is refreshed if one of its examples has no entry yet or has used its entry E - 1 times; if the
    residual says so; or if the curvature wants to measure, which costs nothing beyond the refresh: what the
    blocks above say now, beside what they said then.

    Args:
        cache: where the entries are; the examples' numbers are its own.
        refresh: E ≥ 1, default 2; 1 is the exact form to the bit.
        curvature: κ of the targets, of the sum over predictions; default
            [`Secant`][blockprop.curvature.Secant], measured at refreshes.
        along: whether κ acts along each example's cached slope alone (default) or in all directions; see
            [`TargetTerm`][blockprop.objective.TargetTerm]. It is measured alike.
        residual: refresh as well where the correction κ(b_now(h) - b_old(h)) exceeds this many times the cached slope
            at some link, in norm over the batch; default None, never.

    Raises:
        ValueError: a setting out of its range.
    """

    def __init__(
        self,
        cache: GluingCache,
        *,
        refresh: int = 2,
        curvature: Curvature | None = None,
        along: bool = True,
        residual: float | None = None,
    ) -> None:
        if isinstance(refresh, bool) or not isinstance(refresh, int) or refresh < 1:
            raise ValueError(f"refresh is {refresh}; expected a whole number of visits, at least 1")
        if residual is not None and not 0 <= residual < float("inf"):
            raise ValueError(f"residual is {residual}; expected a finite number of at least 0, or None")
        self.cache = cache
        self.refresh = refresh
        self.curvature: Curvature = curvature or Secant()
        self.along = along
        self.residual = residual
        self.tick = 0

    def step(
        self,
        stages: Sequence[Stage],
        inputs: Tensor,
        targets: Tensor,
        *,
        ids: Tensor | None = None,
        update: bool = True,
        recompute: bool = False,
    ) -> StepReport:
        """One step on a batch; see [`Executor`][blockprop.executors.Executor].

        Without `update` the cache stays as it is too.

        Raises:
            ValueError: no ids, or ids that are none of the cache's; another form than the exact one; no room.
        """
        if any(stage.form.name != "exact" for stage in stages):
            raise ValueError("cached targets are defined for the form 'exact'; expected that, or no cache")
        ids = self.cache.check(ids, len(inputs))
        evaluations: list[Evaluation] = []
        h = inputs
        for stage in stages:
            evaluations.append(stage.forward(h, keep_graph=not recompute or stage is stages[-1]))
            h = evaluations[-1].output
        mean, count = stages[-1].term(targets).mean(h.detach())
        loss = check_finite(mean)
        outputs = [evaluation.output.detach() for evaluation in evaluations[:-1]]
        del h
        self.cache.fit([output.shape[1:] for output in outputs])

        visits = self.cache.visits(ids)
        entries = None if (visits < 0).any() else [self._entries(link, ids, at) for link, at in enumerate(outputs)]
        # what one link asks for, all get: the measurement is free once the batch is refreshed
        wanted = update and any(self.curvature.wants(link, len(outputs), self.tick) for link in range(len(outputs)))
        if entries is None or (visits >= self.refresh - 1).any() or wanted or self._spent(entries, outputs):
            links = self._refresh(stages, evaluations, targets, ids, update, entries if wanted else None)
        else:
            links = self._reuse(stages, evaluations, targets, entries, count, visits, update)
            if update:
                self.cache.visit(ids)
        self.tick += update
        return StepReport(loss, len(inputs), links)

    def close(self) -> None:
        """Nothing to give back."""

    def _entries(self, link: int, ids: Tensor, output: Tensor) -> Entries:
        return Entries(*(value.to(output.device) for value in self.cache.read(link, ids)))

    def _way(self, entry: Entries, output: Tensor) -> Tensor:
        """How far the output has moved since, in the directions that κ acts in."""
        moved = output - entry.anchor
        return projected(moved, entry.direction) if self.along else moved

    def _correction(self, link: int, entry: Entries, output: Tensor) -> Tensor:
        """What κ adds to the cached slope."""
        return self.curvature.at(link, entry.direction) * self._way(entry, output)

    def _spent(self, entries: Sequence[Entries], outputs: Sequence[Tensor]) -> bool:
        if self.residual is None:
            return False
        return any(
            _norm(self._correction(link, entry, output)) > self.residual * _norm(entry.direction)
            for link, (entry, output) in enumerate(zip(entries, outputs, strict=True))
        )

    def _refresh(
        self,
        stages: Sequence[Stage],
        evaluations: list[Evaluation],
        targets: Tensor,
        ids: Tensor,
        update: bool,
        measured: Sequence[Entries] | None,
    ) -> list[LinkReport]:
        """The exact form, as the local executor has it; what it sends down is stored, and compared with these."""
        links: list[LinkReport] = []
        target: Gluing | Tensor = targets
        for stage in reversed(stages):
            _, feedback = stage.train(evaluations.pop(), target)
            if update:
                stage.update()
            if feedback is None:
                continue
            links.append(LinkReport.of(feedback))
            target, link = feedback.gluing, stage.index - 2
            if not update:
                continue
            now = target.direction * target.count
            if measured is not None:
                self._measure(link, measured[link], Entries(target.anchor, now))
            self.cache.write(link, ids, target.anchor, now, step=self.tick)
        return links[::-1]

    def _measure(self, link: int, then: Entries, now: Entries) -> None:
        # both slopes are known: nothing is evaluated
        now = Entries(*(value.to(then.anchor.device) for value in now))  # from the device of the block above
        self.curvature.measure(link, self._way(then, now.anchor), now.direction - then.direction, then.direction)

    def _reuse(
        self,
        stages: Sequence[Stage],
        evaluations: list[Evaluation],
        targets: Tensor,
        entries: Sequence[Entries],
        count: float,
        visits: Tensor,
        update: bool,
    ) -> list[LinkReport]:
        """Every block's gradient in its weights alone, at the fresh input, from what is cached."""
        links: list[LinkReport] = []
        for link, (stage, entry) in enumerate(zip(stages, entries, strict=False)):
            evaluation = evaluations[link]
            curvature = self.curvature.at(link, entry.direction)
            output, slope = evaluation.output.detach(), entry.direction / count
            stage.add_gradient(evaluation, TargetTerm(entry.anchor, slope, count, curvature, self.along))
            corrected = entry.direction + self._correction(link, entry, output)
            age = float(visits[link].float().mean()) + 1
            report = _report(stage.above, corrected, output - entry.anchor, age)
            links.append(replace(report, curvature=averaged(curvature)))
        stages[-1].add_gradient(evaluations[-1], targets)
        if update:
            for stage in stages:
                stage.update()
        return links

    def state_dict(self) -> dict[str, Any]:
        """The cache, what is known of the curvature, and the number of the step: a tree for a checkpoint."""
        return {"tick": self.tick, "cache": self.cache.state_dict(), "curvature": self.curvature.state_dict()}

    def load_state_dict(self, state: dict[str, Any], stages: Sequence[Stage]) -> None:  # noqa: ARG002
        """Continue from what `state_dict` returned, with the same settings."""
        self.tick = state["tick"]
        self.cache.load_state_dict(state["cache"])
        self.curvature.load_state_dict(state["curvature"])


def _norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values))


def _report(above: Link | OutputLoss, slope: Tensor, moved: Tensor, age: float) -> LinkReport:
    """Of a link whose feedback was not computed: no h-step was taken."""
    assert isinstance(above, Link) and above.penalty.curvature is not None
    # with 2λγ_h = 1 the displacement is the slope over 2λ
    gluing_loss = (slope / above.penalty.curvature).square().sum() / len(slope)
    drift = float(moved.square().sum()) / len(moved)
    return LinkReport(gluing_loss, steps=0, residual=1.0, converged=False, stable=True, age=age, drift=drift)
