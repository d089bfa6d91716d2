"""The augmented loss (Eq. 4) and what a block sees of it: L_k (Eq. 5) for its input, J_k (Eqs. 6, 7) for its weights.

Both are made of the same *upper term*: the penalty of the link above the block, or the output loss if the
block is the last. L_k adds the penalty that holds h_k to its anchor. Indices: n example, N batch size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from blockprop.evaluation import Evaluation
from blockprop.gluing import Gluing
from blockprop.losses import OutputLoss
from blockprop.penalties import Huber, Penalty, Squared
from blockprop.ways import norms, projected

__all__ = [
    "CurvatureProduct",
    "GluingProblem",
    "LossTerm",
    "PenaltyTerm",
    "Root",
    "TargetTerm",
    "UpperTerm",
    "projected",
]


@dataclass(frozen=True)
class Root:
    """Where backpropagation through a block begins.

    Attributes:
        tensor: what to differentiate: the term's mean, or the block's output with its gradient in `slope`.
        slope: the mean's gradient in `tensor`; None where that is 1.
        mean: the term, mean over predictions, without a graph: a scalar.
        count: the number of predictions.
    """

    tensor: Tensor
    slope: Tensor | None
    mean: Tensor
    count: float

    def gradients(self, inputs: Sequence[Tensor], *, keep_graph: bool = False) -> tuple[Tensor | None, ...]:
        """The mean's gradients in the inputs; None for those it does not depend on."""
        return torch.autograd.grad(self.tensor, inputs, self.slope, retain_graph=keep_graph, allow_unused=True)


class UpperTerm(Protocol):
    """What stands above a block: a function of its output, as a mean over predictions and their count."""

    def mean(self, output: Tensor) -> tuple[Tensor, float]:
        """The term's mean over predictions (a differentiable scalar) and their count; the sum is the product."""
        ...

    def root(self, output: Tensor) -> Root:
        """Where the backward pass through the block with this output begins."""
        ...


@dataclass(frozen=True)
class PenaltyTerm:
    """Σ_n λ_k ‖h*_{k+1} - b_k(h_k)‖² over the batch, for any penalty."""

    penalty: Penalty
    target: Gluing

    def mean(self, output: Tensor) -> tuple[Tensor, float]:
        """The penalties' sum divided by the number of predictions, and that number."""
        return self.penalty(self.target, output).sum() / self.target.count, self.target.count

    def root(self, output: Tensor) -> Root:
        """The output itself, with the penalty's gradient: in closed form for the squared penalty."""
        count = self.target.count
        if isinstance(self.penalty, Squared):
            mean, slope = self.penalty.mean_and_slope(self.target, output)
            return Root(output, slope.to(output.dtype), mean, count)
        leaf = output.detach().requires_grad_()
        mean, _ = self.mean(leaf)
        (slope,) = torch.autograd.grad(mean, leaf)
        return Root(output, slope, mean.detach(), count)


