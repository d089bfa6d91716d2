"""The other processes of a run, as one block sees them: the block below, the block above, and its own replicas."""

import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from blockprop.executors.mail import Mail
from blockprop.latestage import LateStage
from blockprop.modes import evaluating
from blockprop.runtime.edge import Edge, Post
from blockprop.runtime.mail import RemoteMail
from blockprop.runtime.message import Message, Precision
from blockprop.runtime.rendezvous import LOOPBACK, Place, Rendezvous
from blockprop.runtime.replicas import Replicas

__all__ = ["Neighbours"]


class Neighbours:
    """A process's edges, and what all processes of a pipeline do together.

    Args:
        place: which block and replica this process is.
        rendezvous: where the processes find each other.
        listen: this process's address for connections; default this machine alone.
        precision: of outputs and feedback on their way.
        parted: set by `close`, if given.

    Raises:
        LostError: a neighbour does not come.
    """

    def __init__(
        self,
        place: Place,
        rendezvous: Rendezvous,
        *,
        listen: str = LOOPBACK,
        precision: Precision = "float32",
        parted: threading.Event | None = None,
    ) -> None:
        self.place = place
        self._parted = parted
        self.post = Post()
        self.own = Replicas(place, rendezvous, listen=listen) if place.replicas > 1 else None
        self._counter = itertools.count()

        def edge(lower: int) -> Edge:
            name = f"{lower}-{lower + 1}/{place.replica}"
            upper = place.block == lower + 1
            return Edge(rendezvous, name, upper=upper, post=self.post, listen=listen, precision=precision)

        # bottom first in every process: nobody waits for one who waits for another
        self.below = edge(place.block - 1) if place.block > 1 else None
        self.above = edge(place.block) if not place.top else None

    @property
    def first(self) -> bool:
        """Whether this is the first block's process."""
        return self.below is None

    @property
    def last(self) -> bool:
        """Whether this is the last block's process."""
        return self.above is None

    @property
    def block(self) -> int:
        """K."""
        return self.place.block

    @property
    def blocks(self) -> int:
        """K."""
        return self.place.blocks

    @property
    def average(self) -> Callable[[Sequence[nn.Parameter]], None] | None:
        """See `Remote`."""
        return None if self.own is None else self.own.average

    @property
    def replica(self) -> int:
        """r, from 0."""
        return self.place.replica

    @property
    def replicas(self) -> int:
        """R."""
        return self.place.replicas

    @property
    def waited(self) -> float:
        """Seconds waited for messages, or for room to send them."""
        return self.post.waited

    def mail(self, lates: Sequence[LateStage]) -> Mail:
        """See [`Remote`][blockprop.executors.mail.Remote]."""
        return RemoteMail(self.place, self.post, self.below, self.above, lates[self.place.block - 1], self.snapshot)

    def expect(self, messages: int) -> None:
        """See `Remote`."""
        self.post.capacity = max(self.post.capacity, messages + 64)

    @torch.no_grad()
    def predict(self, blocks: Sequence[nn.Module], inputs: Tensor | None) -> Tensor | None:
        """The network's outputs in evaluation mode, block after block; see `Remote`."""
        number = next(self._counter)
        block = blocks[self.place.block - 1]
        parameter = next(block.parameters(), None)
        if self.below is not None:
            inputs = self.post.take("evaluate", number).values[0]
        assert inputs is not None
        with evaluating([block]):
            output: Tensor = block(inputs if parameter is None else inputs.to(parameter.device))
        if self.above is None:
            return output
        self.above.send(Message("evaluate", number, [output]))
        return None

    def share(self, value: Any) -> Any:
        """From the last block down to the first; see `Remote`."""
        number = next(self._counter)
        if self.above is not None:
            value = self.post.take("share", number).more["value"]
        if self.below is not None:
            self.below.send(Message("share", number, more={"value": value}))
        return value

    def snapshot(self) -> list[Message]:
        """What lies here when this process and its neighbours are at the same point; it stays here.

        All that they sent before has come, and they send nothing more until it is written down here.
        """
        self._meet()
        found = self.post.left()
        self._meet()
        return found

    def _meet(self) -> None:
        number = next(self._counter)
        if self.above is not None:
            self.above.send(Message("mark from below", number))
        if self.below is not None:
            self.below.send(Message("mark from above", number))
            self.post.take("mark from below", number)
        if self.above is not None:
            self.post.take("mark from above", number)

    def traffic(self) -> dict[str, int]:
        """Bytes sent so far, heads of messages included; see `Remote`."""
        return {
            "up": 0 if self.above is None else self.above.sent_bytes,
            "down": 0 if self.below is None else self.below.sent_bytes,
            "across": 0 if self.own is None else self.own.bytes,
        }

    def close(self) -> None:
        """Part from the neighbours; nothing is on its way any more."""
        for edge in (self.below, self.above):
            if edge is not None:
                edge.close()
        if self._parted is not None:
            self._parted.set()
