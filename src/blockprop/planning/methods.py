"""Every method as the programs that its devices run.

A block is a part of the network on one device, with its costs. The programs of the synchronous methods are fixed
orders; where a device decides by what has come, they are classes of their own.
"""

import itertools
from collections import Counter, deque
from collections.abc import Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from blockprop.planning.costs import Layer
from blockprop.planning.events import Message, Ordered, Program, Step, Task

__all__ = [
    "QUEUE",
    "Block",
    "folded",
    "free_running",
    "gpipe",
    "lock_step",
    "one_f_one_b",
    "questions",
    "streaming",
    "zero_bubble",
]

QUEUE = 8  # messages between two blocks that hear nothing of each other


@dataclass(frozen=True)
class Block:
    """What one block costs on some number of examples, in seconds on a device of speed 1.

    Attributes:
        forward: its forward pass.
        backward: its backward pass, for its weights and its input.
        inward: of the backward pass, what gives the gradient in its input and nothing else; 0 at the bottom.
        inputs: a backward pass for the input alone, as zero bubble makes it first.
        update: a step of its optimizer. Adding a microbatch's gradient in place takes as long: it moves as much.
        sent: bytes of its output, and of the feedback that comes back for it.
        taken: a microbatch's gradients in new memory, which a pass measured alone does not show, and adding them.
        copied: a copy of its weights.
    """

    forward: float
    backward: float
    inward: float
    inputs: float
    update: float
    sent: float
    taken: float = 0.0
    copied: float = 0.0

    @classmethod
    def of(cls, layers: Sequence[Layer], examples: float, *, bottom: bool) -> "Block":
        """The block of these layers; the one at the bottom needs no gradient in its input."""
        passes = [layer.at(examples) for layer in layers]
        inward = max(0.0, passes[0].backward - passes[0].weight_gradient)
        return cls(
            sum(each.forward for each in passes),
            sum(each.backward for each in passes) - inward * bottom,
            0.0 if bottom else inward,
            sum(each.input_gradient for each in passes[bottom:]),
            sum(layer.update for layer in layers),
            layers[-1].output_bytes * examples,
            sum(layer.taken for layer in layers),
            sum(layer.copied for layer in layers),
        )


def _ordered(
    block: Block,
    order: Sequence[tuple[Literal["F", "B"], int]],
    k: int,
    blocks: int,
    sent_below: float,
) -> Iterator[Step]:
    """Batch after batch, a device's forwards and backwards of its microbatches in this order, and an update."""
    for batch in itertools.count():
        first = True
        for kind, part in order:
            tag = kind, batch, part
            if kind == "F":
                sends = (Message(k + 1, tag, block.sent, asked=True),) if k < blocks - 1 else ()
                yield Step((tag,) if k else (), Task(block.forward, sends))
            else:
                sends = (Message(k - 1, tag, sent_below, asked=True),) if k else ()
                seconds = block.backward + (0.0 if first else block.update)
                yield Step((tag,) if k < blocks - 1 else (), Task(seconds, sends))
                first = False
        yield Step((), Task(block.update, (), True))


def gpipe(blocks: Sequence[Block], microbatches: int) -> list[Program]:
    """All microbatches up, then all down, then the update (Huang et al. 2019)."""
    order: list[tuple[Literal["F", "B"], int]] = [("F", m) for m in range(microbatches)]
    order += [("B", m) for m in range(microbatches)]
    below = _below(blocks)
    return [Ordered(_ordered(block, order, k, len(blocks), below[k])) for k, block in enumerate(blocks)]


def one_f_one_b(blocks: Sequence[Block], microbatches: int) -> list[Program]:
    """Block k has up to K - k + 1 microbatches under way, then takes a backward and a forward in turn."""
    programs: list[Program] = []
    below = _below(blocks)
    for k, block in enumerate(blocks):
        ahead = min(microbatches, len(blocks) - 1 - k)
        order: list[tuple[Literal["F", "B"], int]] = [("F", m) for m in range(ahead)]
        for m in range(microbatches):
            order += [("F", m + ahead)] * (m + ahead < microbatches)
            order.append(("B", m))
        programs.append(Ordered(_ordered(block, order, k, len(blocks), below[k])))
    return programs


