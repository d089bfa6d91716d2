"""Solvers of the h-step: each lowers L_k (Eq. 5) over one gluing variable, starting from its anchor.

A solver returns a [`Solution`][blockprop.hsolvers.Solution], never a bare tensor, so that a step that went
wrong is seen. All work on the displacement d = h_k - anchor, shape [N, ...], of the whole batch at once.

Gradient steps are stable while γ_h times the largest curvature of L_k is below 2. The curvature grows as the
block above learns, so a fixed γ_h may become unstable in the middle of a run.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from blockprop.gluing import Gluing
from blockprop.objective import GluingProblem
from blockprop.penalties import Penalty

__all__ = ["Backtracking", "GaussNewton", "GradientDescent", "HSolver", "Solution", "conjugate_gradients"]


@dataclass(frozen=True)
class Solution:
    """What an h-step came to.

    Attributes:
        gluing: h*, always finite.
        steps: steps taken.
        residual: what is left to solve, relative to the start and at the last point that the solver looked
            at: ‖∇L_k‖ / ‖∇L_k(anchor)‖ for the gradient methods, the linear system's residual for
            Gauss-Newton. 1 after a single gradient step, which looks at nothing but the anchor.
        converged: whether `residual` came down to the solver's tolerance.
        stable: False if L_k rose or stopped being finite between two points that the solver looked at.
    """

    gluing: Gluing
    steps: int
    residual: float
    converged: bool
    stable: bool

    @property
    def displacement(self) -> Tensor:
        """h* - anchor, shape [N, ...]."""
        return self.gluing.displacement


class HSolver(Protocol):
    """Anything that can take an h-step."""

    @property
    def evaluates(self) -> bool:
        """Whether it evaluates the block again, beyond the forward pass's own graph."""
        ...

    def on(self, penalty: Penalty) -> "HSolver":
        """This solver for a link with that penalty: settings left to the default are filled in."""
        ...

    def solve(self, problem: GluingProblem) -> Solution:
        """Lower L_k from the anchor."""
        ...


def _check_positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ValueError(f"{name} is {value}; expected a positive finite number")


def _check_steps(steps: int) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"h-steps is {steps}; expected a whole number of at least 1")


def _check_tolerance(value: float) -> None:
    if not 0 <= value < float("inf"):
        raise ValueError(f"tolerance is {value}; expected a finite number of at least 0")


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value}; expected a whole number of at least 1")


def _step_size(lr: float | None, penalty: Penalty) -> float:
    if lr is not None:
        return lr
    if penalty.curvature is None:
        raise ValueError("this penalty has no known curvature to set γ_h by; give the h-solver a step size lr")
    return 1 / penalty.curvature


def _norm(gradient: Tensor) -> float:
    return float(torch.linalg.vector_norm(gradient))


