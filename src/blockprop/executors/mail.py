"""How the blocks of a pipeline reach each other: within one process, or, by the same protocol, across many."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from blockprop.gluing import Gluing
from blockprop.latestage import LateStage
from blockprop.probe import Points

__all__ = ["LocalMail", "Mail", "Remote"]


class Mail(Protocol):
    """Messages between neighbours. Block k takes what was sent to it; what is not there yet is waited for."""

    def lives_here(self, k: int) -> bool:
        """Whether block k is in this process."""
        ...

    def send_output(self, k: int, number: int, output: Tensor, ids: Tensor | None) -> None:
        """To block k, from the one below: its input for a microbatch, and the examples' numbers."""
        ...

    def take_output(self, k: int, number: int, ids: Tensor | None) -> Tensor:
        """What `send_output` sent to block k, which must be of the same examples."""
        ...

    def send_feedback(self, k: int, number: int, gluing: Gluing) -> None:
        """To block k, from the one above."""
        ...

    def take_feedback(self, k: int, number: int) -> Gluing:
        """What `send_feedback` sent to block k."""
        ...

    def ask(self, k: int, points: Points, labels: Tensor | None) -> Points:
        """Slopes at outputs of block k, from the blocks above it; `labels` where the last block lives here."""
        ...

    def serve(self, asking: int, labels: Tensor | None) -> None:
        """Do a part in answering block `asking`, where the blocks above it live here and it does not."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What has arrived and is not yet taken."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        ...


class Remote(Protocol):
    """The other processes of a run, seen from one that holds a part of the blocks."""

    @property
    def first(self) -> bool:
        """Whether the first block lives here, which reads the inputs."""
        ...

    @property
    def last(self) -> bool:
        """Whether the last block lives here, which reads the labels."""
        ...

    @property
    def block(self) -> int:
        """k, of the block that lives here."""
        ...

    @property
    def blocks(self) -> int:
        """K."""
        ...

    @property
    def average(self) -> Callable[[Sequence[nn.Parameter]], None] | None:
        """Averages the gradients of a block with those of its replicas; None if it has none."""
        ...

    @property
    def replica(self) -> int:
        """Which replica of its block this process has, from 0."""
        ...

    @property
    def replicas(self) -> int:
        """How many replicas every block has; each takes its share of every batch."""
        ...

    @property
    def waited(self) -> float:
        """Seconds that this process has waited for others."""
        ...

    def traffic(self) -> dict[str, int]:
        """Bytes sent so far, to the block above ("up"), the one below ("down") and the replicas ("across")."""
        ...

    def expect(self, messages: int) -> None:
        """Make room for so many outputs, or pieces of feedback, from one neighbour.

        What else the neighbours say comes behind them, so that the executor's own limit of what is on its way must
        hold them back, and not a lack of room.
        """
        ...

    def mail(self, lates: Sequence[LateStage]) -> Mail:
        """The mail of the blocks here."""
        ...

    def predict(self, blocks: Sequence[nn.Module], inputs: Tensor | None) -> Tensor | None:
        """The network's outputs in the process of the last block, None in the others; all call it alike.

        Args:
            blocks: all; those that live elsewhere are not touched.
            inputs: x, shape [N, ...], in the process of the first block.
        """
        ...

    def share(self, value: Any) -> Any:
        """What the process of the last block gives, in all; JSON-ready."""
        ...

    def close(self) -> None:
        """Part from the others."""
        ...


class LocalMail:
    """All blocks live here, and messages stay in this thread.

    Args:
        lates: the stages, bottom first.
    """

    def __init__(self, lates: Sequence[LateStage]) -> None:
        self._lates = lates
        self._outputs: dict[tuple[int, int], Tensor] = {}
        self._feedback: dict[tuple[int, int], Gluing] = {}

    def lives_here(self, k: int) -> bool:  # noqa: ARG002
        """Always."""
        return True

    def send_output(self, k: int, number: int, output: Tensor, ids: Tensor | None) -> None:  # noqa: ARG002
        """Keep it."""
        self._outputs[k, number] = output

    def take_output(self, k: int, number: int, ids: Tensor | None) -> Tensor:  # noqa: ARG002
        """Give it."""
        return self._outputs.pop((k, number))

    def send_feedback(self, k: int, number: int, gluing: Gluing) -> None:
        """Keep it."""
        self._feedback[k, number] = gluing

    def take_feedback(self, k: int, number: int) -> Gluing:
        """Give it."""
        return self._feedback.pop((k, number))

    def ask(self, k: int, points: Points, labels: Tensor | None) -> Points:
        """Up through the blocks above, and down again."""
        assert labels is not None
        above, carried = self._lates[k:], [points]
        for late in above[:-1]:
            carried.append(late.probe.carried(carried[-1]))
        slopes = above[-1].probe.slopes(carried.pop(), labels)
        for late in reversed(above[:-1]):
            slopes = late.probe.pulled(carried.pop(), slopes)
        return slopes

    def serve(self, asking: int, labels: Tensor | None) -> None:
        """Nothing to do: who asks does all."""

    def state_dict(self) -> dict[str, Any]:
        """Outputs and feedback on their way."""
        return {
            "outputs": [[k, number, value] for (k, number), value in self._outputs.items()],
            "feedback": [[k, n, g.anchor, g.direction, g.count, g.scale] for (k, n), g in self._feedback.items()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put them on their way again."""
        self._outputs = {(k, number): value for k, number, value in state["outputs"]}
        self._feedback = {(k, number): Gluing(*gluing) for k, number, *gluing in state["feedback"]}