def _below(blocks: Sequence[Block]) -> list[float]:
    return [0.0, *(block.sent for block in blocks[:-1])]


_Order = list[tuple[str, int]]  # F, I or W, for the backward passes of inputs and of weights, and which chunk


def _straight(k: int, devices: int, microbatches: int) -> _Order:
    """As 1F1B, with the weights' gradients k microbatches later, so that they fill the wait at the end (ZB-H1)."""
    ahead = min(microbatches, devices - 1 - k)
    forward, inputs, weights = ("F", 0), ("I", 0), ("W", 0)
    order = [forward] * ahead
    for m in range(microbatches):
        order += [forward] * (m + ahead < microbatches) + [inputs] + [weights] * (m >= k)
    return order + [weights] * min(k, microbatches)


def folded(k: int, devices: int, microbatches: int) -> _Order:
    """The order of ZBV on a device, as torch has it (Qi et al. 2024): half 0 is its chunk on the way up, half 1 down.

    With fewer than 2K - 1 microbatches it is the order of as many, of which those that are not there are left out.

    Args:
        k: the device, from 0.
        devices: K.
        microbatches: M.

    Returns:
        F, I or W (forward, backward for inputs, backward for weights), and the half; microbatches come in turn.
    """
    room = max(2 * devices - 1, microbatches)
    up, down = [("F", 0)], [("F", 1), ("I", 1), ("W", 1)]
    order = up * (2 * (devices - k) - 1) + [("F", 1), ("F", 0)] * k + down * (devices - k)
    done = {step: order.count(step) for step in (("F", 0), ("F", 1), ("I", 1), ("W", 1))}
    while done["F", 1] < room:
        order += up * (done["F", 0] < room) + [("I", 0), ("W", 0)] + down
        done["F", 0] += 1
        done["F", 1] += 1
    order += [("I", 0), ("I", 1)] * k + [("I", 0), ("W", 0)] * (devices - k)
    for half in (1, 0):
        order += [("W", half)] * (room - order.count(("W", half)))
    return order


_Pass = tuple[str, int, int]  # F, I or W, of a chunk, for a microbatch


def _numbered(order: _Order, chunks: tuple[int, int], microbatches: int) -> list[_Pass]:
    """The passes of an order, with those left out whose microbatches are not there."""
    done: Counter[tuple[str, int]] = Counter()
    found = []
    for kind, half in order:
        if done[kind, half] < microbatches:
            found.append((kind, chunks[half], done[kind, half]))
        done[kind, half] += 1
    return found


def questions(orders: Sequence[Sequence[_Pass]], home: Sequence[int]) -> list[list[list[_Pass]]]:
    """For every pass of every device the messages that torch has it ask for as soon as it comes there.

    All devices go through their orders side by side, each a pass further if what it needs is there; who sends puts the
    question into the receiver's order, where that has come to.

    Args:
        orders: the passes of every device.
        home: the device of every chunk.
    """
    asks: list[list[list[_Pass]]] = [[[] for _ in order] for order in orders]
    done: set[_Pass] = set()
    at = [0] * len(orders)
    while any(place < len(order) for place, order in zip(at, orders, strict=True)):
        for device, order in enumerate(orders):
            if at[device] == len(order):
                continue
            kind, chunk, part = order[at[device]]
            source, target = (chunk - 1, chunk + 1) if kind == "F" else (chunk + 1, chunk - 1)
            if kind != "W" and 0 <= source < len(home) and (kind, source, part) not in done:
                continue
            at[device] += 1
            done.add((kind, chunk, part))
            there = home[target] if kind != "W" and 0 <= target < len(home) else device
            if there != device and at[there] < len(orders[there]):
                asks[there][at[there]].append((kind, target, part))
    return asks