@dataclass(frozen=True)
class GradientDescent:
    """N_h steps of size γ_h down the gradient of L_k (Algorithm 1, line 5), with heavy-ball momentum on request.

    Args:
        steps: N_h ≥ 1, default 1.
        lr: γ_h. Default: one over the penalty's curvature, which is 2λγ_h = 1 for the squared penalty.
        momentum: in [0, 1), default 0.
        tolerance: relative gradient norm at which further steps are spared, default 0: all are taken.

    Raises:
        ValueError: a setting out of its range.
    """

    steps: int = 1
    lr: float | None = None
    momentum: float = 0.0
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        _check_steps(self.steps)
        if self.lr is not None:
            _check_positive("h-lr (γ_h)", self.lr)
        if not 0 <= self.momentum < 1:
            raise ValueError(f"h-momentum is {self.momentum}; expected a number in [0, 1)")
        _check_tolerance(self.tolerance)

    @property
    def evaluates(self) -> bool:
        """True for two steps or more: the first uses the forward pass."""
        return self.steps > 1

    def on(self, penalty: Penalty) -> "GradientDescent":
        """With γ_h filled in for that penalty."""
        return replace(self, lr=_step_size(self.lr, penalty))

    def scale(self, penalty: Penalty) -> float:
        """Share of the way to the minimiser of the penalty alone that the steps go, to first order.

        1 - (1 - 2λγ_h)^N_h without momentum: the factor by which an h-step shrinks the feedback that it
        passes down.
        """
        assert self.lr is not None and penalty.curvature is not None
        distance, velocity = 1.0, 0.0
        for _ in range(self.steps):
            velocity = self.momentum * velocity - self.lr * penalty.curvature * distance
            distance += velocity
        return 1 - distance

    def solve(self, problem: GluingProblem) -> Solution:
        """Take the steps; a step that leaves the finite numbers is undone and ends the solve."""
        assert self.lr is not None, "call on(penalty) first"
        if self.steps == 1:
            # nothing to compare with: the gradient's norm is not worth computing
            root, slope = problem.slope_at_anchor()
            moved = problem.gluing(slope, -self.lr * root.count)
            if not math.isfinite(moved.squared_sum):
                return Solution(problem.gluing(problem.zero()), 0, float("inf"), False, False)
            return Solution(moved, 1, 1.0, False, True)
        value, gradient = problem.gradient_at_anchor()
        displacement, velocity = problem.zero(), problem.zero()
        first_value, norm = float(value), _norm(gradient)
        first_norm, last_value, last_norm = norm, first_value, norm
        stable, taken, best = True, 0, displacement
        for taken in range(1, self.steps + 1):
            velocity = self.momentum * velocity - self.lr * gradient
            displacement = displacement + velocity
            if taken == self.steps:
                break
            value, gradient = problem.gradient(displacement)
            last_norm = _norm(gradient)
            rose = float(value) > (first_value if self.momentum else last_value) + _slack(first_value)
            if not torch.isfinite(value) or not last_norm < float("inf"):
                return Solution(problem.gluing(best), taken - 1, float("inf"), False, False)
            stable = stable and not rose
            last_value, best = float(value), displacement
            if last_norm <= self.tolerance * first_norm:
                break
        if not torch.isfinite(displacement).all():
            return Solution(problem.gluing(best), taken - 1, float("inf"), False, False)
        residual = last_norm / first_norm if first_norm > 0 else 0.0
        return Solution(problem.gluing(displacement), taken, residual, residual <= self.tolerance, stable)


def _slack(value: float) -> float:
    """A rise of L_k within float32's rounding is not a rise."""
    return 1e-6 * abs(value)


@dataclass(frozen=True)
class Backtracking:
    """Gradient descent that halves γ_h until L_k falls enough (Armijo), so that it cannot become unstable.

    The step size is one for the batch, which makes a mini-batch's update differ from the mean of
    single-example updates.

    Args:
        steps: N_h ≥ 1, default 1.
        lr: the γ_h tried first at every step. Default: as in `GradientDescent`.
        decrease: share of the decrease predicted by the gradient that is asked for, in (0, 1), default 0.1.
        tolerance: relative gradient norm at which further steps are spared, default 0.
        halvings: how often γ_h is halved before the step is given up, default 20.

    Raises:
        ValueError: a setting out of its range.
    """

    steps: int = 1
    lr: float | None = None
    decrease: float = 0.1
    tolerance: float = 0.0
    halvings: int = 20

    def __post_init__(self) -> None:
        _check_steps(self.steps)
        if self.lr is not None:
            _check_positive("h-lr (γ_h)", self.lr)
        if not 0 < self.decrease < 1:
            raise ValueError(f"decrease is {self.decrease}; expected a number in (0, 1)")
        _check_count("halvings", self.halvings)
        _check_tolerance(self.tolerance)

    @property
    def evaluates(self) -> bool:
        """Always: every trial is an evaluation."""
        return True

    def on(self, penalty: Penalty) -> "Backtracking":
        """With γ_h filled in for that penalty."""
        return replace(self, lr=_step_size(self.lr, penalty))

    def solve(self, problem: GluingProblem) -> Solution:
        """Take the steps. `stable` is False where no halving made L_k fall, and the anchor's side is kept."""
        assert self.lr is not None, "call on(penalty) first"
        displacement = problem.zero()
        value, gradient = problem.gradient_at_anchor()
        first_norm = norm = _norm(gradient)
        stable, taken = True, 0
        while taken < self.steps and norm > self.tolerance * first_norm:
            if taken:
                _, gradient = problem.gradient(displacement)
                norm = _norm(gradient)
            lr = self.lr
            for _ in range(self.halvings):
                trial = displacement - lr * gradient
                trial_value = problem.value(trial)
                if trial_value <= value - self.decrease * lr * norm**2 + _slack(float(value)):
                    displacement, value = trial, trial_value
                    break
                lr /= 2
            else:
                stable = False
                break
            taken += 1
        residual = norm / first_norm if first_norm > 0 else 0.0
        return Solution(problem.gluing(displacement), taken, residual, residual <= self.tolerance, stable)


