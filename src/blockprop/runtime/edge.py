"""Two neighbours: a process group of two ranks each way, a thread that sends, one that receives, bounded queues.

A group a pair, since a group of torch.distributed fails as a whole: one neighbour that is lost closes this edge alone.
And a group for each direction: gloo's own thread tries again and again to read what has come while another thread
writes to the same connection, for as long as the system lets it, and so takes the processor from the one that computes.
What arrives is put into the process's `Post`, where the thread that trains takes it from.

gloo sends a tensor when it knows that the other side waits for it. So the receiver always has some calls waiting ahead
of the messages: without them every message would first go once to and fro over the link. What is waited for may be
longer than what comes. So all calls are for one length, and before a message that is longer than that goes a word,
with the length that it is from then on: calls that wait keep their memory, and cannot be taken back.
"""

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from blockprop.errors import first_line
from blockprop.runtime.group import LostError, gloo
from blockprop.runtime.message import Message, Precision, pack, unpack
from blockprop.runtime.rendezvous import LOOPBACK, Rendezvous

__all__ = ["EDGE_THREADS", "Edge", "Post"]

EDGE_THREADS = ("send ", "receive ")
"""How the names of the threads of edges begin. One that waits for a lost neighbour cannot be ended."""

ROOM = 4096
"""Bytes of the first calls to receive."""

_WORD = 12  # bytes of a number below 2^64: no message begins with four that are zero
_CALLS = 4  # always waiting
_COARSE = ("output", "feedback")
_TRAINING = (*_COARSE, "points", "slopes")
_FROM_BELOW = ("output", "points", "evaluate", "mark from below")
_FROM_ABOVE = ("feedback", "slopes", "share", "mark from above")


class Post:
    """What has arrived at a process and is not yet taken, from all its edges.

    Args:
        capacity: messages of one edge that may lie here; its receiver then waits, and with it the sender.
    """

    def __init__(self, capacity: int = 64) -> None:
        self.capacity = capacity
        self._messages: dict[tuple[str, int], tuple[str, Message]] = {}
        self._held: dict[str, int] = {}
        self._lost: str | None = None
        self._parted: dict[str, str] = {}  # by kind of message that will come no more: why
        self.arrived = threading.Condition()
        self.waited = 0.0

    def put(self, edge: str, message: Message) -> None:
        """From a receiver's thread; waits while the edge has as many messages here as may be."""
        with self.arrived:
            self.arrived.wait_for(lambda: self._lost or self._held.get(edge, 0) < self.capacity)
            self._messages[message.kind, message.number] = edge, message
            self._held[edge] = self._held.get(edge, 0) + 1
            self.arrived.notify_all()

    def lose(self, why: str) -> None:
        """Let everybody who waits here know that it is in vain."""
        with self.arrived:
            self._lost = self._lost or why
            self.arrived.notify_all()

    def part(self, kinds: Sequence[str], why: str) -> None:
        """Let everybody who waits for messages of these kinds know that no more will come."""
        with self.arrived:
            self._parted |= dict.fromkeys(kinds, why)
            self.arrived.notify_all()

    def check(self) -> None:
        """Raise LostError if a neighbour is lost."""
        if self._lost is not None:
            raise LostError(self._lost)

    def take(self, kind: str, number: int) -> Message:
        """One message, once it is there.

        Raises:
            LostError: a neighbour is lost, or has ended and not sent it.
        """
        with self._waiting(kind, lambda: (kind, number) in self._messages):
            return self._pop(kind, number)

    def oldest(self, kind: str) -> Message | None:
        """The message of a kind with the lowest number, or None."""
        with self.arrived:
            numbers = self.here(kind)
            return self._pop(kind, min(numbers)) if numbers else None

    def here(self, kind: str) -> set[int]:
        """The numbers of the messages of a kind."""
        with self.arrived:
            return {number for one, number in self._messages if one == kind}

    def newer(self, kind: str, number: int) -> bool:
        """Whether a message of a kind and with a higher number is here, and is not empty."""
        with self.arrived:
            return any(
                one == kind and other > number and len(message.values) > 0
                for (one, other), (_, message) in self._messages.items()
            )

    def wait(self, kind: str, *others: str) -> None:
        """Wait for a message of a kind; one of the others will do as well.

        Raises:
            LostError: a neighbour is lost, or has ended without a message of the first kind.
        """
        with self._waiting(kind, lambda: any(one in (kind, *others) for one, _ in self._messages)):
            pass

    @contextlib.contextmanager
    def _waiting(self, kind: str, ready: Callable[[], bool]) -> Iterator[None]:
        start = time.perf_counter()
        with self.arrived:
            self.arrived.wait_for(lambda: ready() or self._lost is not None or kind in self._parted)
            self.waited += time.perf_counter() - start
            self.check()
            if not ready():
                raise LostError(self._parted[kind])
            yield

    def _pop(self, kind: str, number: int) -> Message:
        edge, message = self._messages.pop((kind, number))
        self._held[edge] -= 1
        self.arrived.notify_all()
        return message

    def left(self) -> list[Message]:
        """The outputs and feedback that lie here, without taking them; what else was said is of the moment."""
        with self.arrived:
            return [message for _, message in self._messages.values() if message.kind in _COARSE]

    def restore(self, messages: list[Message]) -> None:
        """Put back what a checkpoint had."""
        with self.arrived:
            for message in messages:
                self._messages[message.kind, message.number] = "checkpoint", message
                self._held["checkpoint"] = self._held.get("checkpoint", 0) + 1


