"""Every method as the programs that its devices run.

A block is a part of the network on one device, with its costs. The programs of the synchronous methods are fixed
orders; where a device decides by what has come, they are classes of their own.
"""

import itertools
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from blockprop.planning.costs import Layer
from blockprop.planning.events import Message, Ordered, Program, Step, Task
from blockprop.schedules import delay

__all__ = ["Block", "free_running", "gpipe", "lock_step", "one_f_one_b", "streaming", "zero_bubble"]


@dataclass(frozen=True)
class Block:
    """What one block costs on some number of examples, in seconds on a device of speed 1.

    Attributes:
        forward: its forward pass.
        backward: its backward pass, for its weights and its input.
        inward: of the backward pass, what gives the gradient in its input and nothing else; 0 at the bottom.
        inputs: a backward pass for the input alone, as zero bubble makes it first.
        update: a step of its optimizer. Adding up gradients of two microbatches takes as long: it moves as much.
        sent: bytes of its output, and of the feedback that comes back for it.
    """

    forward: float
    backward: float
    inward: float
    inputs: float
    update: float
    sent: float

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
        )


def _ordered(
    block: Block, order: Sequence[tuple[Literal["F", "B"], int]], k: int, blocks: int, sent_below: float
) -> Iterator[Step]:
    """Batch after batch, a device's forwards and backwards of its microbatches in this order, and an update."""
    for batch in itertools.count():
        first = True
        for kind, part in order:
            if kind == "F":
                sends = (Message(k + 1, ("F", batch, part), block.sent),) if k < blocks - 1 else ()
                yield Step((("F", batch, part),) if k else (), Task(block.forward, sends))
            else:
                sends = (Message(k - 1, ("B", batch, part), sent_below),) if k else ()
                seconds = block.backward + (0.0 if first else block.update)
                yield Step((("B", batch, part),) if k < blocks - 1 else (), Task(seconds, sends))
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


class _ZeroBubble:
    """A device that fills its waits with the weights' gradients: backward for inputs, else forward, else weights.

    Args:
        chunks: number and costs of the chunks on this device, bottom first.
        home: the device of every chunk.
        below: bytes that a chunk's input has.
        microbatches: M.
    """

    def __init__(
        self, chunks: Sequence[tuple[int, Block]], home: Sequence[int], below: Sequence[float], microbatches: int
    ) -> None:
        self._chunks, self._home, self._below, self._parts = list(chunks), home, below, microbatches
        self._arrived: set[Hashable] = set()
        self._batch = -1
        self._new_batch()

    def _new_batch(self) -> None:
        self._batch += 1
        self._up = dict.fromkeys((chunk for chunk, _ in self._chunks), 0)
        self._down = self._up.copy()
        self._weights = self._up.copy()

    def receive(self, tag: Hashable) -> None:
        """Take a message in."""
        self._arrived.add(tag)

    def next(self) -> Task | None:
        """The task of the highest rank that can be done now."""
        top = len(self._home) - 1
        for chunk, block in reversed(self._chunks):
            part = self._down[chunk]
            tag = "B", self._batch, chunk, part
            if part < self._up[chunk] and (chunk == top or tag in self._arrived):
                self._arrived.discard(tag)
                self._down[chunk] += 1
                return Task(block.inputs, self._message("B", chunk - 1, part, self._below[chunk]))
        for place, (chunk, block) in reversed(list(enumerate(self._chunks))):
            part = self._up[chunk]
            tag = "F", self._batch, chunk, part
            room = place > 0 or part - self._down[chunk] < len(self._home)
            if part < self._parts and room and (chunk == 0 or tag in self._arrived):
                self._arrived.discard(tag)
                self._up[chunk] += 1
                return Task(block.forward, self._message("F", chunk + 1, part, block.sent))
        for chunk, block in reversed(self._chunks):
            part = self._weights[chunk]
            if part < self._down[chunk]:
                self._weights[chunk] += 1
                return Task(max(0.0, block.backward - block.inputs) + (block.update if part else 0.0))
        if all(done == self._parts for done in self._weights.values()):
            self._new_batch()
            return Task(sum(block.update for _, block in self._chunks), (), True)
        return None

    def _message(self, kind: str, chunk: int, part: int, size: float) -> tuple[Message, ...]:
        if not 0 <= chunk < len(self._home):
            return ()
        return (Message(self._home[chunk], (kind, self._batch, chunk, part), size),)


def zero_bubble(chunks: Sequence[Block], devices: int, microbatches: int) -> list[Program]:
    """Backward passes in two parts, of which only the input's is waited for (Qi et al. 2024).

    Args:
        chunks: K of them, or 2K in the shape of a V (ZBV): the device of chunk 1 has chunk 2K as well, and so on.
        devices: K.
        microbatches: M.
    """
    home = [chunk if chunk < devices else 2 * devices - 1 - chunk for chunk in range(len(chunks))]
    below = _below(chunks)
    return [
        _ZeroBubble([(c, chunk) for c, chunk in enumerate(chunks) if home[c] == k], home, below, microbatches)
        for k in range(devices)
    ]


