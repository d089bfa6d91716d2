"""No schedule: a block learns from feedback as soon as it is there, and forwards the next batch whenever it may.

Nobody waits for a tick. What bounds the age of feedback is how many microbatches a block may have on their way: at that
number it forwards no more until feedback comes, and so the blocks keep pace with the slowest of them. A block updates
when it has done with the last microbatch of a batch. It learns before it forwards where an update follows, and else
forwards first, so that the block above has something to do.

Of several messages that wait, a block takes the oldest first, and learns from all. Or the newest wins: it takes that
one alone, and passes the older batches over. An empty message goes down for each of them, so that the blocks below
forget it as well, and one goes up in the place of its output.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from blockprop.cache import GluingCache
from blockprop.correction import Correction
from blockprop.executors.executor import StepReport, check_finite
from blockprop.executors.intake import Intake
from blockprop.executors.pipelined import check_cached, check_form
from blockprop.executors.tally import Tally
from blockprop.held import Held
from blockprop.latestage import LateStage
from blockprop.losses import OutputLoss
from blockprop.probe import Points
from blockprop.runtime.mail import feedback_message, gluing_of, output_message, output_of
from blockprop.runtime.message import Message
from blockprop.runtime.neighbours import Neighbours
from blockprop.schedules import check_microbatches, delay
from blockprop.stage import Stage

__all__ = ["FreeRunningExecutor"]


class FreeRunningExecutor:
    """Runs one block in its process, as fast as messages come.

    Args:
        remote: the neighbours.
        microbatches: M, into how many parts a batch is cut; default 1, which it must be with a cache, `repeats` or
            `newest`.
        in_flight: microbatches that a block may have on their way for each block above it, at least 1; default 2,
            the number that a lock-step pipeline has.
        repeats: W-steps that a block may take again on its latest batch while it would wait, at least 0; default 0.
        newest: of several outputs or pieces of feedback that wait, learn from the newest alone; default False. Not
            with a cache.
        correction: what is made of late feedback; see [`Correction`][blockprop.correction.Correction].
        cache: as in [`PipelinedExecutor`][blockprop.executors.pipelined.PipelinedExecutor].
        refresh: as there.

    Attributes:
        passed: batches that were passed over so far, by this block or because another did.

    Raises:
        ValueError: a setting out of its range, or two that exclude each other.
    """

    def __init__(
        self,
        remote: Neighbours,
        *,
        microbatches: int = 1,
        in_flight: int = 2,
        repeats: int = 0,
        newest: bool = False,
        correction: Correction | None = None,
        cache: Callable[[], GluingCache] | None = None,
        refresh: int = 2,
    ) -> None:
        check_microbatches(microbatches)
        if isinstance(in_flight, bool) or not isinstance(in_flight, int) or in_flight < 1:
            raise ValueError(f"in-flight is {in_flight}; expected a whole number of microbatches, at least 1")
        if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 0:
            raise ValueError(f"repeats is {repeats}; expected a whole number of W-steps, at least 0")
        if newest and cache is not None:
            raise ValueError("the newest is to win, and a cache keeps the feedback of all; expected one of the two")
        if microbatches > 1 and (repeats or newest or cache is not None):
            raise ValueError(
                f"microbatches is {microbatches}, and a cache, repeats and newest are of whole batches; expected 1"
            )
        self.remote = remote
        self.in_flight = in_flight
        remote.expect(in_flight * remote.blocks)  # the first block has no more on their way
        self.repeats, self.newest = repeats, newest
        self.passed = 0
        self._left = 0  # of the repeats on the latest batch
        self.correction = correction or Correction(along=cache is not None)
        check_cached(self.correction, cache)
        self.cache = cache
        known = None if cache is None else cache()  # holds no entries: what examples there are
        self._intake = Intake(microbatches, known, refresh)
        self._late: LateStage | None = None
        self._fed = 0  # microbatches that came to their turn here
        self._labels: dict[int, Tensor] = {}  # of the latest microbatches, for points from below
        self._due = False  # whether it is this block's turn to have the curvature above it measured
        self._points: dict[int, Points] = {}  # by the block that asks: where slopes are waited for

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
        """Forward the next batch, and learn from what has come up to then.

        Args:
            stages: bottom block first; those that live elsewhere are not touched.
            inputs: x, shape [N, ...]; None in all processes but the first block's.
            targets: y, N rows; None in all processes but the last block's.
            ids: the examples' numbers; needed with a cache, and where neither of the others is given.
            update: must be True.
            recompute: without effect.

        Raises:
            ValueError: another form than the exact one; no ids for the cache.
        """
        if not update:
            raise ValueError("in a pipeline the blocks learn from different batches; expected the executor 'local'")
        late, waited = self._furnish(stages), self.remote.post.waited
        tally = Tally(int(not late.top))
        loss = stages[-1].above
        assert isinstance(loss, OutputLoss)
        examples = self._intake.feed(inputs, targets, ids, loss.counted)
        while (number := self._fed) < self._intake.fed:
            if self._intake.empty(number):
                self._intake.end(number)
                self._fed += 1
            else:
                self._forward(late, number, loss, tally)
        return tally.report(examples, self.remote.post.waited - waited)

    def _forward(self, late: LateStage, number: int, loss: OutputLoss, tally: Tally) -> None:
        """A microbatch's turn: wait until it may go up, learn from what has come meanwhile, and evaluate it."""
        post, below, above = self.remote.post, self.remote.below, self.remote.above
        self._due = self._due or late.wants(number)
        self._fed += 1
        limit = self.in_flight * (late.blocks - late.stage.index)
        while not (early := self._early()) and not late.top and len(late.flights) >= limit:
            self._wait(late, tally, "feedback", learn=False)
        if not early:
            self._attend(late, tally)
        part, quiet = self._intake[number], self._intake.quiet(number)
        if below is not None:
            while (message := post.oldest("output")) is None:
                self._wait(late, tally, "output")
            assert message.number == number, "outputs come in order"
            if not message.values or (self.newest and post.newer("output", number)):
                self._pass_over(late, number, known_below=not message.values)
                if above is not None:
                    above.send(Message("output", number))
                return
            part.inputs = output_of(message, late.stage.index, part.ids)
        assert part.inputs is not None
        output = late.forward(number, part.inputs, self._fed, quiet=quiet)
        part.inputs = None  # as long as it is needed the flight has it
        if above is not None:
            above.send(output_message(number, output, part.ids, late.version))
            if quiet:
                assert part.ids is not None
                tally.link(late.link, late.learn_cached(number, part.ids, part.share), part.share)
                self._done(late, number)
            if early:
                self._attend(late, tally)
            return
        assert part.labels is not None
        self._labels = {n: y for n, y in self._labels.items() if n > number - 8 * late.blocks} | {number: part.labels}
        term, feedback = late.learn_top(number, part.labels, part.share, total=part.total, quiet=quiet)
        tally.loss(check_finite(term), 1.0 if part.total is None else loss.counted(part.labels) / part.total)
        if feedback is not None and below is not None:
            below.send(feedback_message(number, feedback.gluing, late.version))
        self._done(late, number)
        self._left = self.repeats

    def _early(self) -> bool:
        """Whether there is feedback, and no update after it: the next microbatch may go up first, at these weights."""
        here = self.remote.post.here("feedback")
        return bool(here) and not any(self._intake.over(number, here) for number in here)

    def _done(self, late: LateStage, number: int) -> None:
        """Nothing is left to do with a microbatch here; after the last one of a batch the block updates."""
        self._intake.end(number)
        if self._intake.over(number):
            late.update()

    def _furnish(self, stages: Sequence[Stage]) -> LateStage:
        if self._late is None:
            check_form(stages)
            place = self.remote.place
            cache = None if self.cache is None or place.top else self.cache()
            parts = self._intake.microbatches
            self._late = LateStage(
                stages[place.block - 1],
                place.blocks,
                self.correction,
                updates=delay(place.blocks, place.block, parts, in_flight=self.in_flight),
                parts=parts,
                cache=cache,
            )
        return self._late

    def _wait(self, late: LateStage, tally: Tally, kind: str, *, learn: bool = True) -> None:
        """Until a message of a kind is there, or a W-step was repeated; attend to everything else meanwhile."""
        if self._left and late.again():
            self._left -= 1
        else:
            self.remote.post.wait(kind, "feedback", "points", "slopes")
        if learn or not self._early():
            self._attend(late, tally)

    def _attend(self, late: LateStage, tally: Tally) -> None:
        """Learn from feedback that is there, and help to measure curvatures."""
        post = self.remote.post
        while (message := post.oldest("points")) is not None:
            self._serve(late, message)
        while (message := post.oldest("slopes")) is not None:
            self._answered(late, message)
        while (message := post.oldest("feedback")) is not None:
            number = message.number
            if not message.values or (self.newest and post.newer("feedback", number)):
                self._pass_over(late, number)
                continue
            asks = self._due and late.stage.index not in self._points and late.moved(number)
            self._due = self._due and not asks
            ask = self._ask(number) if asks else None
            part, gluing = self._intake[number], gluing_of(message, late.stage.device)
            learnt = late.learn(number, gluing, part.share, self._fed, ask=ask, ids=part.ids)
            tally.link(late.link, learnt, part.share)
            if learnt.feedback is not None and self.remote.below is not None:
                self.remote.below.send(feedback_message(number, learnt.feedback.gluing, late.version))
            self._done(late, number)
            self._left = self.repeats

    def _pass_over(self, late: LateStage, number: int, *, known_below: bool = False) -> None:
        """Learn nothing from it, and let the blocks below know unless they do; step sizes go on all the same."""
        self.passed += 1
        late.drop(number)
        self._done(late, number)
        if self.remote.below is not None and not known_below:
            self.remote.below.send(Message("feedback", number))

    def _ask(self, number: int) -> Callable[[Points], None]:
        def ask(points: Points) -> None:
            assert self.remote.above is not None
            self._points[self.remote.place.block] = points
            self.remote.above.send(Message("points", self.remote.place.block, points, {"batch": number}))

        return ask

    def _serve(self, late: LateStage, message: Message) -> None:
        """Points from below: the last block answers, the others pass them on."""
        asking, points = message.number, list(message.values)
        assert self.remote.below is not None
        if not late.top:
            assert self.remote.above is not None
            self._points[asking] = points
            self.remote.above.send(Message("points", asking, late.probe.carried(points), message.more))
            return
        labels = self._labels.get(message.more["batch"])
        slopes = [] if labels is None else late.probe.slopes(points, labels)
        self.remote.below.send(Message("slopes", asking, slopes))

    def _answered(self, late: LateStage, message: Message) -> None:
        """Slopes from above: for this block, or to be passed down. None where the labels were too old."""
        asking, slopes = message.number, [value.to(late.stage.device) for value in message.values]
        points = self._points.pop(asking, None)
        if points is None:
            return
        if asking != late.stage.index:
            assert self.remote.below is not None
            self.remote.below.send(Message("slopes", asking, late.probe.pulled(points, slopes) if slopes else []))
        elif slopes:
            late.measured(points, slopes)

    def held(self) -> Held:
        """The most bytes so far that the block here kept beside weights, gradients and optimizer state."""
        return Held() if self._late is None else self._late.most

    def drain(self, stages: Sequence[Stage]) -> StepReport:  # noqa: ARG002
        """Learn from what is still on its way, and take nothing new in."""
        tally = Tally(1)
        while self._late is not None and self._late.flights:
            self._wait(self._late, tally, "feedback")
        return tally.report()

    def close(self) -> None:
        """Part from the neighbours."""
        self.remote.close()

    def state_dict(self) -> dict[str, Any]:
        """What is on its way here; all processes call it at the same point."""
        assert self._late is not None
        return {
            **self._intake.state_dict(),
            "due": self._due,
            "passed": self.passed,
            "messages": [message.state() for message in self.remote.snapshot()],
            "late": self._late.state_dict(),
            "correction": self.correction.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], stages: Sequence[Stage]) -> None:
        """Continue from what `state_dict` returned, with the same settings.

        Raises:
            ValueError: the state is of an older version.
        """
        if "parts" not in state:
            raise ValueError("an older version wrote the checkpoint; expected one of this version: start the run anew")
        self._furnish(stages).load_state_dict(state["late"])
        self._intake.load_state_dict(state)
        self._fed = self._intake.fed
        self._due, self.passed = state["due"], state["passed"]
        self.correction.load_state_dict(state["correction"])
        self.remote.post.restore([Message(*message) for message in state["messages"]])