@dataclass(frozen=True)
class TargetTerm:
    """The term above a block whose feedback is late: ⟨g, d⟩ + κ/2 ‖d‖², with d the way its output has moved since.

    It is the squared penalty λ‖h* - b(h)‖² with λ = κ/2 and the target h* = b_old(h) - g/κ that one gradient step of
    size 1/κ makes, up to a constant, and written so that κ = 0 has a meaning: the target is at infinity, and
    what is left is the delayed gradient. If κ is the curvature of what lies above along d, its slope
    g + κ d is the gradient that a new evaluation of what lies above would give at b(h), to first order.

    To first order is near b_old(h) only. So an example's κ d is trusted up to a length: where it would be longer, it is
    that long, and the squared penalty becomes Huber's.

    Attributes:
        old: b_old(h), the block's output when it was sent up, shape [N, ...].
        slope: g, the gradient in it of the mean loss, shape [N, ...].
        count: the number of predictions.
        curvature: κ ≥ 0, of the sum over predictions, as λ is: one, or one per example, shape [N, 1, ...].
        along: let κ act on the part of d along each example's own g alone, default False. The loss above is curved
            along its own slope far more than in other directions, and the target is then a plane: reached ‖g‖/κ down
            the slope, wherever else the output has gone.
        across: the curvature in all directions across the slope, if `along`; default 0. One or several, as κ.
        longest: what an example's ‖κ d‖ may be, along and across each for itself, with κ d of the sum over predictions;
            default infinity.
    """

    old: Tensor
    slope: Tensor
    count: float
    curvature: float | Tensor
    along: bool = False
    across: float | Tensor = 0.0
    longest: float = math.inf

    def _ways(self, moved: Tensor) -> list[tuple[Tensor, float | Tensor]]:
        """Every part of the way d, with its κ; those that have one."""
        ways = [(moved, self.curvature)]
        if self.along:
            part = projected(moved, self.slope)
            ways = [(part, self.curvature), (moved - part, self.across)]
        return [(way, kappa) for way, kappa in ways if isinstance(kappa, Tensor) or kappa]

    def _corrected(self, moved: Tensor) -> tuple[Tensor, Tensor]:
        """The slope, g + κ d, and the term."""
        slope = self.slope.to(moved.dtype)
        mean = torch.dot(slope.flatten(), moved.flatten())
        for way, kappa in self._ways(moved):
            length, scale = norms(way), kappa / self.count
            pull = kappa * length
            cut = pull > self.longest
            trusted = torch.where(cut, self.longest / pull.where(cut, 1), 1)
            slope = torch.addcmul(slope, way, scale * trusted)
            mean = mean + torch.sum(scale * trusted * (1 - trusted / 2) * length**2)
        return slope, mean

    def limited(self, output: Tensor) -> float:
        """The share of examples whose κ d is longer than `longest`, in one of its parts at least."""
        if self.longest == math.inf or output.data_ptr() == self.old.data_ptr():  # the very same: it has not moved
            return 0.0
        cut = [kappa * norms(way) > self.longest for way, kappa in self._ways(output.detach() - self.old)]
        return float(torch.stack(cut).any(0).float().mean()) if cut else 0.0

    def mean(self, output: Tensor) -> tuple[Tensor, float]:
        """The term divided by the number of predictions, and that number."""
        return self._corrected(output - self.old)[1], self.count

    def root(self, output: Tensor) -> Root:
        """The output itself, with the term's gradient in closed form."""
        slope, mean = self._corrected(output.detach() - self.old)
        return Root(output, slope.to(output.dtype), mean, self.count)


@dataclass(frozen=True)
class LossTerm:
    """ℓ(y, b_K(h_K)).

    Attributes:
        loss: ℓ.
        targets: y, N rows.
        total: predictions of the whole batch, where this is a microbatch: the mean is over them, and so are all slopes
            and gradients below. Default: as many as the targets are for.
    """

    loss: OutputLoss
    targets: Tensor
    total: float | None = None

    def mean(self, output: Tensor) -> tuple[Tensor, float]:
        """The mean output loss and the number of predictions that it is over."""
        output = output.float() if output.dtype == torch.bfloat16 else output
        if self.total is None:
            return self.loss(output, self.targets)
        if self.loss.counted(self.targets) == 0:  # all of them ignored, in a batch with others
            return output.sum() * 0, self.total
        mean, count = self.loss(output, self.targets)
        return mean * (count / self.total), self.total

    def root(self, output: Tensor) -> Root:
        """The mean loss."""
        mean, count = self.mean(output)
        return Root(mean, None, mean.detach(), count)