def lock_step(blocks: Sequence[Block], parts: int, *, again: bool = True) -> list[Program]:
    """BlockProp's pipeline tick by tick, as [`pipelined`][blockprop.schedules.pipelined] says, when it has filled up.

    Block k learns from the batch whose feedback has come, and forwards a new one; the top does the two passes of one
    batch. A tick needs both neighbours' messages of the tick before.

    Args:
        blocks: all blocks.
        parts: M, one update for so many microbatches.
        again: whether a block evaluates a microbatch again when its feedback has come, if an update came between; not
            with stashed weights.
    """

    def steps(k: int) -> Iterator[Step]:
        block, top = blocks[k], k == len(blocks) - 1
        twice = min(1.0, delay(len(blocks), k + 1, parts)) if again else 0.0
        for tick in itertools.count():
            needs: tuple[Hashable, ...] = ()
            if tick:
                needs = ("up",) * (k > 0) + ("down",) * (not top)
                needs = tuple((way, tick - 1) for way in needs)
            down = (Message(k - 1, ("down", tick), blocks[k - 1].sent),) if k else ()
            last = tick % parts == parts - 1
            update = block.update * (last + (tick % parts > 0))
            if top:
                yield Step(needs, Task(block.forward + block.backward, down))
                yield Step((), Task(update, (), last))
            else:
                yield Step(needs, Task(twice * block.forward + block.backward, down))
                yield Step((), Task(update, (), last))
                yield Step((), Task(block.forward, (Message(k + 1, ("up", tick), block.sent),)))

    return [Ordered(steps(k)) for k in range(len(blocks))]


class _Free:
    """A device that waits only if it has nothing to learn from and nothing to forward.

    Args:
        k: the device, from 0.
        blocks: all blocks.
        parts: batches are cut into so many; one update for all.
        window: messages that may be on the way to the block above and not yet taken up.
        feedback: False for blocks that learn at their forward pass, from what they have in their caches.
        again: whether a block evaluates a batch again when its feedback has come.
    """

    def __init__(
        self, k: int, blocks: Sequence[Block], parts: int, window: int, *, feedback: bool, again: bool = False
    ) -> None:
        self._k, self._block, self._parts = k, blocks[k], parts
        self._top = k == len(blocks) - 1
        self._sent_below = blocks[k - 1].sent if k else 0.0
        self._with_feedback = feedback
        self._again = again
        # as when the pipeline has filled up: one message waits on either side
        self._have: dict[Hashable, int] = {"up": 1, "down": 1, "room": window}
        self._learnt = 0
        self._then: Task | None = None

    def receive(self, tag: Hashable) -> None:
        """Take a message in."""
        self._have[tag] += 1

    def next(self) -> Task | None:
        """Learn, else forward, else wait."""
        if self._then is not None:
            task, self._then = self._then, None
            return task
        block, have = self._block, self._have
        if self._with_feedback and not self._top and have["down"]:
            have["down"] -= 1
            return self._learn(self._again * block.forward + block.backward, ())
        if (self._k and not have["up"]) or not (self._top or have["room"]):
            return None
        taken: tuple[Message, ...] = ()
        if self._k:
            have["up"] -= 1
            taken = (Message(self._k - 1, "room", 0.0),)
        if self._top:
            return self._learn(block.forward + block.backward - self._spared, taken)
        have["room"] -= 1
        if not self._with_feedback:
            self._then = self._learn(block.backward - self._spared, ())
        return Task(block.forward, (*taken, Message(self._k + 1, "up", block.sent)))

    @property
    def _spared(self) -> float:
        return 0.0 if self._with_feedback else self._block.inward

    def _learn(self, seconds: float, sends: tuple[Message, ...]) -> Task:
        last = self._learnt % self._parts == self._parts - 1
        seconds += self._block.update * (last + (self._learnt % self._parts > 0))
        self._learnt += 1
        if self._k and self._with_feedback:
            sends = (*sends, Message(self._k - 1, "down", self._sent_below))
        return Task(seconds, sends, last)


def free_running(blocks: Sequence[Block], parts: int, window: int, *, again: bool = True) -> list[Program]:
    """BlockProp without ticks: a block learns if feedback has come, and forwards the next batch if not.

    Args:
        blocks: all blocks.
        parts: M, one update for so many microbatches.
        window: messages that may be on the way to the block above and not yet taken up.
        again: as in [`lock_step`][blockprop.planning.methods.lock_step].
    """
    return [_Free(k, blocks, parts, window, feedback=True, again=again) for k in range(len(blocks))]


def streaming(blocks: Sequence[Block], parts: int, window: int) -> list[Program]:
    """BlockProp on cached feedback: outputs go up and nothing comes down.

    Each block takes its forward pass and a backward pass that spares the gradient in its own input.
    """
    return [_Free(k, blocks, parts, window, feedback=False) for k in range(len(blocks))]
