"""A discrete-event simulation: devices that work through their tasks and wait for each other's messages.

A device does one task at a time. What it does next its *program* says, from the messages that have come so far. At
the end of a task its messages go out, each over the link from this device to that one: one after the other at the
link's bandwidth, or at what is left of it for one that sets out while messages go the other way, and there after its
latency. A message to oneself is there at once. One that is *asked* for goes out only when the receiver has said that
it is ready for it: where its program says so, at the latest when it has nothing else to do. The question takes the
way of the receiver's own messages, behind those that are on the link already.
"""

import heapq
import itertools
from collections import defaultdict, deque
from collections.abc import Collection, Hashable, Iterator, Sequence
from typing import NamedTuple, Protocol

from blockprop.planning.cluster import Cluster, Link

__all__ = ["Message", "Ordered", "Program", "Run", "Step", "Task", "simulate"]


class Message(NamedTuple):
    """What a task sends when it is done.

    Attributes:
        receiver: number of the device, from 0.
        tag: what the receiver's program knows it by.
        size: bytes; a message of 0 bytes costs nothing but the latency.
        asked: whether it waits until the receiver asks for it, default False.
    """

    receiver: int
    tag: Hashable
    size: float
    asked: bool = False


class Task(NamedTuple):
    """A piece of work.

    Attributes:
        seconds: on a device of speed 1 that works alone.
        sends: the messages that go out at its end.
        batch: whether the device is done with a batch at its end.
        asks: tags of the messages that the device asks for as soon as it comes to this task.
    """

    seconds: float
    sends: tuple[Message, ...] = ()
    batch: bool = False
    asks: tuple[Hashable, ...] = ()


class Program(Protocol):
    """What one device does."""

    def receive(self, tag: Hashable) -> None:
        """Take a message in."""
        ...

    def next(self) -> Task | None:
        """The next task, which begins now; None to wait for a message."""
        ...

    def wanted(self) -> Collection[Hashable]:
        """Tags of the messages that it waits for, where it knows them and they have to be asked for."""
        ...


class Step(NamedTuple):
    """A task of a fixed order, and the tags of the messages that it needs."""

    needs: tuple[Hashable, ...]
    task: Task


class Ordered:
    """A program that does its steps in a fixed order, each as soon as its messages are there.

    Args:
        steps: may be without an end.
    """

    def __init__(self, steps: Iterator[Step]) -> None:
        self._steps = steps
        self._head = next(steps, None)
        self._arrived: set[Hashable] = set()

    def receive(self, tag: Hashable) -> None:
        """Take a message in."""
        self._arrived.add(tag)

    def next(self) -> Task | None:
        """The next task of the order, if all that it needs is there."""
        if self._head is None or not self._arrived.issuperset(self._head.needs):
            return None
        needs, task = self._head
        self._arrived.difference_update(needs)
        self._head = next(self._steps, None)
        return task

    def wanted(self) -> Collection[Hashable]:
        """What the next task asks for, or needs and is not there."""
        if self._head is None:
            return []
        needs, task = self._head
        return [*task.asks, *(tag for tag in needs if tag not in self._arrived)]


