"""Slopes at outputs that were never sent: what the blocks above a link say there, for the curvature above it.

A few outputs go up through the blocks (`carried`), the loss has its slopes at the top (`slopes`), and these come down
again (`pulled`). Nothing of it leaves a trace in a block: not in its weights, its buffers, or the random numbers.
"""

import contextlib

import torch
from torch import Tensor
from torch.func import functional_call

from blockprop.evaluation import autocast, kept
from blockprop.losses import OutputLoss
from blockprop.objective import LossTerm
from blockprop.stage import Stage

__all__ = ["Points", "Probe"]

Points = list[Tensor]
"""Outputs of one block on a few examples, at which the curvature above is measured: as it was sent, and moved from
there; or today's slopes of the summed loss at these."""


class Probe:
    """A block, asked for what it makes of outputs of the block below it.

    Args:
        stage: of the block.
    """

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def carried(self, points: Points) -> Points:
        """This block's outputs at another's outputs."""
        with torch.no_grad():
            return [self.aside(point) for point in points]

    def pulled(self, points: Points, slopes: Points) -> Points:
        """Slopes in this block's inputs `points`, from slopes in its outputs there."""
        found: Points = []
        for point, slope in zip(points, slopes, strict=True):
            leaf = self._leaf(point)
            with torch.enable_grad():
                output = self.aside(leaf)
            found += torch.autograd.grad(output, leaf, slope.to(output))
        return found

    def slopes(self, points: Points, labels: Tensor) -> Points:
        """The last block: slopes of the summed loss in its inputs `points`, at as many of the labels.

        Zero where these are all ignored.
        """
        loss = self._stage.above
        assert isinstance(loss, OutputLoss)
        found: Points = []
        for point in points:
            leaf = self._leaf(point)
            with torch.enable_grad():
                output = self.aside(leaf)
                summed, _ = LossTerm(loss, labels[: len(leaf)].to(output.device), total=1).mean(output)
                found += torch.autograd.grad(summed, leaf)
        return found

    def _leaf(self, point: Tensor) -> Tensor:
        return point.to(self._stage.device).detach().requires_grad_()

    def aside(self, inputs: Tensor) -> Tensor:
        """This block's output at inputs of shape [N, ...], in float32 or finer; with a graph where they are enabled."""
        block = self._stage.block
        copies = {name: buffer.clone() for name, buffer in block.named_buffers()}
        inputs = inputs.to(self._stage.device)
        random = torch.random.fork_rng(devices=[inputs.device] if inputs.is_cuda else [])
        unseen = getattr(self._stage.wstep.optimizer, "paused", contextlib.nullcontext)  # by one that looks at inputs
        with unseen(), random, autocast(inputs.device, self._stage.precision):
            output: Tensor = functional_call(block, copies, (kept(block, inputs),))
        return output.to(torch.promote_types(output.dtype, torch.float32))