def zero_bubble(chunks: Sequence[Block], devices: int, microbatches: int) -> list[Program]:
    """Backward passes in two parts, of which only the input's is waited for (Qi et al. 2024).

    Args:
        chunks: K of them, or 2K in the shape of a V (ZBV): the device of chunk 1 has chunk 2K as well, and so on.
        devices: K.
        microbatches: M.
    """
    of_device = folded if len(chunks) == 2 * devices else _straight
    home = [chunk if chunk < devices else 2 * devices - 1 - chunk for chunk in range(len(chunks))]
    below = _below(chunks)
    orders = [
        _numbered(of_device(k, devices, microbatches), (k, 2 * devices - 1 - k), microbatches) for k in range(devices)
    ]
    asks = questions(orders, home)

    def away(k: int, chunk: int) -> bool:
        return 0 <= chunk < len(chunks) and home[chunk] != k

    def steps(k: int) -> Iterator[Step]:
        for batch in itertools.count():
            for (kind, chunk, part), asked in zip(orders[k], asks[k], strict=True):
                block = chunks[chunk]
                early = tuple((kind, batch, chunk, part) for kind, chunk, part in asked)
                if kind == "W":
                    weights = max(0.0, block.backward - block.inputs) + block.taken
                    yield Step((), Task(weights + (block.update if part else 0.0), asks=early))
                    continue
                source, target = (chunk - 1, chunk + 1) if kind == "F" else (chunk + 1, chunk - 1)
                size, seconds = (block.sent, block.forward) if kind == "F" else (below[chunk], block.inputs)
                sends = (
                    (Message(home[target], (kind, batch, target, part), size, asked=True),) if away(k, target) else ()
                )
                needs = ((kind, batch, chunk, part),) if away(k, source) else ()
                yield Step(needs, Task(seconds, sends, asks=early))
            yield Step((), Task(sum(chunk.update for c, chunk in enumerate(chunks) if home[c] == k), (), True))

    return [Ordered(steps(k)) for k in range(devices)]


def lock_step(blocks: Sequence[Block], parts: int, *, again: bool = True) -> list[Program]:
    """BlockProp's pipeline tick by tick, as [`pipelined`][blockprop.schedules.pipelined] says, when it has filled up.

    Block k evaluates the microbatch again whose feedback is due, learns from it, and forwards a new one, this first if
    no update is due; the top does the two passes of one microbatch. Feedback and inputs are of the tick before.
    What blocks do once a batch, such as an update, they do in different ticks, and each such tick keeps the neighbours
    waiting.

    Args:
        blocks: all blocks.
        parts: M, one update for so many microbatches.
        again: whether a block evaluates a microbatch again, if an update came since its forward pass; not with stashed
            weights.
    """
    last = len(blocks) - 1

    def steps(k: int) -> Iterator[Step]:
        block, top, late = blocks[k], k == last, 2 * (last - k)  # ticks that feedback is old
        for tick in itertools.count():
            number = (tick + k) % parts  # in its batch, of what is learnt from: feedback goes a block down in a tick
            from_below: tuple[Hashable, ...] = (("up", tick - 1),) if k and tick else ()
            from_above: tuple[Hashable, ...] = (("down", tick - 1),) if not top and tick else ()
            down = (Message(k - 1, ("down", tick), blocks[k - 1].sent),) if k else ()
            done = number == parts - 1
            update = block.update * done + block.taken * (parts > 1)
            if top:
                yield Step(from_below, Task(block.forward + block.backward, down))
                yield Step((), Task(update, (), done))
                continue
            moved = number < late - 1  # so many before it were learnt from since its forward, a batch's last among them
            stashed = block.copied * done * (not again)
            forward = Step(from_below, Task(stashed + block.forward, (Message(k + 1, ("up", tick), block.sent),)))
            if not done:
                yield forward
            yield Step((), Task(again * moved * block.forward))  # while the feedback is on its way
            yield Step(from_above, Task(block.backward, down))
            yield Step((), Task(update, (), done))
            if done:
                yield forward

    return [Ordered(steps(k)) for k in range(len(blocks))]


