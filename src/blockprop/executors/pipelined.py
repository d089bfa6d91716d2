"""Carries out a schedule tick by tick in this thread: what a pipeline of devices would compute, exactly.

What a block has on its way is its evaluation of each batch whose feedback has not come back. When it comes, the
block evaluates the same batch again at its present weights, with the same dropout masks, and takes its gradient
there, against the target that the feedback makes of the output it had sent (`TargetTerm`).
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from blockprop.curvature import Constant, Curvature, Secant
from blockprop.evaluation import Evaluation
from blockprop.executors.executor import LinkReport, StepReport, check_finite
from blockprop.gluing import Gluing
from blockprop.losses import OutputLoss
from blockprop.objective import TargetTerm, projected
from blockprop.schedules import Action, Latency, Tick, pipelined
from blockprop.stage import Stage

__all__ = ["PipelinedExecutor"]


@dataclass
class _Part:
    """A microbatch: its labels, its share of its batch, and the number of its examples."""

    inputs: Tensor
    labels: Tensor
    share: float


class PipelinedExecutor:
    """All blocks busy in every tick; none waits for another.

    Args:
        schedule: from K to the ticks. Default: [`pipelined`][blockprop.schedules.pipelined] with the two below.
        microbatches: M, into how many parts a batch is cut; default 1.
        latency: of the messages.
        curvature: κ of the targets; default [`Secant`][blockprop.curvature.Secant], measured while training.
        along: let κ act along each example's own slope alone (`TargetTerm`); default False.
        across: the curvature across the slopes, if `along`; default none, 0.
        reuse: take the gradient on the graph of the forward pass and at the weights that it had (weight stashing), for
            three passes instead of four. Nothing has moved there, so that the feedback is the delayed gradient.
        prediction: at which weights a block forwards: its present ones moved on by so many of the updates that it will
            make until the feedback is back, along the running mean of its updates; default 0, between 0 and 1.
        compensation: λ of DC-ASGD (Zheng et al. 2017), which adds λ g² (w_now - w_forward) to the stashed gradient g,
            entry by entry; default 0. Needs `reuse`.

    Raises:
        ValueError: a setting out of its range.

    A step takes one batch in, and trains on what has arrived: its report is of the batches that reached the top
    in the meantime, and in the first steps there is none (the loss is NaN).
    """

    def __init__(
        self,
        schedule: Callable[[int], Iterator[Tick]] | None = None,
        *,
        microbatches: int = 1,
        latency: Latency = Latency(),  # noqa: B008
        curvature: Curvature | None = None,
        along: bool = False,
        across: Curvature | None = None,
        reuse: bool = False,
        prediction: float = 0.0,
        compensation: float = 0.0,
    ) -> None:
        if not 0 <= prediction < math.inf:
            raise ValueError(f"prediction is {prediction}; expected a finite number of at least 0")
        if not 0 <= compensation < math.inf:
            raise ValueError(f"compensation is {compensation}; expected a finite number of at least 0")
        if compensation and not reuse:
            raise ValueError("compensation corrects gradients at stashed weights; expected reuse=True with it")
        if prediction and reuse:
            raise ValueError("reuse keeps the weights of the forward pass; expected no prediction with it")
        self.along, self.reuse, self.prediction, self.compensation = along, reuse, prediction, compensation
        self._velocity: dict[int, list[Tensor]] = {}  # running mean of each block's updates
        self._watched: dict[int, tuple[float, float] | None] = {}
        self.microbatches = microbatches
        self.schedule = schedule or (lambda blocks: pipelined(blocks, microbatches=microbatches, latency=latency))
        if across is not None and not along:
            raise ValueError("a curvature across the slopes is given; expected along=True with it")
        self.curvature: Curvature = curvature or Secant()
        self.across: Curvature = across or Constant(0.0)
        self._ticks: Iterator[Tick] | None = None
        self._next: Tick = ()
        self.tick = 0
        self._fed = 0
        self._parts: dict[int, _Part] = {}
        self._outputs: dict[tuple[int, int], Tensor] = {}  # on their way up, by receiver
        self._feedback: dict[tuple[int, int], Gluing] = {}  # on their way down, by receiver
        self._flights: list[dict[int, Evaluation]] = []
        self._sent: dict[tuple[int, int], int] = {}
        self._learnt: set[int] = set()  # blocks with a gradient that is not yet used

    def step(
        self,
        stages: Sequence[Stage],
        inputs: Tensor,
        targets: Tensor,
        *,
        ids: Tensor | None = None,  # noqa: ARG002 - every example is fresh
        update: bool = True,
        recompute: bool = False,  # noqa: ARG002 - it always does
    ) -> StepReport:
        """Take a batch in, and train on what has arrived.

        Raises:
            ValueError: `update` is False: there is no one batch of which the gradient would be; another form than
                the exact one.
        """
        if not update:
            raise ValueError("in a pipeline the blocks learn from different batches; expected the executor 'local'")
        self._begin(stages)
        parts = zip(inputs.tensor_split(self.microbatches), targets.tensor_split(self.microbatches), strict=True)
        for number, (x, y) in enumerate(parts, self._fed):
            if len(x):
                self._parts[number] = _Part(x, y, len(x) / len(inputs))
        self._fed += self.microbatches
        report = _Report(len(stages) - 1)
        while not any(kind == "forward" and k == 1 and number >= self._fed for k, kind, number in self._next):
            self._carry_out(stages, report)
        return report.made(len(inputs))

    def drain(self, stages: Sequence[Stage]) -> StepReport:
        """Train on what is still on its way, and take nothing new in."""
        report = _Report(len(stages) - 1)
        if self._ticks is not None:
            while self._parts:
                self._carry_out(stages, report)
        return report.made(0)

    def close(self) -> None:
        """Nothing to give back."""

    def _begin(self, stages: Sequence[Stage]) -> None:
        if self._ticks is not None:
            return
        if any(not stage.form.at_forward or stage.scale != 1 for stage in stages):
            raise ValueError(
                "a pipelined schedule is defined for the form 'exact'; expected that, or the schedule 'sync'"
            )
        self._flights = self._flights or [{} for _ in stages]
        self._ticks = itertools.islice(self.schedule(len(stages)), self.tick, None)
        self._next = next(self._ticks)

    def _carry_out(self, stages: Sequence[Stage], report: "_Report") -> None:
        assert self._ticks is not None
        for action in self._next:
            self._act(stages, action, report)
        self.tick += 1
        self._next = next(self._ticks)

    def _act(self, stages: Sequence[Stage], action: Action, report: "_Report") -> None:
        k, kind, number = action
        stage = stages[k - 1]
        if kind == "update":
            if k in self._learnt:  # what the schedule updates while the pipeline runs empty has no gradient
                self._learnt.remove(k)
                self._update(k, stage)
        elif number not in self._parts:
            return  # of a batch that never came: the schedule goes on while the pipeline runs empty
        elif kind == "forward":
            h = self._parts[number].inputs if k == 1 else self._outputs.pop((k, number))
            top = k == len(stages)
            weights = None if top else self._weights(k, len(stages), stage)
            evaluation = stage.forward(h, keep_graph=top or self.reuse, repeatable=True, weights=weights)
            self._flights[k - 1][number] = evaluation
            self._sent[k, number] = self.tick
            if k < len(stages):
                self._outputs[k + 1, number] = evaluation.output
        elif kind == "drop":
            del self._flights[k - 1][number], self._sent[k, number]
            self._feedback.pop((k, number), None)
            if k == 1:
                del self._parts[number]
        else:
            self._backward(stages, k, number, report)

    def _backward(self, stages: Sequence[Stage], k: int, number: int, report: "_Report") -> None:
        stage, part = stages[k - 1], self._parts[number]
        evaluation = self._flights[k - 1].pop(number)
        age = self.tick - self._sent.pop((k, number))
        self._learnt.add(k)
        if k == len(stages):
            term, feedback = stage.train(evaluation, part.labels, share=part.share)
            report.loss(check_finite(term), part)
        else:
            gluing = self._feedback.pop((k, number))
            old = evaluation.output.detach()
            if not self.reuse:
                evaluation.at_present_weights()
            new = evaluation.with_graph().output.detach()
            if self.curvature.wants(k - 1, len(stages) - 1, self.tick):
                way = projected(new - old, gluing.direction) if self.along else new - old
                slope = _slope_above(stages[k:], part.labels)
                self.curvature.measure(k - 1, old, old + way, slope)
                self.across.measure(k - 1, old, new - way, slope)
            kappa, across = self.curvature.at(k - 1), self.across.at(k - 1)
            target = TargetTerm(old, gluing.direction, gluing.count, kappa, self.along, across)
            before = [p.grad for p in stage.wstep.parameters]
            _, feedback = stage.train(evaluation, target, share=part.share)
            if self.compensation:
                self._compensate(stage, before, list(evaluation.weights.values()))
            if self._watched.get(k, ()) is None:
                self._watched[k] = _alignment(stages, k, part, before)
            report.link(k - 1, age, new - old, part)
        if feedback is not None:
            self._feedback[k - 1, number] = feedback.gluing
            report.feedback(k - 2, LinkReport.of(feedback), part)
        if k == 1:
            del self._parts[number]

    def watch(self, blocks: int) -> None:
        """Compare the next gradient of every block with today's backprop gradient on the same microbatch."""
        self._watched = dict.fromkeys(range(1, blocks), None)

    def watched(self) -> list[tuple[float, float]] | None:
        """Cosine and norm ratio of every block, bottom first, once each after `watch`; None while one is missing.

        The last block is never late: (1, 1). With dropout the masks are not the same ones.
        """
        found = [pair for pair in self._watched.values() if pair is not None]
        if not 0 < len(found) == len(self._watched):
            return None
        self._watched = {}
        return [*found, (1.0, 1.0)]

    def _weights(self, k: int, blocks: int, stage: Stage) -> dict[str, Tensor] | None:
        """The weights that a block forwards with, where they are not its present ones as they stand."""
        own = {name: p for name, p in stage.block.named_parameters() if p.requires_grad}
        if self.reuse:
            return {name: p.detach().clone().requires_grad_() for name, p in own.items()}
        if not self.prediction or k not in self._velocity:
            return None
        updates = self.prediction * max(0, 2 * (blocks - k) - 1) / self.microbatches
        moved = zip(own.items(), self._velocity[k], strict=True)
        return {name: torch.add(p.detach(), step, alpha=updates) for (name, p), step in moved}

    def _update(self, k: int, stage: Stage) -> None:
        if not self.prediction:
            stage.update()
            return
        before = [p.detach().clone() for p in stage.wstep.parameters]
        stage.update()
        steps = [p.detach() - old for p, old in zip(stage.wstep.parameters, before, strict=True)]
        if k not in self._velocity:
            self._velocity[k] = steps
        for mean, step in zip(self._velocity[k], steps, strict=True):
            mean.lerp_(step, 0.1)

    @torch.no_grad()
    def _compensate(self, stage: Stage, before: list[Tensor | None], stashed: list[Tensor]) -> None:
        for parameter, old, weight in zip(stage.wstep.parameters, before, stashed, strict=True):
            if parameter.grad is not None:
                fresh = parameter.grad if old is None else parameter.grad - old
                parameter.grad = parameter.grad + self.compensation * fresh.square() * (parameter - weight)

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule is, what is on its way, what is known of the curvature: a tree for a checkpoint."""
        return {
            "tick": self.tick,
            "fed": self._fed,
            "parts": [[n, part.inputs, part.labels, part.share] for n, part in self._parts.items()],
            "outputs": [[k, n, value.detach()] for (k, n), value in self._outputs.items()],
            "feedback": [[k, n, g.anchor, g.direction, g.count, g.scale] for (k, n), g in self._feedback.items()],
            "flights": [[[n, e.state()] for n, e in flights.items()] for flights in self._flights],
            "sent": [[k, n, tick] for (k, n), tick in self._sent.items()],
            "learnt": sorted(self._learnt),
            "velocity": dict(self._velocity),
            "curvature": self.curvature.state_dict(),
            "across": self.across.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], stages: Sequence[Stage]) -> None:
        """Continue from what `state_dict` returned, with the same settings."""
        self.tick, self._fed = state["tick"], state["fed"]
        self._parts = {n: _Part(inputs, labels, share) for n, inputs, labels, share in state["parts"]}
        self._outputs = {(k, n): value for k, n, value in state["outputs"]}
        self._feedback = {(k, n): Gluing(*gluing) for k, n, *gluing in state["feedback"]}
        self._flights = [
            {
                n: Evaluation.restored(
                    stage.block, saved, differentiable=stage.below is not None, precision=stage.precision
                )
                for n, saved in flights
            }
            for stage, flights in zip(stages, state["flights"], strict=False)
        ]
        self._sent = {(k, n): tick for k, n, tick in state["sent"]}
        self._learnt = set(state["learnt"])
        self._velocity = state["velocity"]
        self.curvature.load_state_dict(state["curvature"])
        self.across.load_state_dict(state["across"])
        self._ticks = None


def _slope_above(stages: Sequence[Stage], labels: Tensor) -> Callable[[Tensor], Tensor]:
    """Today's gradient of the summed loss in an output of the block below these; leaves no trace in them.

    The dropout masks are drawn anew, and are the same at every call.
    """
    buffers = [{name: buffer.clone() for name, buffer in stage.block.named_buffers()} for stage in stages]
    loss = stages[-1].above
    assert isinstance(loss, OutputLoss)

    def slope(output: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_()
        h = leaf
        with torch.random.fork_rng(devices=[leaf.device] if leaf.is_cuda else []), torch.enable_grad():
            for stage, state in zip(stages, buffers, strict=True):
                copies = {name: buffer.clone() for name, buffer in state.items()}
                h = functional_call(stage.block, copies, (h.to(stage.device),))
            mean, count = loss(h, labels.to(h.device))
        return torch.autograd.grad(mean * count, leaf)[0]

    return slope


def _alignment(stages: Sequence[Stage], k: int, part: _Part, before: Sequence[Tensor | None]) -> tuple[float, float]:
    """Cosine and norm ratio of what was added to block k's gradient to backprop's at the weights of today."""
    loss = stages[-1].above
    assert isinstance(loss, OutputLoss)
    parameters = stages[k - 1].wstep.parameters
    h = part.inputs
    with torch.random.fork_rng(devices=[h.device] if h.is_cuda else []), torch.enable_grad():
        for stage in stages:
            copies = {name: buffer.clone() for name, buffer in stage.block.named_buffers()}
            h = functional_call(stage.block, copies, (h.to(stage.device),))
        mean, _ = loss(h, part.labels.to(h.device))
    today = torch.autograd.grad(mean * part.share, parameters, allow_unused=True)
    ours, theirs = [], []
    for parameter, old, new in zip(parameters, before, today, strict=True):
        if parameter.grad is None or new is None:
            continue
        ours.append((parameter.grad if old is None else parameter.grad - old).double().flatten())
        theirs.append(new.double().flatten())
    if not ours:
        return math.nan, math.nan
    one, other = torch.cat(ours), torch.cat(theirs)
    norms = float(one.norm()), float(other.norm())
    return float(one @ other) / max(norms[0] * norms[1], 1e-300), norms[0] / max(norms[1], 1e-300)


class _Report:
    """Sums over the microbatches of a step."""

    def __init__(self, links: int) -> None:
        self._loss = [0.0, 0.0]
        self._links: list[LinkReport | None] = [None] * links
        self._ages = [0] * links
        self._drifts: list[float] = [0.0] * links

    def loss(self, value: float, part: _Part) -> None:
        self._loss[0] += value * part.share
        self._loss[1] += part.share

    def feedback(self, link: int, report: LinkReport, part: _Part) -> None:  # noqa: ARG002
        self._links[link] = report

    def link(self, link: int, age: int, moved: Tensor, part: _Part) -> None:  # noqa: ARG002
        self._ages[link] = age
        self._drifts[link] = float(moved.square().sum()) / len(moved)

    def made(self, examples: int) -> StepReport:
        total, share = self._loss
        links = [
            replace(link, age=age, drift=drift)
            for link, age, drift in zip(self._links, self._ages, self._drifts, strict=True)
            if link is not None
        ]
        # while the pipeline fills, the lower links have nothing to report yet
        complete = len(links) == len(self._links)
        return StepReport(total / share if share else math.nan, examples, links if complete else [])
