"""One block with all it needs to train itself: the local form of Algorithm 1.

In the problem for h_k (Eq. 5), the output of the block below is a constant, the *anchor*, which arrived from
below; h*_{k+1} is the *target*, which arrived from above. A stage needs its block and these two, and nothing
else. One stage serves every executor, whether its neighbours are objects, threads or other hosts.

        anchor h_k                          output b_k(h_k)
    ───────────────▶  ┌───────────────┐  ───────────────▶
                      │    stage k    │
    ◀───────────────  └───────────────┘  ◀───────────────
        h*_k (Gluing)                       h*_{k+1} (Gluing), or the labels if k = K
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from blockprop.errors import IN_PLACE, block_failed
from blockprop.evaluation import Evaluation
from blockprop.forms import Form
from blockprop.gluing import Gluing
from blockprop.hsolvers import HSolver, Solution
from blockprop.losses import OutputLoss
from blockprop.objective import GluingProblem, LossTerm, PenaltyTerm, UpperTerm
from blockprop.penalties import Custom, Penalty
from blockprop.wstep import WStep

__all__ = ["Feedback", "Link", "Stage"]


@dataclass(frozen=True)
class Link:
    """What stands between two blocks: the penalty l_k, and the solver of the h-step for its gluing variable."""

    penalty: Penalty
    solver: HSolver


@dataclass(frozen=True)
class Feedback:
    """What an h-step gives.

    Attributes:
        solution: h*_k and how the h-step went.
        term: the term above the block at the forward pass, mean over predictions: a scalar.
    """

    solution: Solution
    term: Tensor

    @property
    def gluing(self) -> Gluing:
        """h*_k, to be sent to the block below."""
        return self.solution.gluing


class Stage:
    """Block k, its W-step, and the links to its neighbours.

    Args:
        index: k, from 1.
        block: b_k.
        wstep: its optimizer.
        form: where the W-gradient is taken.
        scale: by what the W-gradient is divided (form "rescaled"; 1 otherwise).
        below: the link to block k-1; None for the first block.
        above: the link to block k+1, or the output loss for the last block.
        repeatable: whether evaluations must be repeatable (see [`Evaluation`][blockprop.evaluation.Evaluation]).
        precision: dtype for autocast, or None.
    """

    def __init__(
        self,
        index: int,
        block: nn.Module,
        wstep: WStep,
        form: Form,
        *,
        scale: float,
        below: Link | None,
        above: Link | OutputLoss,
        repeatable: bool,
        precision: torch.dtype | None = None,
    ) -> None:
        self.index = index
        self.block = block
        self.wstep = wstep
        self.form = form
        self.scale = scale
        self.below = below
        self.above = above
        self.repeatable = repeatable
        self.precision = precision
        self._checked = False
        parameter = next(block.parameters(), None)
        self.device = torch.device("cpu") if parameter is None else parameter.device

    def forward(
        self,
        inputs: Tensor,
        *,
        keep_graph: bool = True,
        repeatable: bool = False,
        weights: dict[str, Tensor] | None = None,
    ) -> Evaluation:
        """Evaluate the block on a batch (Algorithm 1, line 3).

        Args:
            inputs: h_k, the output of the block below, shape [N, ...].
            keep_graph: False to keep no activations; the graph is then rebuilt when it is needed.
            repeatable: True to make the evaluation repeatable although training does not need it.
            weights: see [`Evaluation`][blockprop.evaluation.Evaluation]; the gradient is then taken at these too.

        Raises:
            ValueError: the block does not take an input of this shape or type, or writes into it.
        """
        inputs = inputs.to(self.device, non_blocking=True)
        version = None if inputs.is_inference() else inputs._version
        try:
            evaluation = Evaluation(
                self.block,
                inputs,
                differentiable=self.below is not None,
                keep_graph=keep_graph,
                repeatable=self.repeatable or repeatable,
                precision=self.precision,
                weights=weights,
            )
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, IndexError) as error:
            raise block_failed(self.index, self.block, inputs, error) from error
        if version is not None and inputs._version != version:
            raise ValueError(f"block {self.index} {IN_PLACE}")
        if not isinstance(evaluation.output, Tensor):
            raise ValueError(
                f"block {self.index} gives a {type(evaluation.output).__name__}; expected one tensor: wrap a module "
                "that returns several, such as an LSTM"
            )
        if isinstance(self.above, Link) and not evaluation.output.is_floating_point():
            raise ValueError(
                f"block {self.index} gives {evaluation.output.dtype}; expected a floating-point output, since a "
                "gluing variable is moved by gradients"
            )
        if not self._checked and isinstance(self.above, Link) and isinstance(self.above.penalty, Custom):
            self.above.penalty.check(evaluation.output)
        self._checked = True
        return evaluation

    def term(self, target: Gluing | Tensor | UpperTerm) -> UpperTerm:
        """The term above the block: the penalty to h*_{k+1}, or the output loss to the labels, or as given."""
        if not isinstance(target, Gluing | Tensor):
            return target
        if isinstance(self.above, Link):
            assert isinstance(target, Gluing)
            return PenaltyTerm(self.above.penalty, target.to(self.device))
        assert isinstance(target, Tensor)
        return LossTerm(self.above, target.to(self.device))

    def h_step(self, evaluation: Evaluation, target: Gluing | Tensor | UpperTerm, *, with_gradient: bool) -> Feedback:
        """Improve this block's gluing variable h_k: solve Eq. (5) (Algorithm 1, lines 4-6).

        Args:
            evaluation: this block on this batch.
            target: h*_{k+1}, or the labels for the last block.
            with_gradient: take the gradient of J_k from the same backward pass, where the form allows it; the
                graph is then used up.

        Returns:
            h*_k for the block below.
        """
        assert self.below is not None, "the first block's input is the data"
        joint = with_gradient and self.form.at_forward
        term = self.term(target)
        root = term.root(evaluation.with_graph().output)
        weights = (list(evaluation.weights.values()) or self.wstep.parameters) if joint else []
        slope, *gradients = root.gradients([evaluation.input, *weights], keep_graph=not joint)
        if joint:
            if slope is not None and any(g is not None and g.data_ptr() == slope.data_ptr() for g in gradients):
                slope = slope.clone()  # of a weight that is added to the input: its sum may be added to in place
            self.wstep.add(gradients, self.scale)
        problem = GluingProblem(evaluation, term, self.below.penalty)
        problem.know_anchor(root, slope)
        solution = self.below.solver.solve(problem)
        return Feedback(solution, root.mean)

    def add_gradient(
        self,
        evaluation: Evaluation,
        target: Gluing | Tensor | UpperTerm,
        feedback: Feedback | None = None,
    ) -> Tensor:
        """The gradient of J_k (Eqs. 6, 7) on its own, onto the parameters' `.grad` (Algorithm 1, line 8).

        Args:
            evaluation: this block on this batch; its graph is used up where the gradient is taken on it.
            target: h*_{k+1}, or the labels for the last block.
            feedback: this block's own h-step, where the form takes the gradient at h*_k.

        Returns:
            J_k, the mean over predictions at the point where the gradient was taken: a scalar.
        """
        at_forward = self.form.at_forward or feedback is None
        if at_forward:
            # without parameters there is no graph to rebuild, and nothing to take a gradient of
            output = evaluation.with_graph().output if self.wstep.parameters else evaluation.output
        else:
            assert feedback is not None
            with torch.enable_grad():
                output = evaluation(feedback.gluing.value)
        root = self.term(target).root(output)
        if self.wstep.parameters:
            weights = list(evaluation.weights.values()) or self.wstep.parameters
            self.wstep.add(root.gradients(weights), self.scale)
        return root.mean

    def train(self, evaluation: Evaluation, target: Gluing | Tensor | UpperTerm) -> tuple[Tensor, Feedback | None]:
        """The h-step and the gradient of J_k, in as few passes as the form allows.

        Args:
            evaluation: this block on this batch; its graph is used up.
            target: h*_{k+1}, or the labels for the last block; or any term to put above the block.

        Returns:
            The term above the block, mean over predictions; and the feedback for the block below (None for
            the first block).
        """
        if self.below is None:
            return self.add_gradient(evaluation, target), None
        feedback = self.h_step(evaluation, target, with_gradient=True)
        if not self.form.at_forward:
            self.add_gradient(evaluation, target, feedback)
        return feedback.term, feedback

    def update(self, *, again: bool = False) -> None:
        """The optimizer's step on the gradient taken before; `again` as in `WStep.update`."""
        self.wstep.update(again=again)
