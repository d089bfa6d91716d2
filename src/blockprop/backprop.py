"""Backpropagation, in the same shape as BlockProp."""

from collections.abc import Sequence

import torch
from torch import Tensor

from blockprop.blocks import Blocks
from blockprop.errors import block_failed
from blockprop.evaluation import autocast
from blockprop.executors import StepReport
from blockprop.executors.executor import check_finite
from blockprop.learner import Learner, check_batch
from blockprop.losses import OutputLoss
from blockprop.wstep import WStep

__all__ = ["Backprop", "backprop_gradient"]


def backprop_gradient(
    blocks: Blocks,
    wsteps: Sequence[WStep],
    loss: OutputLoss,
    inputs: Tensor,
    targets: Tensor,
    *,
    precision: torch.dtype | None = None,
) -> float:
    """Backpropagate a batch through all blocks, onto the parameters' `.grad`; the mean loss.

    Raises:
        ValueError: an empty batch, labels out of range, a loss that is not finite.
    """
    check_batch(inputs, targets)
    h = inputs
    with torch.enable_grad():
        for k, block in enumerate(blocks, 1):
            parameter = next(block.parameters(), None)
            h = h if parameter is None else h.to(parameter.device)
            try:
                with autocast(h.device, precision):
                    h = block(h)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, IndexError) as error:
                raise block_failed(k, block, h, error) from error
        mean, _ = loss(h.float() if h.dtype == torch.bfloat16 else h, targets.to(h.device))
        value = check_finite(mean)
        parameters = [parameter for wstep in wsteps for parameter in wstep.parameters]
        gradients = iter(torch.autograd.grad(mean, parameters, allow_unused=True))
    for wstep in wsteps:
        wstep.add([next(gradients) for _ in wstep.parameters])
    return value


class Backprop(Learner):
    """Backpropagation through all blocks at once, as the baseline: same blocks, optimizers, clipping, reports.

    Its arguments and errors are those of [`Learner`][blockprop.learner.Learner].
    """

    def step(self, inputs: Tensor, targets: Tensor, ids: Tensor | None = None) -> StepReport:  # noqa: ARG002
        """One step of backpropagation on a batch; arguments and errors as in `BlockProp.step`."""
        report = self.gradient(inputs, targets)
        for wstep in self.wsteps:
            wstep.update()
        return report

    def gradient(self, inputs: Tensor, targets: Tensor) -> StepReport:
        """As `step`, but the gradients are left on the parameters' `.grad` and no weight is updated."""
        loss = backprop_gradient(self.blocks, self.wsteps, self.loss, inputs, targets, precision=self.precision)
        return StepReport(loss, len(inputs))

    def finish(self) -> None:
        """Nothing is on its way."""

    def close(self) -> None:
        """Nothing to give back."""
