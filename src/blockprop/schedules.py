"""Schedules as data: which block does what in which tick.

A tick is what the blocks do at the same time; a message that leaves a block in one tick is with its neighbour in
the next. A schedule is a pure generator of ticks. It knows nothing of networks: executors carry it out, whether
the blocks are objects in one process or processes of their own.

    forward   block k evaluates b_k on a batch, and sends the output up
    backward  block k takes its gradient and its h-step on a batch, and sends the feedback down
    update    block k's optimizer takes a step
    drop      block k forgets a batch whose feedback was lost
"""

import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

__all__ = ["Action", "Kind", "Latency", "Tick", "delays", "draw", "parallel", "pipelined", "sequential"]

Kind = Literal["forward", "backward", "update", "drop"]


class Action(NamedTuple):
    """What one block does.

    Attributes:
        block: k, from 1.
        kind: see the module.
        batch: number of the batch, or of the microbatch, from 0.
    """

    block: int
    kind: Kind
    batch: int


Tick = tuple[Action, ...]
"""The actions of one tick: those of one block in this order, those of different blocks at the same time."""


def _check(blocks: int) -> None:
    if isinstance(blocks, bool) or not isinstance(blocks, int) or blocks < 1:
        raise ValueError(f"blocks is {blocks}; expected a whole number of at least 1")


def check_microbatches(microbatches: int) -> None:
    """Refuse a number of microbatches that is none.

    Raises:
        ValueError: no whole number of at least 1.
    """
    if isinstance(microbatches, bool) or not isinstance(microbatches, int) or microbatches < 1:
        raise ValueError(f"microbatches is {microbatches}; expected a whole number of at least 1")


def sequential(blocks: int) -> Iterator[Tick]:
    """Algorithm 1: a batch up, its feedback down, all updates at once; then the next batch.

    Args:
        blocks: K.

    Raises:
        ValueError: K below 1.

    >>> for tick in itertools.islice(sequential(2), 4):
    ...     print(*(f"{kind} {block}" for block, kind, _ in tick), sep=", ")
    forward 1
    forward 2
    backward 2
    backward 1, update 1, update 2
    """
    _check(blocks)
    for batch in itertools.count():
        yield from ((Action(k, "forward", batch),) for k in range(1, blocks + 1))
        yield from ((Action(k, "backward", batch),) for k in range(blocks, 1, -1))
        yield (Action(1, "backward", batch), *(Action(k, "update", batch) for k in range(1, blocks + 1)))


def parallel(blocks: int) -> Iterator[Tick]:
    """Algorithm 2: inputs and targets are in the cache, so all blocks work on one batch at the same time.

    Args:
        blocks: K.

    Raises:
        ValueError: K below 1.
    """
    _check(blocks)
    for batch in itertools.count():
        each = ([Action(k, kind, batch) for kind in ("forward", "backward", "update")] for k in range(1, blocks + 1))
        yield tuple(itertools.chain.from_iterable(each))


@dataclass(frozen=True)
class Latency:
    """How long messages take, in ticks beyond the one that every message takes, and how many are lost.

    Args:
        longest: L ≥ 0, default 0; the extra delay of every message is drawn from 0, ..., L.
        lost: share of the feedback messages that never arrive, in [0, 1), default 0. The blocks below the loss
            do not learn from that batch.
        seed: of both draws, default 0.
        copies: how often feedback is sent: with a message of its own, and again with each of the `copies` - 1 messages
            that follow on its link. It is lost if all of them are. Default 2 where some are lost, else 1.
        chances: of the extra delays 0, ..., L, as numbers in proportion to them, such as (9, 0, 0, 1) for a link
            on which every tenth message straggles by three ticks; default: all alike.

    Raises:
        ValueError: a value out of its range.
    """

    longest: int = 0
    lost: float = 0.0
    seed: int = 0
    copies: int | None = None
    chances: tuple[float, ...] = ()

    @property
    def times(self) -> int:
        """How often feedback is sent."""
        return self.copies or (2 if self.lost else 1)

    @property
    def mean(self) -> float:
        """The extra delay of a message on average."""
        if not self.chances:
            return self.longest / 2
        return sum(delay * chance for delay, chance in enumerate(self.chances)) / sum(self.chances)

    def drawn(self, source: random.Random) -> int:
        """The extra delay of a message."""
        if not self.longest:
            return 0
        if not self.chances:
            return source.randint(0, self.longest)
        return source.choices(range(self.longest + 1), self.chances)[0]

    def __post_init__(self) -> None:
        if isinstance(self.longest, bool) or not isinstance(self.longest, int) or self.longest < 0:
            raise ValueError(f"longest delay is {self.longest}; expected a whole number of ticks, at least 0")
        if not 0 <= self.lost < 1:
            raise ValueError(f"share of lost messages is {self.lost}; expected a number in [0, 1)")
        if self.copies is not None and (type(self.copies) is not int or self.copies < 1):
            raise ValueError(f"copies of the feedback are {self.copies}; expected a whole number of at least 1")
        if self.chances and (
            len(self.chances) != self.longest + 1
            or not all(0 <= chance < math.inf for chance in self.chances)
            or not sum(self.chances) > 0
        ):
            raise ValueError(
                f"chances of the delays are {', '.join(f'{chance:g}' for chance in self.chances)}; expected "
                f"{self.longest + 1} numbers of at least 0, for 0 to {self.longest} ticks, not all of them 0"
            )