@dataclass(frozen=True)
class GaussNewton:
    """Gauss-Newton steps, each solved by conjugate gradients: the "second-order method" of Section 3.

    Minimises the quadratic model of L_k, with the block linearised, to a relative residual, example by example:
    every example has its own step sizes, since its gluing variable is its own problem. Where a block couples the
    examples of a batch (BatchNorm in training), the batch is solved as the one system that it is.

    Args:
        steps: Gauss-Newton steps N_h ≥ 1, default 1; the block is linearised anew for each.
        iterations: conjugate gradient iterations a step, default 5. Each costs about two backward passes.
        tolerance: relative residual of the linear system at which the iterations end, default 1e-3.

    Raises:
        ValueError: a setting out of its range.
    """

    steps: int = 1
    iterations: int = 5
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        _check_steps(self.steps)
        _check_count("conjugate gradient iterations", self.iterations)
        _check_positive("tolerance", self.tolerance)

    @property
    def evaluates(self) -> bool:
        """Always: it linearises the block in a graph of its own."""
        return True

    def on(self, penalty: Penalty) -> "GaussNewton":  # noqa: ARG002
        """Itself: the curvature is measured, there is no step size to fill in."""
        return self

    def solve(self, problem: GluingProblem) -> Solution:
        """Take the steps; a direction of non-positive curvature ends the iterations where they stand."""
        displacement = problem.zero()
        value, gradient = problem.gradient_at_anchor()
        taken, residual, stable, best = 0, 1.0, True, displacement
        for _ in range(self.steps):
            if taken:
                previous = value
                value, gradient = problem.gradient(displacement)
                if not value <= previous + _slack(float(previous)):
                    return Solution(problem.gluing(best), taken - 1, residual, False, False)
                best = displacement
            matrix = problem.curvature_product(displacement)
            move, residual = conjugate_gradients(
                matrix,
                -gradient,
                iterations=self.iterations,
                tolerance=self.tolerance,
                coupled=problem.evaluation.coupled,
            )
            if not torch.isfinite(move).all():
                return Solution(problem.gluing(displacement), taken, float("inf"), False, False)
            displacement = displacement + move
            taken += 1
        return Solution(problem.gluing(displacement), taken, residual, residual <= self.tolerance, stable)


def conjugate_gradients(
    matrix: Callable[[Tensor], Tensor], right: Tensor, *, iterations: int, tolerance: float, coupled: bool = False
) -> tuple[Tensor, float]:
    """Solve matrix x = right for every example; an example whose curvature is not positive stands still.

    Args:
        matrix: a symmetric matrix as a product with vectors of shape [N, ...], block by example unless `coupled`.
        right: the right side, shape [N, ...].
        iterations: the most that are taken.
        tolerance: relative residual at which an example is solved.
        coupled: True to solve the batch as one system.

    Returns:
        x, and the worst relative residual.
    """

    def inner(a: Tensor, b: Tensor) -> Tensor:
        return ((a * b).sum() if coupled else (a * b).flatten(1).sum(1)).view(-1, *[1] * (a.ndim - 1))

    x = torch.zeros_like(right)
    residual, direction = right, right
    square = inner(residual, residual)
    start = square.clamp_min(torch.finfo(square.dtype).tiny)
    for _ in range(iterations):
        image = matrix(direction)
        curvature = inner(direction, image)
        # an example that is solved, or whose model is not convex, stands still
        moving = (curvature > 0) & (square > tolerance**2 * start)
        if not moving.any():
            break
        alpha = torch.where(moving, square / curvature.where(moving, 1), 0)
        x = x + alpha * direction
        residual = residual - alpha * image
        new_square = inner(residual, residual)
        beta = torch.where(moving, new_square / square.where(moving, 1), 0)
        direction = residual + beta * direction
        square = new_square
    return x, float((square / start).max().sqrt())
