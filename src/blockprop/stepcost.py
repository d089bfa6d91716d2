"""What a step costs (Appendix A): C(forward), C(h-step) and C(W-step), in FLOPs that ran or in seconds.

The same calls are metered that a step makes: a stage's forward pass, its h-step, its W-gradient, its update.
"""

import copy
import random
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor, nn

from blockprop.algorithm import BlockProp
from blockprop.backprop import Backprop
from blockprop.blocks import Blocks
from blockprop.cost import counted, timed
from blockprop.forms import FormName, form_named
from blockprop.gluing import Gluing
from blockprop.hsolvers import GradientDescent
from blockprop.learner import Loss

__all__ = ["CASES", "Case", "Costs", "StepCost", "step_costs"]

P = ParamSpec("P")
T = TypeVar("T")


class Meter(Protocol):
    """Calls a function: [`counted`][blockprop.cost.counted] or [`timed`][blockprop.cost.timed]."""

    def __call__(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> tuple[T, float]:
        """What the function returned, and what it cost."""
        ...


@dataclass(frozen=True)
class StepCost:
    """The parts of one step, in FLOPs or in seconds.

    Where one backward pass gives the h-gradient and the W-gradient, the h-step is charged with what it costs by
    itself, and the W-step with the rest.

    Attributes:
        forward: the forward pass that starts every h_k.
        h_step: all h-steps.
        w_step: all W-steps: the weights' gradients and the update.
    """

    forward: float
    h_step: float
    w_step: float

    @property
    def total(self) -> float:
        """C(total)."""
        return self.forward + self.h_step + self.w_step

    @classmethod
    def median(cls, costs: Sequence["StepCost"]) -> "StepCost":
        """The median of each part."""
        return cls(*(statistics.median(getattr(cost, field.name) for cost in costs) for field in fields(cls)))


@dataclass(frozen=True)
class Case:
    """A way to take a step.

    Attributes:
        form: its form.
        reuse: True to share graphs, as training does; False for Appendix A's accounting, in which every gradient
            of an h_k and of a block's weights has a forward pass of its own.
        cached: True for an iteration without h-steps: the targets (and, in the published order, every block's
            input) are those that an earlier iteration has stored, as between the h-steps of Algorithm 2.
    """

    form: FormName
    reuse: bool = True
    cached: bool = False

    def __str__(self) -> str:
        return self.form + ("" if self.reuse else ", nothing shared") + (", cached" if self.cached else "")


CASES = (
    Case("published", reuse=False),
    *(Case(form, cached=cached) for form in ("published", "rescaled", "exact", "proximal") for cached in (False, True)),
)
"""Every form, as the paper counts where it does, with and without caching."""


@dataclass(frozen=True)
class Costs:
    """What `step_costs` found; every number is FLOPs, or every number is seconds.

    Attributes:
        forward: C(forward), a forward pass without a graph.
        backprop: C(backprop), a step of [`Backprop`][blockprop.backprop.Backprop]: both passes and the update.
        h_steps: N_h.
        cases: the cost of each case.
    """

    forward: float
    backprop: float
    h_steps: int
    cases: dict[Case, StepCost]

    @property
    def lower(self) -> float:
        """Appendix A's lower bound of C(total): C(backprop) + C(forward)."""
        return self.backprop + self.forward

    def upper(self, case: Case) -> float:
        """Appendix A's upper bound of C(total): C(forward) + (N_h + 1) C(backprop). The exact form has N_h = 1."""
        return self.forward + (_h_steps(case.form, self.h_steps) + 1) * self.backprop

    def verdict(self, case: Case) -> str:
        """Where C(total) lies: "below", "within" or "above" the bounds."""
        total = self.cases[case].total
        return "below" if total <= self.lower else "within" if total < self.upper(case) else "above"


def step_costs(
    blocks: Blocks,
    loss: Loss,
    inputs: Tensor,
    targets: Tensor,
    *,
    h_steps: int = 1,
    repeats: int = 0,
    cases: Iterable[Case] = CASES,
) -> Costs:
    """FLOPs of a step in each case, or with `repeats` the seconds. Works on a copy; the model is left as it is.

    FLOPs are those of matrix products, convolutions and attention, 2 a multiply-add; the update, like all
    elementwise work, counts as nothing. Seconds are the processor's, medians of `repeats` rounds after a warm-up; in
    a round every case has its turn, in an order drawn anew. They are of use on the CPU, with one thread (set it
    beforehand): the work on other devices is not in them.

    Args:
        blocks: what [`split`][blockprop.split.split] returned.
        loss: as in [`BlockProp`][blockprop.algorithm.BlockProp].
        inputs: a batch, shape [N, ...].
        targets: its targets, N rows.
        h_steps: N_h, default 1; the exact form takes one in any case.
        repeats: 0 (default) to count FLOPs, or the rounds to time.
        cases: what is metered, default all.

    Raises:
        ValueError: fewer than two blocks, a number out of range, or what a step refuses.

    >>> from blockprop.split import split
    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    >>> batch = torch.zeros(1, 8), torch.tensor([0])
    >>> costs = step_costs(split(model, 2), nn.CrossEntropyLoss(), *batch, cases=[Case("exact")])
    >>> costs.forward, costs.backprop, costs.cases[Case("exact")].total
    (256.0, 640.0, 640.0)
    """
    if len(blocks) < 2:
        raise ValueError(f"a network of {len(blocks)} block has no h-step to cost; expected at least 2 blocks")
    if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 0:
        raise ValueError(f"repeats is {repeats}; expected a whole number of at least 0")
    meter: Meter = timed if repeats else counted
    model = copy.deepcopy(blocks)
    model.model.train()
    backprop = Backprop(model, loss, _standing)
    algos = {case: _algorithm(model, loss, case.form, h_steps) for case in cases}
    with torch.random.fork_rng():
        stores = {case: _stored(algo, inputs, targets) for case, algo in algos.items() if case.cached}

        def once(what: Case | str) -> StepCost:
            if isinstance(what, Case):
                if what.cached:
                    return _cached(algos[what], inputs, stores[what], meter)
                return _step(algos[what], inputs, targets, meter, reuse=what.reuse)
            if what == "backprop":
                return StepCost(0.0, 0.0, meter(backprop.step, inputs, targets)[1])
            with torch.no_grad():
                return StepCost(meter(model, inputs)[1], 0.0, 0.0)

        found = _rounds(["forward", "backprop", *algos], once, repeats)
    return Costs(found["forward"].total, found["backprop"].total, h_steps, {case: found[case] for case in algos})


def _rounds(
    names: Sequence[Case | str], once: Callable[[Case | str], StepCost], repeats: int
) -> dict[Case | str, StepCost]:
    """One cost each, or the medians of `repeats` after a round that does not count."""
    order = random.Random(0)
    rounds = [{name: once(name) for name in order.sample(names, len(names))} for _ in range(repeats + 1)]
    return {name: StepCost.median([costs[name] for costs in rounds[1:] or rounds]) for name in names}


def _standing(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """An update that costs what an update costs and moves nothing."""
    return torch.optim.SGD(parameters, lr=0.0)


def _h_steps(form: FormName, h_steps: int) -> int:
    return 1 if form == "exact" else h_steps


def _algorithm(blocks: Blocks, loss: Loss, form: FormName, h_steps: int) -> BlockProp:
    # λ = 1; with several steps, small ones, so that all are taken
    product = form_named(form).default_scale if _h_steps(form, h_steps) == 1 else 0.02
    solver = GradientDescent(_h_steps(form, h_steps), product / 2)
    return BlockProp(blocks, loss, _standing, form=form, h_solver=solver)


def _step(algo: BlockProp, inputs: Tensor, targets: Tensor, meter: Meter, *, reuse: bool) -> StepCost:
    """An iteration of Algorithm 1, in the order of `LocalExecutor`."""
    forward = h_step = w_step = 0.0
    evaluations, h = [], inputs
    for stage in algo.stages:
        evaluation, cost = meter(stage.forward, h, keep_graph=reuse, repeatable=not reuse)
        evaluations.append(evaluation)
        h, forward = evaluation.output, forward + cost
    target: Tensor | Gluing = targets
    for stage, evaluation in zip(reversed(algo.stages), reversed(evaluations), strict=True):
        if stage.below is None:
            w_step += meter(stage.add_gradient, evaluation, target)[1]
        else:
            feedback, alone = meter(stage.h_step, evaluation, target, with_gradient=False)
            h_step += alone
            if stage.form.at_forward:
                feedback, both = meter(stage.h_step, evaluation, target, with_gradient=True)
                w_step += both - alone
            else:
                w_step += meter(stage.add_gradient, evaluation, target, feedback)[1]
            target = feedback.gluing
        w_step += meter(stage.update)[1]
    return StepCost(forward, h_step, w_step)


def _stored(algo: BlockProp, inputs: Tensor, targets: Tensor) -> list[Tensor | Gluing]:
    """What an iteration leaves behind: h*_2..h*_K and the labels, which are the blocks' targets, bottom first."""
    evaluations, h = [], inputs
    for stage in algo.stages:
        evaluations.append(stage.forward(h))
        h = evaluations[-1].output
    found: list[Tensor | Gluing] = [targets]
    for stage, evaluation in zip(algo.stages[:0:-1], evaluations[:0:-1], strict=True):
        found.insert(0, stage.h_step(evaluation, found[0], with_gradient=False).gluing)
    return found


def _cached(algo: BlockProp, inputs: Tensor, store: Sequence[Tensor | Gluing], meter: Meter) -> StepCost:
    """An iteration of W-steps alone: on a fresh forward pass, or in the published order at the stored h*_k."""
    forward = w_step = 0.0
    h = inputs
    for stage, target in zip(algo.stages, store, strict=True):
        evaluation, cost = meter(stage.forward, h)
        if stage.form.at_forward:
            h, forward = evaluation.output, forward + cost
        else:
            h, w_step = target.value if isinstance(target, Gluing) else h, w_step + cost
        w_step += meter(stage.add_gradient, evaluation, target)[1]
        w_step += meter(stage.update)[1]
    return StepCost(forward, 0.0, w_step)