class _Inbox:
    """What is on its way to a block from one neighbour."""

    def __init__(self) -> None:
        self._arrivals: dict[int, int] = {}

    def put(self, batches: Iterable[int], when: int) -> None:
        self._arrivals |= dict.fromkeys(batches, when)

    def oldest(self, now: int) -> int | None:
        """Take the oldest batch that has arrived; None if none has."""
        arrived = [batch for batch, when in self._arrivals.items() if when <= now]
        if not arrived:
            return None
        del self._arrivals[batch := min(arrived)]
        return batch


class _Outbox:
    """What a block sends down: which messages arrive, and which of the feedback before goes with them again."""

    def __init__(self, latency: Latency, draw_from: random.Random) -> None:
        self._latency, self._random = latency, draw_from
        self._fates: deque[bool] = deque()  # whether the next messages arrive
        self._waiting: list[int] = []

    def send(self, batch: int) -> tuple[bool, list[int]]:
        """Whether the feedback of a batch will ever arrive; and what arrives with this message, if anything."""
        while len(self._fates) < self._latency.times:
            self._fates.append(not self._latency.lost or self._random.random() >= self._latency.lost)
        if arrives := any(self._fates):
            self._waiting.append(batch)
        message: list[int] = []
        if self._fates.popleft():
            message, self._waiting = self._waiting, message
        return arrives, message


def _none(number: int) -> bool:  # noqa: ARG001
    return False


def _forward(actions: list[Action], k: int, batch: int, quiet: Callable[[int], bool]) -> None:
    """Add a block's forward: before the late gradient of this tick, unless the weights move between.

    What is quiet stays first: it is learnt from right after the tick in which it was forwarded.
    """
    own = [(place, kind, other) for place, (block, kind, other) in enumerate(actions) if block == k]
    late = [place for place, kind, other in own if kind == "backward" and not quiet(other)]
    moved = any(kind == "update" and place > late[0] for place, kind, _ in own if late)
    actions.insert(late[0] if late and not moved else len(actions), Action(k, "forward", batch))


def pipelined(
    blocks: int, *, microbatches: int = 1, latency: Latency = Latency(), quiet: Callable[[int], bool] = _none
) -> Iterator[Tick]:
    """All blocks busy in every tick: each forwards one microbatch, and updates on the feedback of an older one.

    In a tick a block first takes its feedback, then updates, then forwards with the new weights. Where no update is
    due it forwards first: the weights are the same, and what goes to the last block and comes from it has longer to
    travel before it is needed. Of several messages that wait it takes the oldest batch. The first block holds back
    while as many microbatches are on their way as there are ticks until feedback, on average: what is more would
    wait somewhere, and only grow old.

    Without latency the feedback of block k is 2(K - k) ticks old, and the block has updated 2(K - k) - 1 times since
    the forward; with M microbatches about an M-th of that. A block updates on what is there of M microbatches: one
    that is lost counts, so that all blocks update equally often.

    Args:
        blocks: K.
        microbatches: M, into how many parts a batch is cut; default 1.
        latency: of the messages; default: one tick each, none lost.
        quiet: whether a microbatch has no feedback: every block learns from it right after it has forwarded it, from
            what is cached. Asked in the tick after the one in which the first block forwards it, and later. Default:
            none is.

    Raises:
        ValueError: K or M below 1.

    >>> for tick in itertools.islice(pipelined(2), 3):
    ...     print(*(f"{kind} {batch} by {block}" for block, kind, batch in tick), sep=", ")
    forward 0 by 1
    forward 1 by 1, forward 0 by 2, backward 0 by 2, update 0 by 2
    backward 0 by 1, update 0 by 1, forward 2 by 1, forward 1 by 2, backward 1 by 2, update 1 by 2
    """
    _check(blocks)
    check_microbatches(microbatches)
    draw_from = random.Random(latency.seed)
    # per block: what comes from below, what from above, and what it sends down
    outputs, feedback = ([_Inbox() for _ in range(blocks + 1)] for _ in range(2))
    sent = [_Outbox(latency, draw_from) for _ in range(blocks + 1)]
    behind: list[int | None] = [None] * (blocks + 1)  # what a block forwarded in its last tick
    on_way: set[int] = set()  # what the first block has forwarded and not yet learnt from
    bound = max(1, round(2 * (blocks - 1) * (1 + latency.mean)))
    fed = 0
    due = [0] * (blocks + 1)  # microbatches since a block's last update, those included that it lost

    def arrival(now: int) -> int:
        return now + 1 + latency.drawn(draw_from)

    for now in itertools.count():
        actions: list[Action] = []

        def count(k: int, batch: int, actions: list[Action] = actions) -> None:
            due[k] += 1
            if due[k] == microbatches:
                actions.append(Action(k, "update", batch))
                due[k] = 0

        def learn(k: int, batch: int, now: int = now, actions: list[Action] = actions) -> None:
            actions.append(Action(k, "backward", batch))
            count(k, batch)
            if k == 1:
                on_way.discard(batch)
            if k == 1 or quiet(batch):
                return
            arrives, message = sent[k].send(batch)
            if not arrives:
                for j in range(k - 1, 0, -1):
                    actions.append(Action(j, "drop", batch))
                    count(j, batch)
                on_way.discard(batch)
            if message:
                feedback[k - 1].put(message, arrival(now))

        for k in range(1, blocks + 1):
            if k < blocks:
                if (batch := behind[k]) is not None and quiet(batch):
                    learn(k, batch)
                if (batch := feedback[k].oldest(now)) is not None:
                    learn(k, batch)
            if k == 1 and len(on_way) < bound:
                outputs[1].put([fed], now)
                on_way.add(fed)
                fed += 1
            behind[k] = batch = outputs[k].oldest(now)
            if batch is not None:
                _forward(actions, k, batch, quiet)
                if k < blocks:
                    outputs[k + 1].put([batch], arrival(now))
                else:
                    learn(k, batch)
        yield tuple(actions)


