"""What a pipeline makes of feedback that comes late.

The corrections compose: a curvature turns the feedback into a target (`TargetTerm`); stashed weights, predicted weights
and compensation in weight space are what the literature does.
"""

import math
from typing import Any

import torch
from torch import Tensor

from blockprop.curvature import Constant, Curvature, Secant
from blockprop.probe import Points
from blockprop.running import RunningMean
from blockprop.ways import norms, projected

__all__ = ["Correction"]


class Correction:
    """What is made of late feedback.

    Args:
        curvature: κ of the targets; default [`Secant`][blockprop.curvature.Secant], measured while training.
        along: let κ act along each example's own slope alone (`TargetTerm`); default False.
        across: the curvature across the slopes, if `along`; default none, 0.
        trust: how long the correction κ d of an example may be, as a multiple of the norm that an example's feedback
            has on its link (the root of a running mean square over the latest messages); default 0.3, at least 0. A
            κ that lags behind a curvature that falls is too large, and the correction then drives the block further
            than it corrects.
        reuse: take the gradient on the graph of the forward pass and at the weights that it had (weight stashing), for
            three passes instead of four. Nothing has moved there, so that the feedback is the delayed gradient.
        prediction: at which weights a block forwards: its present ones moved on by so many of the updates that it will
            make until the feedback is back, along the running mean of its updates; default 0; 1 is all of them.
        compensation: λ of DC-ASGD (Zheng et al. 2017), which adds λ g² (w_now - w_forward) to the stashed gradient g,
            entry by entry; default 0. Needs `reuse`. With microbatches or accumulated batches g is the part that each
            adds to the gradient.

    Raises:
        ValueError: a setting out of its range.
    """

    def __init__(
        self,
        *,
        curvature: Curvature | None = None,
        along: bool = False,
        across: Curvature | None = None,
        trust: float = 0.3,
        reuse: bool = False,
        prediction: float = 0.0,
        compensation: float = 0.0,
    ) -> None:
        if not 0 <= prediction < math.inf:
            raise ValueError(f"prediction is {prediction}; expected a finite number of at least 0")
        if not 0 <= compensation < math.inf:
            raise ValueError(f"compensation is {compensation}; expected a finite number of at least 0")
        if not trust >= 0:
            raise ValueError(f"trust is {trust}; expected a number of at least 0")
        if compensation and not reuse:
            raise ValueError("compensation corrects gradients at stashed weights; expected reuse=True with it")
        if across is not None and not along:
            raise ValueError("a curvature across the slopes is given; expected along=True with it")
        self.curvature: Curvature = curvature or Secant()
        self.along = along
        self.across: Curvature = across or Constant(0.0)
        self.trust = trust
        self._squares = RunningMean()  # ‖g‖² of an example, of its own summed loss
        self.reuse, self.prediction, self.compensation = reuse, prediction, compensation
        # on the graph of the forward pass nothing has moved
        self._idle = reuse or self.curvature == self.across == Constant(0.0)

    def points(self, old: Tensor, new: Tensor, slope: Tensor) -> Points:
        """Where slopes are to be asked for, to learn the curvatures: as was sent, and moved in each way κ acts in.

        An eighth of the examples, at least eight: one number is measured, and a running mean is taken of it.

        Args:
            old: a block's output as it was sent, shape [N, ...].
            new: at its present weights.
            slope: the feedback, shape [N, ...].
        """
        few = max(8, len(old) // 8)
        exact = torch.promote_types(old.dtype, torch.float32)  # a way is the difference of outputs that are close
        old, new, slope = (value[:few].to(exact) for value in (old, new, slope))
        way = new - old
        if not self.along:
            return [old, old + way]
        part = projected(way, slope)
        return [old, old + part, old + way - part]

    def measured(self, link: int, points: Points, slopes: Points) -> None:
        """Learn the curvatures above a link, from today's slopes at its `points`."""
        slopes = [slope.to(points[0].device) for slope in slopes]  # from the device of the block above
        if not slopes[0].any():  # labels that are all ignored tell nothing
            return
        pairs = zip(points[1:], slopes[1:], strict=True)
        for curvature, (point, slope) in zip((self.curvature, self.across), pairs, strict=False):
            curvature.measure(link, point - points[0], slope - slopes[0], slopes[0])

    def longest(self, link: int, slope: Tensor) -> float:
        """The length up to which the correction of an example is trusted; to be asked once for every message.

        It is not in proportion to the example's own slope: most of those that are classified well have next to none.

        Args:
            link: from 0 at the bottom.
            slope: the feedback, of each example's own summed loss, shape [N, ...].
        """
        if self._idle or self.trust == math.inf:
            return math.inf
        return self.trust * math.sqrt(self._squares.add(link, float(norms(slope).square().mean())))

    def state_dict(self) -> dict[str, Any]:
        """What is known of the curvature, and of the feedback's length."""
        return {
            "curvature": self.curvature.state_dict(),
            "across": self.across.state_dict(),
            "squares": self._squares.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self.curvature.load_state_dict(state["curvature"])
        self.across.load_state_dict(state["across"])
        if "squares" in state:  # not in older checkpoints
            self._squares.load_state_dict(state["squares"])
