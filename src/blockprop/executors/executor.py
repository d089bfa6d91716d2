"""What an executor is, and what it reports."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from blockprop.hsolvers import Solution
from blockprop.latestage import Learnt
from blockprop.stage import Feedback, Stage

__all__ = ["STALENESS", "DivergedError", "Executor", "LinkReport", "StepReport", "Synchronous", "check_finite"]


STALENESS = ("age", "drift", "curvature", "limited", "input_age")
"""What a report of a link tells of late feedback."""


class DivergedError(ValueError):
    """The loss is NaN or infinite."""


@dataclass(frozen=True)
class LinkReport:
    """How the h-step of one link went.

    Attributes:
        gluing_loss: the batch's mean of ‖h*_{k+1} - b_k(h_k)‖² per example, without λ: a scalar tensor. At the h_k that
            the block was evaluated at going up; the published order learns at h*_k, which is another for k > 1.
        steps: h-steps taken.
        residual: see [`Solution`][blockprop.hsolvers.Solution].
        converged: see `Solution`.
        stable: see `Solution`.
        age: how old the feedback was when the block below learnt from it: ticks of the pipeline, visits of the
            example in the cache; 0 where nothing is late.
        drift: the mean of ‖b_now(h) - b_old(h)‖² per example: how far that block had moved its output since.
            NaN with stashed weights, at which alone it is evaluated.
        curvature: κ of the target that the feedback was made into; 0 where nothing is late.
        limited: share of the examples whose correction was longer than is trusted
            ([`Correction`][blockprop.correction.Correction]).
        input_age: how old the input of the block above was when it was evaluated: ticks since the block below made it,
            1 in a lock-step pipeline without latency; 0 where nothing is late, NaN where it is not known.
    """

    gluing_loss: Tensor
    steps: int
    residual: float
    converged: bool
    stable: bool
    age: float = 0.0
    drift: float = 0.0
    curvature: float = 0.0
    limited: float = 0.0
    input_age: float = 0.0

    @classmethod
    def of_late(cls, learnt: Learnt) -> "LinkReport":
        """The report of feedback that came late: one h-step was taken above, or none if it was cached."""
        return cls(
            learnt.gluing_loss,
            steps=int(not learnt.cached),
            residual=1.0,
            converged=False,
            stable=True,
            age=learnt.age,
            drift=learnt.drift,
            curvature=learnt.curvature,
            limited=learnt.limited,
            input_age=learnt.input_age,
        )

    @classmethod
    def of(cls, feedback: Feedback) -> "LinkReport":
        """The report of a feedback, which need not be kept for it."""
        solution: Solution = feedback.solution
        return cls(
            feedback.gluing.squared_sum / len(feedback.gluing.direction),
            solution.steps,
            solution.residual,
            solution.converged,
            solution.stable,
        )


@dataclass(frozen=True)
class StepReport:
    """What one step did.

    Attributes:
        loss: mean output loss of the batch, before the update; NaN where no batch came to the last block, as in
            the first steps of a pipeline.
        examples: examples in the batch.
        links: one report per link, bottom link first; empty for backprop. Where a process holds one block, that of
            the link above it.
        waited: seconds that the process waited for others.
    """

    loss: float
    examples: int
    links: list[LinkReport] = field(default_factory=list)
    waited: float = 0.0

    def __repr__(self) -> str:
        gluing = ", ".join(f"{value:.3g}" for value in self.gluing_loss)
        unstable = "" if self.stable else ", unstable"
        return f"StepReport(loss {self.loss:.4g}, {self.examples} examples, gluing loss [{gluing}]{unstable})"

    @property
    def gluing_loss(self) -> list[float]:
        """Mean of ‖h* - b(h)‖² per example and link, without λ, bottom link first."""
        return [link.gluing_loss.item() for link in self.links]

    @property
    def stable(self) -> bool:
        """Whether every h-step went down."""
        return all(link.stable for link in self.links)


class Executor(Protocol):
    """Anything that can carry a batch through the stages."""

    def step(
        self,
        stages: Sequence[Stage],
        inputs: Any,
        targets: Any,
        *,
        ids: Tensor | None = None,
        update: bool = True,
        recompute: bool = False,
    ) -> StepReport:
        """One iteration of Algorithm 1.

        Args:
            stages: bottom block first.
            inputs: h_1 = x, shape [N, ...].
            targets: y, N rows.
            ids: the examples' numbers in the training set, int64 [N], for executors that keep something by example.
            update: False to leave the gradients on `.grad` and the weights as they are.
            recompute: keep only the blocks' boundaries during the forward pass, and rebuild each block's
                activations when its turn comes.
        """
        ...

    def drain(self, stages: Sequence[Stage]) -> StepReport | None:
        """Learn from what is still on its way, and take nothing new in; None where nothing ever is."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on beyond the stages, as a tree for a checkpoint."""
        ...

    def load_state_dict(self, state: dict[str, Any], stages: Sequence[Stage]) -> None:
        """Continue from what `state_dict` returned."""
        ...

    def close(self) -> None:
        """Give back threads and other means; the executor can be used again."""
        ...


class Synchronous:
    """What the executors have in common that end every step with nothing on its way."""

    def drain(self, stages: Sequence[Stage]) -> None:
        """Nothing is on its way."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any], stages: Sequence[Stage]) -> None:
        """Nothing to continue."""


def check_finite(loss: Tensor) -> float:
    """The loss as a float.

    Raises:
        DivergedError: it is NaN or infinite, which is said before anything is updated.
    """
    value = loss.item()
    if not math.isfinite(value):
        raise DivergedError(
            f"the loss is {value}: training diverged, or the data hold NaN or infinity; lower the step size, clip "
            "gradients, or check the data"
        )
    return value