class Run(NamedTuple):
    """What a simulation found.

    Attributes:
        ends: when each device was done with each batch, in seconds.
        worked: for how many seconds each device had worked by then.
    """

    ends: list[list[float]]
    worked: list[list[float]]

    def rate(self) -> float:
        """Batches per second of the slowest device, over the later half of the run.

        What the slowest device does all others will do in the end, however far they still run ahead of it.
        """
        return min((len(ends) - 1 - len(ends) // 2) / (ends[-1] - ends[len(ends) // 2]) for ends in self.ends)

    def busy(self) -> list[float]:
        """Share of the time that each device works, from its work per batch at that rate."""
        rate = self.rate()
        return [min(1.0, rate * (at[-1] - at[len(at) // 2]) / (len(at) - 1 - len(at) // 2)) for at in self.worked]


_Arrival = tuple[float, int, Hashable, float]  # when, where, what is heard there, and how long that occupies the device


class _Links:
    """When each link can take its next message, and what waits to be asked for."""

    def __init__(self, link: Link) -> None:
        self._link, self._latency = link, link.latency / 1e3
        # by sender and receiver: when each message joined the queue, and when it is through
        self._queues: defaultdict[int, defaultdict[int, deque[tuple[float, float]]]] = defaultdict(
            lambda: defaultdict(deque)
        )
        self._asked: dict[tuple[int, Hashable], tuple[float, dict[int, float]]] = {}  # when, and behind what
        self._held: dict[tuple[int, Hashable], tuple[int, Message]] = {}  # with its sender

    def send(self, sender: int, message: Message, now: float) -> list[_Arrival]:
        """What a message that is ready now brings about, if it goes out."""
        awaited = message.receiver, message.tag
        if not message.asked:
            return self._go(sender, message, now, now)
        if awaited in self._asked:
            return self._go(sender, message, max(now, self._heard(sender, *self._asked[awaited])), now)
        self._held[awaited] = sender, message
        return []

    def ask(self, device: int, tags: Collection[Hashable], now: float) -> list[_Arrival]:
        """What a device that waits for these messages brings about."""
        found = []
        for awaited in ((device, tag) for tag in tags):
            if awaited not in self._asked:
                self._asked[awaited] = now, {there: self._behind(device, there, now) for there in self._queues[device]}
                if awaited in self._held:
                    sender, message = self._held.pop(awaited)
                    found += self._go(sender, message, self._heard(sender, *self._asked[awaited]), now)
        return found

    def _behind(self, sender: int, receiver: int, now: float) -> float:
        """When the messages are through that have joined a link's queue up to now."""
        return max((through for joined, through in self._waiting(sender, receiver, now) if joined <= now), default=0.0)

    def _waiting(self, sender: int, receiver: int, now: float) -> deque[tuple[float, float]]:
        """The queue of a link, without what is through; the latest message of all stays."""
        queue = self._queues[sender][receiver]
        while len(queue) > 1 and queue[0][1] <= now:
            queue.popleft()
        return queue

    def _heard(self, sender: int, now: float, behind: dict[int, float]) -> float:
        """When a sender hears a question that was put now, behind what was on the links of who asks."""
        return max(now, behind.get(sender, 0.0)) + self._latency

    def _go(self, sender: int, message: Message, ready: float, now: float) -> list[_Arrival]:
        """Send a message that is ready then, which may be later than now."""
        through = ready
        if message.size:
            queue = self._waiting(sender, message.receiver, now)
            start = max(ready, queue[-1][1] if queue else 0.0)
            back = self._queues[message.receiver].get(sender, ())
            both = any(joined <= start < gone for joined, gone in back)
            through = start + self._link.occupied(message.size, both=both)
            queue.append((ready, through))
        return [(through + self._latency, message.receiver, message.tag, self.handling(message))]

    def handling(self, message: Message) -> float:
        """Seconds that a message takes of the device at either end."""
        return self._link.handled(message.size) if message.size else 0.0


def simulate(programs: Sequence[Program], cluster: Cluster, batches: int) -> Run:
    """Run the programs until every device is done with so many batches.

    Args:
        programs: of every device.
        cluster: their speeds and links.
        batches: at least 4, so that half of them make a rate.

    Raises:
        ValueError: fewer batches.

    A task takes its seconds divided by the device's speed, and `contention` times that if another device works when it
    begins; and the handling of its messages, those that have come since the last task among them.

    >>> from blockprop.planning.cluster import Link
    >>> first = Ordered(Step((), Task(1.0, (Message(1, n, 125_000),), True)) for n in range(6))
    >>> second = Ordered(Step((n,), Task(0.5, (), True)) for n in range(6))
    >>> run = simulate([first, second], Cluster((1.0, 1.0), Link(bandwidth=1)), 4)
    >>> run.ends
    [[1.0, 2.0, 3.0, 4.0], [2.5, 3.5, 4.5, 5.5]]
    >>> run.rate(), run.busy()
    (1.0, [1.0, 0.5])
    """
    if batches < 4:
        raise ValueError(f"cannot take a rate from {batches} batches; expected at least 4")
    links, slower = _Links(cluster.link), cluster.contention
    running: list[Task | None] = [None] * len(programs)
    spent, occupied = [0.0] * len(programs), [0.0] * len(programs)
    run = Run([[] for _ in programs], [[] for _ in programs])
    events: list[tuple[float, int, int, Hashable | None, float]] = []
    working = unfinished = 0
    number = itertools.count()

    def hear(arrivals: Sequence[_Arrival]) -> None:
        for when, device, tag, handling in arrivals:
            heapq.heappush(events, (when, next(number), device, tag, handling))

    def begin(device: int, now: float) -> None:
        nonlocal working
        task = running[device] = programs[device].next()
        if task is None:
            hear(links.ask(device, programs[device].wanted(), now))
            return
        hear(links.ask(device, task.asks, now))
        handling = occupied[device] + sum(links.handling(one) for one in task.sends if one.receiver != device)
        occupied[device] = 0.0
        seconds = (task.seconds * (slower if working else 1.0) + handling) / cluster.speeds[device]
        working += 1
        spent[device] += seconds
        heapq.heappush(events, (now + seconds, next(number), device, None, 0.0))

    for device in range(len(programs)):
        begin(device, 0.0)
    unfinished = len(programs)
    while unfinished:
        assert events, "every device waits for another"
        now, _, device, tag, handling = heapq.heappop(events)
        if tag is not None:
            programs[device].receive(tag)
            occupied[device] += handling
            if running[device] is None:
                begin(device, now)
            continue
        task = running[device]
        assert task is not None
        working -= 1
        if task.batch and len(run.ends[device]) < batches:
            run.ends[device].append(now)
            run.worked[device].append(spent[device])
            unfinished -= len(run.ends[device]) == batches
        for message in task.sends:
            if message.receiver == device:
                programs[device].receive(message.tag)
            else:
                hear(links.send(device, message, now))
        begin(device, now)
    return run
