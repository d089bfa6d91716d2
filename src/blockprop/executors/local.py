"""The reference: Algorithm 1, one block after the other, in this thread."""

from collections.abc import Sequence

from torch import Tensor

from blockprop.executors.executor import LinkReport, StepReport, Synchronous, check_finite
from blockprop.gluing import Gluing
from blockprop.stage import Stage

__all__ = ["LocalExecutor"]


class LocalExecutor(Synchronous):
    """Runs the stages in turn.

    Each block takes its W-step right after its h-step rather than after all h-steps. The numbers are those of
    the published order, since no other block's problem contains its weights or its gluing variable (the
    forward pass is over); and a block's activations are freed before the next block's turn.
    """

    def step(
        self,
        stages: Sequence[Stage],
        inputs: Tensor,
        targets: Tensor,
        *,
        ids: Tensor | None = None,  # noqa: ARG002 - every example is fresh
        update: bool = True,
        recompute: bool = False,
    ) -> StepReport:
        """One iteration of Algorithm 1; see [`Executor`][blockprop.executors.Executor]."""
        last = stages[-1]
        evaluations = []
        h = inputs
        for stage in stages:
            # the last block's turn comes at once: its graph is not worth rebuilding
            evaluations.append(stage.forward(h, keep_graph=not recompute or stage is last))
            h = evaluations[-1].output

        del h
        loss = 0.0
        links: list[LinkReport] = []
        target: Gluing | Tensor = targets
        for stage in reversed(stages):
            term, feedback = stage.train(evaluations.pop(), target)
            if stage is last:
                loss = check_finite(term)
            if update:
                stage.update()
            if feedback is not None:
                links.append(LinkReport.of(feedback))
                target = feedback.gluing
        return StepReport(loss, len(inputs), links[::-1])

    def close(self) -> None:
        """Nothing to give back."""