class _Free:
    """A device that waits only if it has nothing to learn from and nothing to forward.

    Args:
        k: the device, from 0.
        blocks: all blocks.
        parts: batches are cut into so many; one update for all.
        ahead: outputs that may have gone up and are without feedback yet; without feedback, and not yet taken up.
        feedback: False for blocks that learn at their forward pass, from what they have in their caches.
        again: whether a block evaluates a microbatch again when its feedback has come, if it has updated since.
    """

    def __init__(
        self, k: int, blocks: Sequence[Block], parts: int, ahead: int, *, feedback: bool, again: bool = False
    ) -> None:
        self._k, self._block, self._parts = k, blocks[k], parts
        self._top = k == len(blocks) - 1
        self._sent_below = blocks[k - 1].sent if k else 0.0
        self._with_feedback = feedback
        self._again = again
        # as when the pipeline has filled up: an output waits at every device, and if there may be two of each
        # device's own on their way, a piece of feedback as well
        above = len(blocks) - 1 - k
        down = int(feedback and ahead > above)
        away = above * (1 + down) if feedback else 1
        self._have: dict[Hashable, int] = {"up": 1, "down": down, "room": ahead - away}
        self._learnt = self._updates = 0
        self._sent_at = deque([-1] * away)  # for what is on its way: how many updates there were
        self._then: deque[Task] = deque()
        self._went_ahead = False

    def receive(self, tag: Hashable) -> None:
        """Take a message in."""
        self._have[tag] += 1

    def next(self) -> Task | None:
        """Learn, else forward, else wait; the other way round where no update follows what is learnt."""
        if self._then:
            return self._then.popleft()
        block, have = self._block, self._have
        feedback = have["down"] if self._with_feedback and not self._top else 0
        # where no update follows a microbatch goes up first, one for each piece of feedback
        early = 0 < feedback < self._parts - self._learnt % self._parts and not self._went_ahead
        self._went_ahead = early and (not self._k or have["up"] > 0)
        if feedback and not self._went_ahead:
            have["down"] -= 1
            have["room"] += 1
            moved = self._sent_at.popleft() < self._updates
            return self._learn(self._again * moved * block.forward + block.backward, ())
        if (self._k and not have["up"]) or not (self._top or have["room"] or self._went_ahead):
            return None
        taken: tuple[Message, ...] = ()
        if self._k:
            have["up"] -= 1
            taken = () if self._with_feedback else (Message(self._k - 1, "room", 0.0),)
        if self._top:
            return self._learn(block.forward + block.backward - self._spared, taken)
        have["room"] -= 1
        if self._with_feedback:
            self._sent_at.append(self._updates)
        else:
            self._then.appendleft(self._learn(block.backward - self._spared, ()))
        stashed = block.copied if self._with_feedback and not self._again else 0.0
        return Task(stashed + block.forward, (*taken, Message(self._k + 1, "up", block.sent)))

    def wanted(self) -> Collection[Hashable]:
        """Nothing that has to be asked for."""
        return ()

    @property
    def _spared(self) -> float:
        return 0.0 if self._with_feedback else self._block.inward

    def _learn(self, seconds: float, sends: tuple[Message, ...]) -> Task:
        last = self._learnt % self._parts == self._parts - 1
        self._then.append(Task(self._block.update * last + self._block.taken * (self._parts > 1), (), last))
        self._learnt += 1
        self._updates += last
        if self._k and self._with_feedback:
            sends = (*sends, Message(self._k - 1, "down", self._sent_below))
        return Task(seconds, sends)


def free_running(blocks: Sequence[Block], parts: int, in_flight: int, *, again: bool = True) -> list[Program]:
    """BlockProp without ticks: a block learns if feedback has come, and forwards the next batch if not.

    Args:
        blocks: all blocks.
        parts: M, one update for so many microbatches.
        in_flight: microbatches that a block may have on their way, without feedback, for each block above it.
        again: as in [`lock_step`][blockprop.planning.methods.lock_step].
    """
    top = len(blocks) - 1
    return [_Free(k, blocks, parts, in_flight * (top - k), feedback=True, again=again) for k in range(len(blocks))]


def streaming(blocks: Sequence[Block], parts: int) -> list[Program]:
    """BlockProp on cached feedback: outputs go up and nothing comes down.

    Each block takes its forward pass and a backward pass that spares the gradient in its own input. It may be as far
    ahead of the next one as the queue between them is long.
    """
    return [_Free(k, blocks, parts, QUEUE, feedback=False) for k in range(len(blocks))]
