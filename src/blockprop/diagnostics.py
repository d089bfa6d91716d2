"""What is going on inside: alignment with backprop's gradient, and the h-step's curvature against its limit.

The gluing loss, the h-step's residual and its stability come with every step's report. What is here costs a
few passes over a batch; ask for it every n steps.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from blockprop.algorithm import BlockProp
from blockprop.backprop import backprop_gradient
from blockprop.gluing import Gluing
from blockprop.hsolvers import Backtracking, GradientDescent
from blockprop.learner import check_batch
from blockprop.objective import CurvatureProduct, GluingProblem
from blockprop.stage import Link
from blockprop.wstep import WStep

__all__ = ["Alignment", "alignment", "curvature"]


@dataclass(frozen=True)
class Alignment:
    """A block's gradient beside backprop's, on the same batch with the same dropout masks.

    Attributes:
        cosine: of the angle between the two; 1 where they point the same way.
        norm_ratio: ‖BlockProp's‖ / ‖backprop's‖; (2λγ_h)^(K-k) to first order in the published form.
    """

    cosine: float
    norm_ratio: float


@contextmanager
def _untouched(algo: BlockProp) -> Iterator[None]:
    """Leave random state, buffers and accumulated gradients as they were."""
    devices = {parameter.device for parameter in algo.blocks.model.parameters() if parameter.is_cuda}
    buffers = [(buffer, buffer.clone()) for buffer in algo.blocks.model.buffers()]
    gradients = [wstep.hold() for wstep in algo.wsteps]
    with torch.random.fork_rng(devices=list(devices)):
        for wstep in algo.wsteps:
            wstep.forget()
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
            for wstep, saved in zip(algo.wsteps, gradients, strict=True):
                for parameter, gradient in zip(wstep.parameters, saved, strict=True):
                    parameter.grad = gradient


def _taken(wsteps: Sequence[WStep]) -> list[Tensor]:
    """The gradient of every block as it lies on `.grad`, flat, in float64."""
    return [
        torch.cat([torch.zeros(0)] + [_gradient(p).double().flatten().cpu() for p in wstep.parameters])
        for wstep in wsteps
    ]


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def alignment(algo: BlockProp, inputs: Tensor, targets: Tensor, ids: Tensor | None = None) -> list[Alignment]:
    """Cosine and norm ratio of every block's gradient to backprop's, on a batch; bottom block first.

    Weights, buffers, gradients and random state are left as they were. Costs one step of each algorithm.

    Args:
        algo: the algorithm as it trains.
        inputs: a batch, shape [N, ...].
        targets: its targets, N rows.
        ids: the examples' numbers, int64 [N]; needed with a cache, which stays as it is.

    Raises:
        ValueError: as in `BlockProp.step`.
    """
    with _untouched(algo):
        algo.gradient(inputs, targets, ids)
        ours = _taken(algo.wsteps)
    with _untouched(algo):
        backprop_gradient(algo.blocks, algo.wsteps, algo.loss, inputs, targets, precision=algo.precision)
        theirs = _taken(algo.wsteps)
    found = []
    for mine, exact in zip(ours, theirs, strict=True):
        norms = float(mine.norm()), float(exact.norm())
        cosine = float(mine @ exact) / (norms[0] * norms[1]) if min(norms) > 0 else float("nan")
        found.append(Alignment(cosine, norms[0] / norms[1] if norms[1] > 0 else float("nan")))
    return found


def curvature(algo: BlockProp, inputs: Tensor, targets: Tensor, iterations: int = 10) -> list[float]:
    """γ_h times the largest curvature of L_k at the anchor, per link, bottom first: gradient steps need it below 2.

    The largest eigenvalue is found by power iteration on the Gauss-Newton matrix (Eq. 5's Hessian with the block
    linearised; 2λ(I + AᵀA) inside the chain), per example; the largest of the batch counts.

    Args:
        algo: the algorithm as it trains; for solvers without a step size, one over the penalty's curvature
            stands in for γ_h.
        inputs: a batch, shape [N, ...].
        targets: its targets, N rows.
        iterations: of the power method, default 10, each about two backward passes. The result approaches the
            true value from below.

    Raises:
        ValueError: as in `BlockProp.step`.
    """
    check_batch(inputs, targets)
    products: list[float] = []
    with _untouched(algo), torch.enable_grad():
        evaluations, h = [], inputs
        for stage in algo.stages:
            evaluations.append(stage.forward(h, repeatable=True))
            h = evaluations[-1].output
        target: Tensor | Gluing = targets
        for stage, evaluation in zip(algo.stages[:0:-1], evaluations[:0:-1], strict=True):
            assert stage.below is not None
            problem = GluingProblem(evaluation, stage.term(target), stage.below.penalty)
            largest = _largest(problem.curvature_product(), problem.zero(), iterations)
            products.append(_step_size(stage.below) * largest)
            target = stage.h_step(evaluation, target, with_gradient=False).gluing
    return products[::-1]


def _step_size(link: Link) -> float:
    if isinstance(link.solver, GradientDescent | Backtracking) and link.solver.lr is not None:
        return link.solver.lr
    return 1 / link.penalty.curvature if link.penalty.curvature else float("nan")


def _largest(matrix: CurvatureProduct, zero: Tensor, iterations: int) -> float:
    """The largest eigenvalue of any example's part of the matrix."""
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(zero.shape, generator=generator).to(zero)
    axes = tuple(range(1, vector.ndim))
    norms = torch.zeros(())
    for _ in range(iterations):
        vector = vector / torch.linalg.vector_norm(vector, dim=axes, keepdim=True).clamp_min(1e-30)
        vector = matrix(vector)
        norms = torch.linalg.vector_norm(vector, dim=axes)
    return float(norms.max())