def delay(blocks: int, k: int, microbatches: int = 1, latency: float = 0, in_flight: int = 2) -> float:
    """How many updates block k makes between its forward and its backward, once the pipeline is full.

    Below 1 it is the share of the microbatches that an update comes between; there is none for the others.

    Args:
        blocks: K.
        k: the block, from 1.
        microbatches: M.
        latency: ticks that a message takes longer on average; what waits for a turn takes longer.
        in_flight: microbatches on their way for each block above; without ticks at most.

    >>> [delay(4, k) for k in (1, 2, 3, 4)], delay(2, 1, microbatches=2), delay(4, 1, latency=1)
    ([5.0, 3.0, 1.0, 0.0], 0.5, 11.0)
    >>> [delay(2, 1, microbatches=2, in_flight=n) for n in (1, 2, 4)]
    [0.0, 0.5, 1.5]
    """
    return max(0, in_flight * (blocks - k) * (1 + latency) - 1) / microbatches


def delays(ticks: Iterator[Tick], blocks: int, count: int) -> list[list[int]]:
    """How many updates a block made between its forward and its backward of a batch, in a schedule's first ticks.

    Args:
        ticks: the schedule.
        blocks: K.
        count: how many ticks to look at.

    Returns:
        For each block, bottom first, its delays in the order of its backwards.

    >>> [delay[-1] for delay in delays(pipelined(4), 4, 20)]
    [5, 3, 1, 0]
    >>> [max(delay) for delay in delays(pipelined(4, microbatches=3), 4, 40)]
    [2, 1, 1, 0]
    """
    updates = [0] * (blocks + 1)
    forwarded: dict[tuple[int, int], int] = {}
    found: list[list[int]] = [[] for _ in range(blocks)]
    for tick in itertools.islice(ticks, count):
        for k, kind, batch in tick:
            if kind == "forward":
                forwarded[k, batch] = updates[k]
            elif kind == "backward":
                found[k - 1].append(updates[k] - forwarded.pop((k, batch)))
            elif kind == "update":
                updates[k] += 1
    return found


def draw(ticks: Iterator[Tick], blocks: int, count: int) -> str:
    """A timeline in text: a row per block, top block first, a column per tick.

    `3` is a forward of batch 3, `'3` its backward, `*` an update, `x3` feedback that was lost.

    Args:
        ticks: the schedule.
        blocks: K.
        count: how many ticks to draw.

    >>> print(draw(pipelined(3), 3, 6))
    block 3 |        |        | 0 '0*  | 1 '1*  | 2 '2*  | 3 '3*
    block 2 |        | 0      | 1      | '0* 2  | '1* 3  | '2* 4
    block 1 | 0      | 1      | 2      | 3      | '0* 4  | '1* 5
    """
    cells = [["" for _ in range(count)] for _ in range(blocks)]
    marks = {"forward": " {}", "backward": " '{}", "update": "*", "drop": " x{}"}
    for column, tick in enumerate(itertools.islice(ticks, count)):
        for k, kind, batch in tick:
            cells[k - 1][column] += marks[kind].format(batch)
    width = max(len(cell) for row in cells for cell in row) + 1
    rows = [f"block {k}".ljust(len(f"block {blocks}")) for k in range(1, blocks + 1)]
    lines = [
        " |".join([name, *(cell.ljust(width) for cell in row)]).rstrip() for name, row in zip(rows, cells, strict=True)
    ]
    return "\n".join(reversed(lines))
