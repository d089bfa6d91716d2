"""Carries out a schedule tick by tick: what a pipeline of devices computes, exactly.

The blocks that live here do what the schedule has for them. Where a message goes, and where it is waited for, is the
business of the `Mail`: within this thread, for a simulation with all blocks here, or to the processes of the
neighbours (`blockprop.runtime`). The numbers are the same.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from blockprop.cache import GluingCache
from blockprop.correction import Correction
from blockprop.executors.alignment import late_alignment
from blockprop.executors.executor import StepReport, check_finite
from blockprop.executors.intake import Intake, Part
from blockprop.executors.mail import LocalMail, Mail, Remote
from blockprop.executors.tally import Tally
from blockprop.executors.turns import Turns
from blockprop.held import Held
from blockprop.latestage import LateStage
from blockprop.losses import OutputLoss
from blockprop.schedules import (
    Action,
    Latency,
    Tick,
    check_microbatches,
    delay,
    delays,
    parallel,
    pipelined,
    sequential,
)
from blockprop.stage import Stage

__all__ = ["PipelinedExecutor", "check_cached", "check_form"]


class PipelinedExecutor:
    """All blocks busy in every tick; none waits for another.

    Args:
        schedule: from K to the ticks. Default: [`pipelined`][blockprop.schedules.pipelined] with the two below.
        microbatches: M, into how many parts a batch is cut; default 1.
        latency: of the messages.
        correction: what is made of late feedback; see [`Correction`][blockprop.correction.Correction].
        cache: makes a cache for one link, of as many examples as there are in the training set: feedback then comes on
            every `refresh`-th visit of a batch's examples only, and between them each block learns from the last one
            of each example. Default None.
        refresh: E ≥ 1, default 2; of the cache.
        remote: the other processes, where the blocks do not all live here; default None.

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
        correction: Correction | None = None,
        cache: Callable[[], GluingCache] | None = None,
        refresh: int = 2,
        remote: Remote | None = None,
        **corrections: Any,
    ) -> None:
        if correction is not None and corrections:
            raise ValueError(f"correction and {min(corrections)} are both given; expected one of the two")
        check_microbatches(microbatches)
        if microbatches > 1 and schedule is sequential:
            raise ValueError(
                f"microbatches is {microbatches}, and the schedule updates after each; expected 1 with it, or "
                "accumulate in the W-steps"
            )
        if schedule is not None and cache is not None:
            raise ValueError("a cache decides which batches have feedback; expected no schedule with it")
        if schedule is parallel:
            raise ValueError(
                "in the schedule 'parallel' blocks learn from what is cached; expected CachedExecutor for it"
            )
        if schedule is not None and latency != Latency():
            raise ValueError("a schedule has its own latency; expected none beside it")
        if cache is not None and correction is None:
            corrections.setdefault("along", True)
        self.correction = correction or Correction(**corrections)
        check_cached(self.correction, cache)
        self._given = schedule is not None
        self.microbatches, self.latency = microbatches, latency
        self.schedule = schedule or (
            lambda blocks: pipelined(blocks, microbatches=microbatches, latency=latency, quiet=self._intake.quiet)
        )
        self.cache = cache
        known = None if cache is None else cache()  # holds no entries: what examples there are
        self._intake = Intake(microbatches, known, refresh)
        self.remote = remote
        self._mail: Mail | None = None
        self._lates: list[LateStage] = []
        self._ticks: Iterator[Tick] | None = None
        self._next: Tick = ()
        self._watched: dict[int, tuple[float, float] | None] = {}
        self.tick = 0
        self._turns = Turns()
        self._forwards: dict[tuple[int, int], int] = {}  # by block and microbatch: when, of those on their way

    def step(
        self,
        stages: Sequence[Stage],
        inputs: Tensor | None,
        targets: Tensor | None,
        *,
        ids: Tensor | None = None,
        update: bool = True,
        recompute: bool = False,  # noqa: ARG002 - it always does
    ) -> StepReport:
        """Take a batch in, and train on what has arrived.

        Args:
            stages: bottom block first; those that live elsewhere are not touched.
            inputs: x, shape [N, ...]; None where the first block lives elsewhere.
            targets: y, N rows; None where the last block lives elsewhere.
            ids: the examples' numbers; needed with a cache, and where neither of the others is given.
            update: must be True.
            recompute: without effect.

        Raises:
            ValueError: `update` is False: there is no one batch of which the gradient would be; another form than
                the exact one; no ids for the cache.
        """
        if not update:
            raise ValueError("in a pipeline the blocks learn from different batches; expected the executor 'local'")
        self._begin(stages)
        waited = 0.0 if self.remote is None else self.remote.waited
        examples, tally = self._intake.feed(inputs, targets, ids, self._counted), Tally(self._links)
        while not self._intake.asks(self._next):
            self._carry_out(tally)
        return tally.report(examples, 0.0 if self.remote is None else self.remote.waited - waited)

    @property
    def _links(self) -> int:
        """How many links have their lower block here."""
        return 0 if self._mail is None else sum(self._mail.lives_here(k) for k in range(1, len(self._lates)))

    def _counted(self, labels: Tensor) -> float:
        """How many predictions there are in some labels."""
        loss = self._lates[-1].stage.above
        assert isinstance(loss, OutputLoss)
        return loss.counted(labels)

    def held(self) -> Held:
        """The most bytes so far that the blocks here kept beside weights, gradients and optimizer state."""
        return sum((late.most for late in self._lates), Held())

    def drain(self, stages: Sequence[Stage]) -> StepReport:
        """Train on what is still on its way, and take nothing new in."""
        if not self._intake:
            return Tally(0).report()
        self._begin(stages)
        tally = Tally(self._links)
        while self._intake:
            self._carry_out(tally)
        for late in self._lates:
            if self._here(late):
                late.update()  # on what came after its last one
        return tally.report()

    def close(self) -> None:
        """Part from the other processes, if there are any."""
        if self.remote is not None:
            self.remote.close()

    def _begin(self, stages: Sequence[Stage]) -> None:
        if self._ticks is None:
            self._furnish(stages)
            self._ticks = self.schedule(len(stages))
            self._intake.begin()
            for now, tick in enumerate(itertools.islice(self._ticks, self.tick)):
                self._past(tick, now)
            self._next = next(self._ticks)

    def _updates(self, blocks: int, k: int) -> float:
        """That block k will make until feedback is back; of a schedule that was given, as it has shown by then."""
        if not self._given:
            return delay(blocks, k, self.microbatches, self.latency.mean)
        ticks = 16 * blocks
        while len(found := delays(self.schedule(blocks), blocks, ticks)[k - 1]) < ticks // 2 and ticks < 4096:
            ticks *= 2  # until it has been running for as long as it took to fill
        steady = found[-max(1, len(found) // 4) :]
        return sum(steady) / max(1, len(steady))

    def _furnish(self, stages: Sequence[Stage]) -> None:
        if self._lates:
            return
        check_form(stages)
        blocks = len(stages)
        self._turns = Turns(stages[0].wstep.accumulate)
        self._lates = [
            LateStage(
                stage,
                blocks,
                self.correction,
                updates=self._updates(blocks, stage.index),
                parts=self.microbatches,
                cache=self.cache() if self.cache is not None and stage.index < blocks else None,
            )
            for stage in stages
        ]
        if self.remote is None:
            self._mail = LocalMail(self._lates)
            return
        # more than the first block has on their way, at a tick each, both ways
        self.remote.expect(2 * blocks * (1 + self.latency.longest))
        self._mail = self.remote.mail(self._lates)

    def _carry_out(self, tally: Tally) -> None:
        assert self._ticks is not None and self._mail is not None
        links = range(len(self._lates) - 1)
        self._turns.due |= {link for link in links if self.correction.curvature.wants(link, len(links), self.tick)}
        asking = [action for action in self._next if self._takes_turn(action)]
        for k, _, number in asking:
            if not self._mail.lives_here(k):
                self._mail.serve(k, self._intake[number].labels)
        for action in self._next:
            if action.batch in self._intake or action.kind == "update":
                self._act(action, action in asking, tally)
        self._past(self._next, self.tick)
        self.tick += 1
        self._next = next(self._ticks)

    def _past(self, tick: Tick, now: int) -> None:
        self._intake.past(tick)
        self._turns.past(tick)
        for k, kind, number in tick:
            if kind == "forward":
                self._forwards[k, number] = now
            elif self._intake.last(Action(k, kind, number), len(self._lates)):
                for block in range(1, len(self._lates) + 1):
                    self._forwards.pop((block, number), None)

    def _input_age(self, k: int, number: int) -> float:
        """Of the input that block k + 1 had from block k."""
        made, used = (self._forwards.get((block, number), math.nan) for block in (k, k + 1))
        return used - made

    def _takes_turn(self, action: Action) -> bool:
        """Whether a block measures the curvature above it with this action."""
        _, kind, number = action
        if kind != "backward" or self._intake.empty(number) or self._intake.quiet(number):
            return False
        return self._turns.take(action, self._next)

    def _act(self, action: Action, asks: bool, tally: Tally) -> None:
        k, kind, number = action
        assert self._mail is not None
        if not self._mail.lives_here(k):
            self._end(action)
            return
        late = self._lates[k - 1]
        if kind == "update":
            late.update()
            return
        if self._intake.empty(number):
            if kind != "forward":
                late.absent()
            self._end(action)
            return
        part = self._intake[number]
        if kind == "forward":
            h = part.inputs if k == 1 else self._mail.take_output(k, number, part.ids)
            assert h is not None
            output = late.forward(number, h, self.tick, quiet=self._intake.quiet(number))
            if not late.top:
                self._mail.send_output(k + 1, number, output, part.ids)
        elif kind == "drop":
            late.drop(number)
        else:
            self._backward(late, number, part, asks, tally)
        self._end(action)

    def _end(self, action: Action) -> None:
        if self._intake.last(action, len(self._lates)):
            self._intake.end(action.batch)

    def _backward(self, late: LateStage, number: int, part: Part, asks: bool, tally: Tally) -> None:
        assert self._mail is not None
        mail, k = self._mail, late.stage.index
        before = late.stage.wstep.hold() if self._watched else []
        if late.top:
            assert part.labels is not None
            quiet = self._intake.quiet(number)
            term, feedback = late.learn_top(number, part.labels, part.share, total=part.total, quiet=quiet)
            weight = 1.0 if part.total is None else self._counted(part.labels) / part.total
            tally.loss(check_finite(term), weight)
        elif self._intake.quiet(number):
            assert part.ids is not None
            learnt = late.learn_cached(number, part.ids, part.share)
            tally.link(late.link, learnt, part.share)
            return
        else:
            late.renew(number)  # while the feedback is on its way
            gluing = mail.take_feedback(k, number)
            ask = (lambda points: mail.ask(k, points, part.labels)) if asks else None
            learnt = late.learn(number, gluing, part.share, self.tick, ask=ask, ids=part.ids)
            learnt = replace(learnt, input_age=self._input_age(k, number))
            feedback = learnt.feedback
            if self._watched.get(k, ()) is None:
                assert part.inputs is not None and part.labels is not None  # all blocks live here
                all_stages = [one.stage for one in self._lates]
                self._watched[k] = late_alignment(all_stages, k, part.inputs, part.labels, part.total, before)
            tally.link(late.link, learnt, part.share)
        if feedback is not None and Action(k - 1, "drop", number) not in self._next:
            mail.send_feedback(k - 1, number, feedback.gluing)

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

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule is, what is on its way, what is known of the curvature: a tree for a checkpoint."""
        return {
            "tick": self.tick,
            "due": sorted(self._turns.due),
            **self._intake.state_dict(),
            "mail": None if self._mail is None else self._mail.state_dict(),
            "lates": [late.state_dict() if self._here(late) else None for late in self._lates],
            "correction": self.correction.state_dict(),
        }

    def _here(self, late: LateStage) -> bool:
        return self._mail is not None and self._mail.lives_here(late.stage.index)

    def load_state_dict(self, state: dict[str, Any], stages: Sequence[Stage]) -> None:
        """Continue from what `state_dict` returned, with the same settings."""
        self._ticks = None
        self._furnish(stages)
        self._turns = Turns(stages[0].wstep.accumulate)
        self._turns.due = set(state.get("due", ()))  # not in older checkpoints
        self.tick = state["tick"]
        self._intake.load_state_dict(state, self._counted)
        self.correction.load_state_dict(state["correction"])
        for late, saved in zip(self._lates, state["lates"], strict=False):
            if saved is not None:
                late.load_state_dict(saved)
        if state["mail"] is not None:
            assert self._mail is not None
            self._mail.load_state_dict(state["mail"])


def check_cached(correction: Correction, cache: object) -> None:
    """Refuse a curvature for cached feedback that is not measured as feedback in the cache measures it.

    Raises:
        ValueError: there is a cache, and κ is of all directions.
    """
    if cache is not None and not correction.along:
        raise ValueError("the κ of cached feedback is along its slope; expected along=True in the correction")


def check_form(stages: Sequence[Stage]) -> None:
    """Refuse a form for which late feedback is not defined.

    Raises:
        ValueError: a form other than the exact one: of others the displacement is not the feedback.
    """
    if any(stage.form.name != "exact" for stage in stages):
        raise ValueError("a pipelined schedule is defined for the form 'exact'; expected that, or the schedule 'sync'")
