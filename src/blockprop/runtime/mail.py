"""The messages of a schedule, carried over edges: every block waits for just what the schedule says it needs.

Nothing else is agreed on. All processes go through the same schedule, so each knows what its neighbours will send it,
and the numbers are those of the simulation in one process.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from blockprop.gluing import Gluing
from blockprop.latestage import LateStage
from blockprop.probe import Points
from blockprop.runtime.edge import Edge, Post
from blockprop.runtime.message import Message
from blockprop.runtime.rendezvous import Place

__all__ = ["RemoteMail"]


class RemoteMail:
    """The mail of a process that holds one block.

    Args:
        place: which.
        post: where arrivals are.
        below: the edge to the block below; None for the first block.
        above: the edge to the block above; None for the last.
        late: the block's late stage.
        snapshot: of what lies in the post, when the neighbours are at the same point.
    """

    def __init__(
        self,
        place: Place,
        post: Post,
        below: Edge | None,
        above: Edge | None,
        late: LateStage,
        snapshot: Callable[[], list[Message]],
    ) -> None:
        self._place, self._post, self._below, self._above, self._late = place, post, below, above, late
        self._snapshot = snapshot

    def lives_here(self, k: int) -> bool:
        """Of one block."""
        return k == self._place.block

    def send_output(self, k: int, number: int, output: Tensor, ids: Tensor | None) -> None:  # noqa: ARG002
        """To the process above."""
        assert self._above is not None
        self._above.send(output_message(number, output, ids, self._late.version))

    def take_output(self, k: int, number: int, ids: Tensor | None) -> Tensor:
        """Wait for the process below."""
        return output_of(self._post.take("output", number), k, ids)

    def send_feedback(self, k: int, number: int, gluing: Gluing) -> None:  # noqa: ARG002
        """To the process below: the displacement alone, whose anchor the block below has."""
        assert self._below is not None
        self._below.send(feedback_message(number, gluing, self._late.version))

    def take_feedback(self, k: int, number: int) -> Gluing:  # noqa: ARG002
        """Wait for the process above."""
        return gluing_of(self._post.take("feedback", number), self._late.stage.device)

    def ask(self, k: int, points: Points, labels: Tensor | None) -> Points:  # noqa: ARG002
        """Send the points up, and wait for the slopes."""
        assert self._above is not None
        self._above.send(Message("points", k, points))
        return [value.to(self._late.stage.device) for value in self._post.take("slopes", k).values]

    def serve(self, asking: int, labels: Tensor | None) -> None:
        """Carry the points of a block below further up, and the slopes down again."""
        if asking > self._place.block:
            return
        assert self._below is not None
        points = list(self._post.take("points", asking).values)
        if self._late.top:
            assert labels is not None
            slopes = self._late.probe.slopes(points, labels)
        else:
            slopes = self._late.probe.pulled(points, self.ask(asking, self._late.probe.carried(points), None))
        self._below.send(Message("slopes", asking, slopes))

    def state_dict(self) -> dict[str, Any]:
        """What the neighbours have sent and is not yet taken; all processes call it at the same point."""
        return {"messages": [message.state() for message in self._snapshot()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put it back."""
        self._post.restore([Message(*message) for message in state["messages"]])


def output_message(number: int, output: Tensor, ids: Tensor | None, version: int) -> Message:
    """An output, with the examples' numbers, and how many updates the block has made."""
    return Message("output", number, [output] if ids is None else [output, ids], {"version": version})


def output_of(message: Message, k: int, ids: Tensor | None) -> Tensor:
    """The output in a message to block k.

    Raises:
        ValueError: it is of other examples than this process has in that batch.
    """
    output, *theirs = message.values
    if theirs and ids is not None and not torch.equal(theirs[0], ids):
        raise ValueError(
            f"block {k} has other examples in batch {message.number} than the block below; expected the same data, "
            "batch size and seed in all processes"
        )
    return output


def feedback_message(number: int, gluing: Gluing, version: int) -> Message:
    """A gluing variable without its anchor, and how many updates the block above has made."""
    more = {"count": gluing.count, "scale": gluing.scale, "version": version}
    return Message("feedback", number, [gluing.direction], more)


def gluing_of(message: Message, device: torch.device) -> Gluing:
    """The gluing variable in a message; its anchor is the displacement itself, and not to be looked at."""
    direction: Sequence[Tensor] = [value.to(device) for value in message.values]
    return Gluing(direction[0], direction[0], message.more["count"], message.more["scale"])
