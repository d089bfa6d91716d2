"""W-steps in parallel threads: the paper's "all blocks in parallel" (Algorithm 1, line 8), on the blocks' devices.

The forward pass and the sweep of h-steps run in the calling thread, from one block to the next; every block's
W-step starts in a thread of its own as soon as its target is there. So the h-gradient and the W-gradient come
from two backward passes instead of one: more work, of which the part outside the sweep overlaps.

    caller   forward 1..K │ h-step K │ h-step K-1 │ ... │ h-step 2 │
    threads                          └ W-step K   └ W-step K-1     └ W-steps 2 and 1
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch
from torch import Tensor

from blockprop.evaluation import Evaluation
from blockprop.executors.executor import LinkReport, StepReport, Synchronous, check_finite
from blockprop.executors.local import LocalExecutor
from blockprop.gluing import Gluing
from blockprop.stage import Feedback, Stage

__all__ = ["ThreadsExecutor"]


class ThreadsExecutor(Synchronous):
    """Runs W-steps in threads, one per block.

    The first exception in any of them stops the step: W-steps that have not begun are dropped, those under way
    are waited for, and it is raised in the caller.

    Args:
        threads_per_block: intra-op threads of each W-step, default 1: the blocks share the cores.
    """

    def __init__(self, threads_per_block: int = 1) -> None:
        self.threads_per_block = threads_per_block
        self._pool: ThreadPoolExecutor | None = None

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
        if len(stages) == 1:
            return LocalExecutor().step(stages, inputs, targets, update=update, recompute=recompute)
        pool = self._threads(len(stages))
        failures: list[BaseException] = []

        def w_step(stage: Stage, evaluation: Evaluation, target: Gluing | Tensor, feedback: Feedback | None) -> None:
            if failures:
                return
            try:
                stage.add_gradient(evaluation, target, feedback)
                if update:
                    stage.update()
            except BaseException as failure:
                failures.append(failure)

        loss = 0.0
        links: list[LinkReport] = []
        w_steps: list[Future[None]] = []
        try:
            evaluations = []
            h = inputs
            for stage in stages:
                evaluations.append(stage.forward(h, keep_graph=not recompute))
                h = evaluations[-1].output
            target: Gluing | Tensor = targets
            for stage in reversed(stages):
                evaluation, feedback = evaluations.pop(), None
                if stage.below is not None:
                    feedback = stage.h_step(evaluation, target, with_gradient=False)
                    links.append(LinkReport.of(feedback))
                    if stage is stages[-1]:
                        loss = check_finite(feedback.term)
                w_steps.append(pool.submit(w_step, stage, evaluation, target, feedback))
                if failures:
                    break
                if feedback is not None:
                    target = feedback.gluing
        except BaseException as failure:
            failures.append(failure)
        wait(w_steps)
        if failures:
            raise failures[0]
        return StepReport(loss, len(inputs), links[::-1])

    def _threads(self, blocks: int) -> ThreadPoolExecutor:
        if self._pool is None or self._pool._max_workers < blocks:
            self.close()
            self._pool = ThreadPoolExecutor(
                blocks, "blockprop", initializer=torch.set_num_threads, initargs=(self.threads_per_block,)
            )
        return self._pool

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