class GluingProblem:
    """L_k (Eq. 5) as a function of the displacement d = h_k - anchor; the sum over the batch's predictions.

        L_k(d) = [term above block k at b_k(anchor + d)] + l_{k-1}(anchor + d, anchor)

    Block k's evaluation supplies b_k as one fixed function; the anchor is its input. At d = 0 the graph of
    the forward pass is used, so the first gradient costs a backward pass and no forward.

    Args:
        evaluation: block k on this batch.
        upper: the term above block k.
        penalty: l_{k-1}, the penalty of the link below.
    """

    def __init__(
        self,
        evaluation: Evaluation,
        upper: UpperTerm,
        penalty: Penalty,
    ) -> None:
        self.evaluation = evaluation
        self.upper = upper
        self.penalty = penalty
        self.anchor = evaluation.input.detach()
        self._at_anchor: tuple[Root, Tensor] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The displacement's dtype: the anchor's, float32 at least."""
        return torch.promote_types(self.anchor.dtype, torch.float32)

    def zero(self) -> Tensor:
        """The displacement of the anchor itself: zeros of shape [N, ...]."""
        return torch.zeros_like(self.anchor, dtype=self.dtype)

    def gluing(self, direction: Tensor, scale: float = 1.0) -> Gluing:
        """h_k at the displacement `scale` times `direction`, of shape [N, ...]."""
        return Gluing(self.anchor, direction, self.slope_at_anchor()[0].count, scale)

    def know_anchor(self, root: Root, slope: Tensor | None) -> None:
        """Take L_k and its gradient at d = 0 from a backward pass that was done for the weights as well.

        Args:
            root: where that pass began.
            slope: the mean's gradient in h_k, shape [N, ...]; None where it does not depend on h_k.
        """
        self._at_anchor = (root, self.zero() if slope is None else slope.to(self.dtype))

    def slope_at_anchor(self) -> tuple[Root, Tensor]:
        """The upper term at d = 0, and its mean's gradient, shape [N, ...].

        The gradient of L_k there is `count` times that: the h-step works on the sum over predictions, and the
        penalty has its minimum at the anchor and contributes nothing.
        """
        if self._at_anchor is None:
            root = self.upper.root(self.evaluation.output)
            self.know_anchor(root, root.gradients([self.evaluation.input], keep_graph=True)[0])
        assert self._at_anchor is not None
        return self._at_anchor

    def gradient_at_anchor(self) -> tuple[Tensor, Tensor]:
        """L_k and its gradient at d = 0."""
        root, slope = self.slope_at_anchor()
        return root.mean * root.count, slope * root.count

    def gradient(self, displacement: Tensor) -> tuple[Tensor, Tensor]:
        """L_k (a scalar) and its gradient, shape [N, ...], at a displacement of shape [N, ...]."""
        leaf = displacement.detach().requires_grad_()
        with torch.enable_grad():
            value = self._value(leaf)
        (gradient,) = torch.autograd.grad(value, leaf)
        return value.detach(), gradient

    @torch.no_grad()
    def value(self, displacement: Tensor) -> Tensor:
        """L_k at a displacement of shape [N, ...]: a scalar."""
        return self._value(displacement)

    def _value(self, displacement: Tensor) -> Tensor:
        output = self.evaluation(self.anchor + displacement)
        mean, count = self.upper.mean(output)
        held = self.penalty(Gluing(self.anchor, displacement, count), self.anchor).sum()
        return mean * count + held

    def curvature_product(self, displacement: Tensor | None = None) -> "CurvatureProduct":
        """The Gauss-Newton matrix of L_k at a displacement (the anchor by default), as a product with vectors."""
        return CurvatureProduct(self, displacement)


class CurvatureProduct:
    """v -> (Aᵀ H A + P) v: A the block's Jacobian, H the upper term's Hessian in the output, P the penalty's.

    Matrix-free, by reverse mode twice, so that it works on any module autograd can differentiate twice.
    Where H is positive semi-definite (squared and Huber penalties, cross-entropy, squared error), so is the
    whole, and conjugate gradients apply. Inside the chain, with squared penalties, it is 2λ(I + AᵀA).
    """

    def __init__(self, problem: GluingProblem, displacement: Tensor | None) -> None:
        start = problem.zero() if displacement is None else displacement.detach()
        # the fused attention kernels cannot be differentiated twice
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            self._input = (problem.anchor + start).to(problem.anchor.dtype).requires_grad_()
            self._output = problem.evaluation(self._input)
            self._cotangent = torch.zeros_like(self._output, requires_grad=True)
            # Aᵀu is linear in u: its derivative in u, applied to v, is A v
            (self._pulled,) = torch.autograd.grad(self._output, self._input, self._cotangent, create_graph=True)
            self._leaf = self._output.detach().requires_grad_()
            mean, count = problem.upper.mean(self._leaf)
            (slope,) = torch.autograd.grad(mean * count, self._leaf, create_graph=True)
            self._slope = slope
            self._majoriser = problem.penalty.majoriser(start) if isinstance(problem.penalty, Huber) else None
            self._displacement = start.clone().requires_grad_()
            held = problem.penalty(Gluing(problem.anchor, self._displacement, count), problem.anchor).sum()
            (self._held_slope,) = torch.autograd.grad(held, self._displacement, create_graph=True)

    def __call__(self, vector: Tensor) -> Tensor:
        """(Aᵀ H A + P) v for v of shape [N, ...]; same shape."""
        (pushed,) = torch.autograd.grad(self._pulled, self._cotangent, vector.to(self._pulled.dtype), retain_graph=True)
        curved = _derivative(self._slope, self._leaf, pushed)
        (pulled,) = torch.autograd.grad(self._output, self._input, curved, retain_graph=True)
        if self._majoriser is not None:
            return pulled.to(vector.dtype) + self._majoriser * vector
        return pulled.to(vector.dtype) + _derivative(self._held_slope, self._displacement, vector)


def _derivative(slope: Tensor, leaf: Tensor, vector: Tensor) -> Tensor:
    """The Hessian-vector product of a function with gradient `slope` at `leaf`; zero where it is linear."""
    if not slope.requires_grad:
        return torch.zeros_like(leaf)
    (product,) = torch.autograd.grad(slope, leaf, vector, retain_graph=True, allow_unused=True)
    return torch.zeros_like(leaf) if product is None else product