class Edge:
    """This process's end of a link to a neighbour.

    Args:
        rendezvous: where the two find each other.
        name: of the edge, the same at both ends.
        upper: whether this is the end of the upper block.
        post: where arrivals go.
        listen: this end's address for connections, default this machine alone.
        precision: of the floating-point tensors of "output" and "feedback" messages.
        timeout: seconds that a message may be waited for, default a day; whether it is alive shows elsewhere.
        queue_length: messages that may wait to be sent, default 8; `send` then waits.

    Raises:
        LostError: the address cannot be used, or the neighbour does not come.
    """

    def __init__(
        self,
        rendezvous: Rendezvous,
        name: str,
        *,
        upper: bool,
        post: Post,
        listen: str = LOOPBACK,
        precision: Precision = "float32",
        timeout: float = 86_400.0,
        queue_length: int = 8,
    ) -> None:
        self.name = name
        self._peer, self._post, self._precision = int(not upper), post, precision
        self.sent_bytes = self.sent_messages = 0  # of training alone
        self._handed = 0  # messages of all kinds that the neighbour has taken
        ways = [
            gloo(rendezvous, f"edge {name}{way}", int(upper), 2, listen=listen, timeout=timeout)
            for way in ("", ", downwards")
        ]
        self._inward, self._outward = ways if upper else reversed(ways)
        self._outbox: queue.Queue[Message | None] = queue.Queue(queue_length)
        self._closing = False
        self._sender = threading.Thread(target=self._send_all, name=f"{EDGE_THREADS[0]}{name}", daemon=True)
        self._receiver = threading.Thread(target=self._receive_all, name=f"{EDGE_THREADS[1]}{name}", daemon=True)
        self._sender.start()
        self._receiver.start()

    def send(self, message: Message) -> None:
        """Hand a message over to be sent; waits while the queue is full.

        Raises:
            LostError: a neighbour is lost.
        """
        start = time.perf_counter()
        while True:
            self._post.check()
            try:
                self._outbox.put(message, timeout=0.5)
                break
            except queue.Full:
                continue
        self._post.waited += time.perf_counter() - start

    def _send_all(self) -> None:
        room, tag = ROOM, 0
        try:
            while (message := self._outbox.get()) is not None:
                body = pack(message, self._precision if message.kind in _COARSE else "float32")
                if len(body) > room:
                    room = max(len(body), 3 * room // 2)  # lengths that creep up do not leave calls of each behind
                    self._outward.send([_word(room)], self._peer, tag).wait()
                    tag += 1
                self._outward.send([body], self._peer, tag).wait()
                self._handed += 1
                if message.kind in _TRAINING:
                    self.sent_bytes += len(body)
                    self.sent_messages += 1
            self._outward.send([_word(0)], self._peer, tag).wait()
        except Exception as error:  # nobody else hears of it
            if not self._closing:
                self._post.lose(f"edge {self.name}: {first_line(error)}")

    def _receive_all(self) -> None:
        tag = 0
        try:
            ahead = _Ahead(self._inward, self._peer, tag, ROOM)
            while True:
                body = ahead.next()
                room = _worded(body)
                if room is None:
                    self._post.put(self.name, unpack(body))
                elif room:
                    tag += 1
                    ahead = _Ahead(self._inward, self._peer, tag, room)
                else:
                    why = f"edge {self.name}: the neighbour has ended; expected as many steps in all processes"
                    self._post.part(_FROM_BELOW if self._peer == 0 else _FROM_ABOVE, why)
                    return
        except Exception as error:  # nobody else hears of it
            if not self._closing:
                self._post.lose(f"edge {self.name}: {first_line(error)}")

    def close(self, timeout: float = 10.0) -> None:
        """Send what is left, say goodbye, wait for the neighbour's goodbye, and end the threads.

        Args:
            timeout: seconds without a message sent, and then without the goodbye, after which it is given up.
        """
        before = -1
        while self._sender.is_alive() and self._handed > before:  # a slow link is waited for, one that stands still not
            before = self._handed
            with contextlib.suppress(queue.Full):
                self._outbox.put(None, timeout=timeout)  # the sender ends at the first
                self._sender.join(timeout)
        self._receiver.join(timeout)
        self._closing = True


def _word(room: int) -> Tensor:
    """What says how long all is from then on; 0 is the goodbye."""
    return torch.frombuffer(bytearray(room.to_bytes(_WORD, "big")), dtype=torch.uint8)


def _worded(body: Tensor) -> int | None:
    """The length in a word; None if it is a message."""
    number = int.from_bytes(bytes(body[:_WORD].tolist()), "big")
    return number if number < 2**64 else None


class _Ahead:
    """Calls to receive as many bytes, or less, of which some are always waiting."""

    def __init__(self, group: Any, peer: int, tag: int, room: int) -> None:
        self._group, self._peer, self._tag, self._room = group, peer, tag, room
        self._waiting = deque(self._call() for _ in range(_CALLS))

    def _call(self) -> tuple[Tensor, Any]:
        tensor = torch.empty(self._room, dtype=torch.uint8)
        return tensor, self._group.recv([tensor], self._peer, self._tag)

    def next(self) -> Tensor:
        """The next bytes, once they are there; behind them the tensor is as it was made."""
        tensor, work = self._waiting.popleft()
        work.wait()
        self._waiting.append(self._call())
        return tensor
