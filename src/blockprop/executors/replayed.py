"""Algorithm 2 as published: the gluing variables themselves are cached, and every block begins from its own.

Block k works at its cached h_k instead of at what the block below gives now, towards the cached h_{k+1}, so that no
block waits for another, in neither direction. docs/caching.md shows where this works and where it stops;
[`CachedExecutor`][blockprop.executors.cached.CachedExecutor] is the form to use.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from blockprop.cache import GluingCache
from blockprop.evaluation import Evaluation
from blockprop.executors.executor import LinkReport, StepReport, Synchronous, check_finite
from blockprop.gluing import Gluing
from blockprop.hsolvers import GradientDescent, Solution
from blockprop.objective import UpperTerm
from blockprop.stage import Feedback, Stage

__all__ = ["ReplayedExecutor"]


class ReplayedExecutor(Synchronous):
    """Algorithm 2: N_h gradient steps on L_k from the cached h_k, and the gradient of J_k from h*_k to h*_{k+1}.

    An example without entries is filled in by the forward pass at the present weights. The h-step is made if an
    example of the batch has no entry or has used its entry E - 1 times; in between only the weights move.

    Args:
        cache: where h_2, ..., h_K are, each as the output of the block below at its last h-step and its
            displacement from that.
        refresh: E ≥ 1, default 1.
        sweep: whether an h-step sees the h*_{k+1} of the same sweep, from the top down, as in Algorithm 1
            (default); or the cached one, so that the h-steps too are made all at once.

    Raises:
        ValueError: `refresh` out of range.
    """

    def __init__(self, cache: GluingCache, *, refresh: int = 1, sweep: bool = True) -> None:
        if isinstance(refresh, bool) or not isinstance(refresh, int) or refresh < 1:
            raise ValueError(f"refresh is {refresh}; expected a whole number of visits, at least 1")
        self.cache = cache
        self.refresh = refresh
        self.sweep = sweep
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
        """One iteration of Algorithm 2; see [`Executor`][blockprop.executors.Executor].

        The loss is that of the last block at its cached input, which is not the network's.

        Raises:
            ValueError: no ids, or ids that are none of the cache's; another form than the published one, or
                another solver than gradient descent; no room.
        """
        _check(stages)
        ids = self.cache.check(ids, len(inputs))
        visits = self.cache.visits(ids)
        missing = (visits < 0).any(0)
        due = bool(missing.any() or (visits >= self.refresh - 1).any())
        evaluations, cached = self._forward(stages, inputs, ids, missing, keep_graph=not recompute)
        mean, count = stages[-1].term(targets).mean(evaluations[-1].output.detach())
        loss = check_finite(mean)
        cached = [replace(gluing, count=count) for gluing in cached]
        self.cache.fit([gluing.anchor.shape[1:] for gluing in cached])

        outputs = [evaluation.output.detach() for evaluation in evaluations[:-1]]
        improved = self._h_steps(stages, evaluations, outputs, cached, targets) if due else cached
        for k, stage in enumerate(stages):
            target = targets if k == len(stages) - 1 else improved[k]
            point = _feedback(improved[k - 1], stage, mean) if due and k else None
            stage.add_gradient(evaluations[k], target, point)
        links = []
        for link, (old, new, output) in enumerate(zip(cached, improved, outputs, strict=True)):
            age = float((visits[link] + 1).float().mean()) if link < len(visits) else 0.0
            links.append(_report(stages[link + 1], old, new, output, age, due))
            if update and due:
                self.cache.write(link, ids, new.anchor, new.displacement, step=self.tick)
        if update:
            for stage in stages:
                stage.update()
            self.tick += 1
            if not due:
                self.cache.visit(ids)
        return StepReport(loss, len(inputs), links)

    def close(self) -> None:
        """Nothing to give back."""

    def _forward(
        self, stages: Sequence[Stage], inputs: Tensor, ids: Tensor, missing: Tensor, *, keep_graph: bool
    ) -> tuple[list[Evaluation], list[Gluing]]:
        """Every block at its cached input; where that is missing, at the output of the block below."""
        evaluations = [stages[0].forward(inputs, keep_graph=keep_graph, repeatable=True)]
        cached: list[Gluing] = []
        for link, stage in enumerate(stages[1:]):
            output = evaluations[-1].output.detach()
            anchor, direction = output, torch.zeros_like(output)
            if not missing.all():
                entries = [value.to(output) for value in self.cache.read(link, ids)]
                absent = missing.to(output.device).view(-1, *[1] * (output.ndim - 1))
                anchor, direction = (
                    torch.where(absent, new, old) for new, old in zip((anchor, direction), entries, strict=True)
                )
            cached.append(Gluing(anchor, direction, 1.0))
            evaluations.append(stage.forward(cached[-1].value, keep_graph=keep_graph, repeatable=True))
        return evaluations, cached

    def _h_steps(
        self,
        stages: Sequence[Stage],
        evaluations: Sequence[Evaluation],
        outputs: Sequence[Tensor],
        cached: Sequence[Gluing],
        targets: Tensor,
    ) -> list[Gluing]:
        improved = list(cached)
        for k in range(len(stages) - 1, 0, -1):
            above = improved if self.sweep else cached
            term = stages[k].term(targets if k == len(stages) - 1 else above[k])
            improved[k - 1] = _h_step(stages[k], evaluations[k], term, cached[k - 1], outputs[k - 1])
        return improved

    def state_dict(self) -> dict[str, Any]:
        """The cache and the number of the step: a tree for a checkpoint."""
        return {"tick": self.tick, "cache": self.cache.state_dict()}

    def load_state_dict(self, state: dict[str, Any], stages: Sequence[Stage]) -> None:  # noqa: ARG002
        """Continue from what `state_dict` returned, with the same settings."""
        self.tick = state["tick"]
        self.cache.load_state_dict(state["cache"])


def _check(stages: Sequence[Stage]) -> None:
    if any(stage.form.name != "published" for stage in stages):
        raise ValueError("cached inputs are defined for the form 'published'; expected that, or cached targets")
    for solver in (stage.below.solver for stage in stages if stage.below is not None):
        if not isinstance(solver, GradientDescent) or solver != GradientDescent(solver.steps, solver.lr):
            raise ValueError("Algorithm 2 takes plain gradient steps; expected GradientDescent(steps, lr) alone")


def _h_step(stage: Stage, evaluation: Evaluation, term: UpperTerm, start: Gluing, anchor: Tensor) -> Gluing:
    """N_h gradient steps on L_k from the cached h_k, held to b_{k-1}(h_{k-1}) at the present weights."""
    assert stage.below is not None and isinstance(stage.below.solver, GradientDescent)
    penalty, solver = stage.below.penalty, stage.below.solver
    assert solver.lr is not None
    start, anchor = start.to(stage.device), anchor.to(stage.device)
    displacement, count = start.residual(anchor), start.count
    point, output = evaluation.input, evaluation.with_graph().output
    for taken in range(solver.steps):
        if taken:
            point = (anchor + displacement).requires_grad_()
            output = evaluation(point)
        mean, count = term.mean(output)
        (slope,) = torch.autograd.grad(mean * count, point)
        way = displacement.clone().requires_grad_()
        (pull,) = torch.autograd.grad(penalty(Gluing(anchor, way, count), anchor).sum(), way)
        displacement = displacement - solver.lr * (slope + pull)
    return Gluing(anchor, displacement, count)


def _feedback(gluing: Gluing, stage: Stage, term: Tensor) -> Feedback:
    """An h-step's result, as the W-step takes it."""
    assert stage.below is not None and isinstance(stage.below.solver, GradientDescent)
    return Feedback(Solution(gluing, stage.below.solver.steps, 1.0, False, True), term)


def _report(stage: Stage, old: Gluing, new: Gluing, output: Tensor, age: float, due: bool) -> LinkReport:
    assert stage.below is not None and isinstance(stage.below.solver, GradientDescent)
    drift = float((output - old.anchor).square().sum()) / len(output)
    gluing_loss = new.to(output.device).residual(output).square().sum() / len(output)
    steps = stage.below.solver.steps if due else 0
    return LinkReport(gluing_loss, steps, residual=1.0, converged=False, stable=True, age=age, drift=drift)
