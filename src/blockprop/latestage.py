"""A stage of a pipeline: what it has on its way, and what it does with feedback that comes late.

A batch's *flight* is the stage's evaluation of it, from the forward pass until the feedback is back. While that is on
its way, or when it has come, the stage evaluates the batch again at its present weights, with the same dropout masks,
unless they are what they were; and takes its gradient there, against the target that the feedback makes of the output
it had sent (`TargetTerm`).

One late stage serves the simulation of a pipeline in one process and the runtime with a process for every block:
whoever runs it moves the messages.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blockprop.cache import GluingCache
from blockprop.correction import Correction
from blockprop.evaluation import Evaluation, microbatched
from blockprop.gluing import Gluing
from blockprop.held import Held
from blockprop.losses import OutputLoss
from blockprop.objective import LossTerm, TargetTerm, UpperTerm
from blockprop.probe import Points, Probe
from blockprop.recall import Recall
from blockprop.stage import Feedback, Stage
from blockprop.ways import averaged

__all__ = ["Flight", "LateStage", "Learnt"]

Ask = Callable[[Points], Points | None]
"""Slopes at some outputs of a block, from the blocks above it; None if they will come later (`LateStage.measured`)."""


@dataclass(frozen=True)
class Learnt:
    """What a stage did with feedback.

    Attributes:
        feedback: for the block below; None for the first block, or where none is due.
        gluing_loss: ‖h* - b_old(h)‖² per example, mean over the batch: a scalar tensor.
        age: ticks since the forward pass, or visits since the entries of the cache were made.
        drift: ‖b_now(h) - b_old(h)‖² per example, mean over the batch; NaN where b_now was not evaluated.
        curvature: κ of the target; mean over the batch, where every example has its own.
        limited: share of the examples whose correction was longer than is trusted.
        input_age: ticks that the output was on its way to the block above; NaN where it is not known here.
        cached: whether the feedback came from the cache.
    """

    feedback: Feedback | None
    gluing_loss: Tensor
    age: float
    drift: float
    curvature: float = 0.0
    limited: float = 0.0
    input_age: float = math.nan
    cached: bool = False


@dataclass
class Flight:
    """A batch on its way.

    Attributes:
        evaluation: of the batch, at the weights of its forward pass; at the present ones once `old` is there.
        tick: when it was forwarded.
        version: how many updates the block had made by then.
        old: b_old(h), the output that was sent, where the batch has been evaluated anew since.
    """

    evaluation: Evaluation
    tick: int
    version: int
    old: Tensor | None = None

    @property
    def sent(self) -> Tensor:
        """b_old(h)."""
        return self.evaluation.output.detach() if self.old is None else self.old


class LateStage:
    """A stage, its flights, and how it corrects late feedback.

    Args:
        stage: block k.
        blocks: K.
        correction: what is made of late feedback.
        updates: how many updates the block will make until feedback is back, as far as is known beforehand.
        parts: M, microbatches of a batch.
        cache: feedback by example, of the link above; None for none.

    Attributes:
        flights: the batches on their way, by number.
        most: the most so far that was held at the end of a forward pass.
    """

    def __init__(
        self,
        stage: Stage,
        blocks: int,
        correction: Correction,
        *,
        updates: float = 0.0,
        parts: int = 1,
        cache: GluingCache | None = None,
    ) -> None:
        self.stage = stage
        self.blocks = blocks
        self.correction = correction
        self.updates = updates
        self.parts = parts
        self.recall = None if cache is None else Recall(cache, correction.curvature, stage.index - 1)
        self.probe = Probe(stage)
        self.flights: dict[int, Flight] = {}
        # by place in the batch: whether no update came between forward and backward last time; a schedule repeats
        self._still: dict[int, bool] = {}
        self._velocity: list[Tensor] = []  # running mean of the updates
        self._copy: tuple[int, dict[str, Tensor]] | None = None  # the weights to forward with, and since which update
        self._fresh = False  # whether feedback came, or was lost, since the last update
        self._share = 0.0  # of a batch, that the gradients since the optimizer's last step are of
        self._lost = False  # whether some of it was lost
        self._latest: tuple[Evaluation, UpperTerm] | None = None  # what was learnt from last
        self.most = Held()

    @property
    def link(self) -> int:
        """Number of the link above, from 0 at the bottom."""
        return self.stage.index - 1

    @property
    def version(self) -> int:
        """How many updates the block has made."""
        return self.stage.wstep.calls

    @property
    def top(self) -> bool:
        """Whether this is the last block."""
        return self.stage.index == self.blocks

    def held(self) -> Held:
        """What is kept here beside the block's own weights, gradients and optimizer state."""
        flying = [flight.evaluation for flight in self.flights.values()]
        kept = [value for evaluation in flying for value in (evaluation.input, evaluation.output)]
        copies = [*(evaluation.weights for evaluation in flying), *([self._copy[1]] if self._copy else [])]
        stashed = {id(weights): weights for weights in copies}  # flights between two updates share theirs
        cached = 0 if self.recall is None else self.recall.size
        return Held(_bytes(kept), sum(_bytes(weights.values()) for weights in stashed.values()), cached)

    def forward(self, number: int, inputs: Tensor, tick: int, *, quiet: bool = False) -> Tensor:
        """Evaluate the block on a batch, and keep it on its way.

        Args:
            number: of the batch, or of the microbatch.
            inputs: h_k, shape [N, ...].
            tick: now.
            quiet: whether no feedback will come, and `learn_cached` follows at once, on this graph; default False.

        Returns:
            b_k(h_k), for the block above.
        """
        now = self.top or quiet
        weights = None if now else self._weights()
        keep = now or self.correction.reuse or self._still.get(number % self.parts, False)
        with microbatched(self.stage.block, self.parts):
            evaluation = self.stage.forward(inputs, keep_graph=keep, repeatable=True, weights=weights)
        self.flights[number] = Flight(evaluation, tick, self.version)
        self.most = self.most.most(self.held())
        return evaluation.output.detach()

    def learn_top(
        self, number: int, labels: Tensor, share: float = 1.0, *, total: float | None = None, quiet: bool = False
    ) -> tuple[Tensor, Feedback | None]:
        """The last block's gradient and h-step: its feedback is never late.

        Args:
            number: of a batch that was forwarded.
            labels: N rows.
            share: the microbatch's share of its batch; default 1.
            total: predictions of the whole batch, where this is a microbatch.
            quiet: whether no feedback is due, and no h-step to be made; default False.

        Returns:
            The loss, as much of the batch's mean as is this microbatch's; and the feedback for the block below, if
            there is one.
        """
        evaluation, loss = self.flights.pop(number).evaluation, self.stage.above
        assert isinstance(loss, OutputLoss)
        self._fresh = True
        self._share += share
        target = LossTerm(loss, labels.to(self.stage.device), total)
        self._latest = evaluation, target
        if quiet:
            return self.stage.add_gradient(evaluation, target), None
        return self.stage.train(evaluation, target)

    def renew(self, number: int) -> None:
        """Evaluate a batch at the present weights, unless they are what they were.

        `learn` does so itself; whoever calls this before it takes the feedback in has the feedback travel meanwhile.

        Args:
            number: of a batch on its way, of which the block learns before its next update.
        """
        flight = self.flights[number]
        if flight.old is not None:
            return
        evaluation, old = flight.evaluation, flight.sent
        # at the weights that it was evaluated with, it need not be evaluated again
        still = self._still[number % self.parts] = flight.version == self.version and not evaluation.weights
        if not self.correction.reuse and not still:
            evaluation.at_present_weights()
        evaluation.with_graph()
        flight.old = old

    def learn(
        self,
        number: int,
        gluing: Gluing,
        share: float,
        tick: int,
        *,
        ask: Ask | None = None,
        ids: Tensor | None = None,
    ) -> Learnt:
        """The gradient and the h-step of a block below the last, from feedback that has come back.

        Args:
            number: of a batch on its way.
            gluing: the feedback; its anchor is not looked at, since the output that was sent is at hand.
            share: the microbatch's share of its batch.
            tick: now.
            ask: whom to ask for slopes, where the curvature wants to be measured now; None for nobody.
            ids: the examples' numbers; with a cache the feedback is kept by them.
        """
        self.renew(number)
        flight = self.flights.pop(number)
        evaluation, old = flight.evaluation, flight.sent
        correction, gluing = self.correction, gluing.to(self.stage.device)
        self._fresh = True
        self._share += share
        new = evaluation.output.detach()
        if ask is not None:
            moved = evaluation.moved() if correction.reuse else new
            points = correction.points(old, moved, gluing.direction)
            if (slopes := ask(points)) is not None:
                self.measured(points, slopes)
        if self.recall is not None:
            assert ids is not None
            self.recall.keep(ids, old, gluing, share, tick)
        whole = gluing.direction * gluing.count
        kappa, across = (one.at(self.link, whole) for one in (correction.curvature, correction.across))
        longest = correction.longest(self.link, whole)
        target = TargetTerm(old, gluing.direction, gluing.count, kappa, correction.along, across, longest)
        before = self.stage.wstep.hold() if correction.compensation else []
        self._latest = None if correction.reuse else (evaluation, target)
        _, feedback = self.stage.train(evaluation, target)
        if correction.compensation:
            self._compensate(before, list(evaluation.weights.values()))
        return Learnt(
            feedback,
            gluing.squared_sum / len(new),
            age=tick - flight.tick,
            drift=math.nan if correction.reuse and flight.version != self.version else _drift(new, old),
            curvature=averaged(kappa),
            limited=target.limited(new),
        )

    def learn_cached(self, number: int, ids: Tensor, share: float) -> Learnt:
        """The gradient of a block below the last at a fresh batch, from the feedback that its examples had before.

        Nothing goes down, so that no gradient in the inputs is computed. Examples without an entry say nothing.

        Args:
            number: of a batch that was just forwarded.
            ids: the examples' numbers, int64 [N].
            share: the microbatch's share of its batch.
        """
        assert self.recall is not None
        flight = self.flights.pop(number)
        evaluation = flight.evaluation
        if flight.version != self.version:  # feedback that was lost has completed an update since
            evaluation.at_present_weights()
        output = evaluation.with_graph().output.detach()
        recalled = self.recall.target(ids, output, share)
        self._fresh = True
        self._share += share
        self.stage.add_gradient(evaluation, recalled.target)
        self._latest = evaluation, recalled.target
        return Learnt(
            None,
            recalled.squared / len(output),
            recalled.age,
            _drift(output, recalled.anchor),
            recalled.curvature,
            cached=True,
        )

    def again(self) -> bool:
        """One more W-step on the batch that was learnt from last: J_k at the present weights, with the same target.

        Returns:
            Whether there was one.
        """
        if self._latest is None:
            return False
        evaluation, target = self._latest
        evaluation.output = evaluation.output.detach()
        self.stage.add_gradient(evaluation, target)
        self._fresh = True
        self._share += 1.0
        self.update(again=True)
        return True

    def drop(self, number: int) -> None:
        """Forget a batch whose feedback is lost."""
        self.flights.pop(number, None)
        self._fresh = self._lost = True

    def absent(self) -> None:
        """Feedback on a microbatch that has no examples here, and has some in another replica of the block."""
        self._fresh = True

    def update(self, *, again: bool = False) -> None:
        """The optimizer's step; none where no feedback was due since the last, as when the pipeline runs empty.

        Where all of it was lost the weights stay, but the step-size schedule goes on, as it does in the other blocks.

        Args:
            again: whether it is one more on the same batch, which the step-size schedule does not count.
        """
        if not self._fresh:
            return
        self._fresh = False
        wstep = self.stage.wstep
        before = [p.detach().clone() for p in wstep.parameters] if self.correction.prediction else None
        if (wstep.calls + 1) % wstep.accumulate == 0:
            if self._lost and self._share:  # the mean is over what has come
                wstep.scale(wstep.accumulate / self._share)
            self._share, self._lost = 0.0, False
        self.stage.update(again=again)
        if before is None:
            return
        steps = [p.detach() - old for p, old in zip(wstep.parameters, before, strict=True)]
        self._velocity = self._velocity or steps
        for mean, step in zip(self._velocity, steps, strict=True):
            mean.lerp_(step, 0.1)

    def _weights(self) -> dict[str, Tensor] | None:
        """The weights that the block forwards with, where they are not its present ones as they stand."""
        reuse, ahead = self.correction.reuse, self.correction.prediction * self.updates
        if not reuse and not (ahead and self._velocity):
            return None
        if self._copy is not None and self._copy[0] == self.version:
            return self._copy[1]  # microbatches between two updates share one
        own = {name: p for name, p in self.stage.block.named_parameters() if p.requires_grad}
        if not (ahead and self._velocity):
            made = {name: p.detach().clone().requires_grad_() for name, p in own.items()}
        else:
            moved = zip(own.items(), self._velocity, strict=True)
            made = {name: torch.add(p.detach(), step, alpha=ahead).requires_grad_(reuse) for (name, p), step in moved}
        self._copy = self.version, made
        return made

    @torch.no_grad()
    def _compensate(self, before: list[Tensor | None], stashed: list[Tensor]) -> None:
        for parameter, old, weight in zip(self.stage.wstep.parameters, before, stashed, strict=True):
            if parameter.grad is not None:
                fresh = parameter.grad if old is None else parameter.grad - old
                more = self.correction.compensation * fresh.square() * (parameter - weight)
                parameter.grad = parameter.grad + more

    def moved(self, number: int) -> bool:
        """Whether the block's weights have moved since it forwarded this batch."""
        accumulate = self.stage.wstep.accumulate
        return self.flights[number].version // accumulate != self.version // accumulate

    def wants(self, tick: int) -> bool:
        """Whether it is this link's turn to have the curvature above it measured."""
        return not self.top and self.correction.curvature.wants(self.link, self.blocks - 1, tick)

    def measured(self, points: Points, slopes: Points) -> None:
        """Learn the curvature of the link above from slopes at this block's outputs (`Correction.points`)."""
        self.correction.measured(self.link, points, slopes)

    # -- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """What is on its way: a tree for a checkpoint. The curvature and the stage have their own."""
        return {
            "flights": [
                [number, {**flight.evaluation.state(), "output": flight.sent}]
                for number, flight in self.flights.items()
            ],
            "sent": [[number, flight.tick, flight.version] for number, flight in self.flights.items()],
            "velocity": list(self._velocity),
            "fresh": self._fresh,
            "share": self._share,
            "lost": self._lost,
            "recall": None if self.recall is None else self.recall.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned, with the same settings."""
        stage = self.stage
        sent = {number: (tick, version) for number, tick, version in state["sent"]}
        self.flights = {}
        for number, saved in state["flights"]:
            evaluation = Evaluation.restored(
                stage.block, saved, stage.device, differentiable=stage.below is not None, precision=stage.precision
            )
            self.flights[number] = Flight(evaluation, *sent[number])
        self._velocity = [mean.to(stage.device) for mean in state["velocity"]]
        self._fresh = state["fresh"]
        self._share, self._lost = state.get("share", 0.0), state.get("lost", False)  # not there in older checkpoints
        self._copy = None  # of other weights, though the number of updates may be the same
        if self.recall is not None:
            self.recall.load_state_dict(state.get("recall", state))  # older checkpoints have both


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def _drift(new: Tensor, old: Tensor) -> float:
    if new.data_ptr() == old.data_ptr():  # of the graph that was kept
        return 0.0
    return float((new - old).square().sum()) / len(new)
