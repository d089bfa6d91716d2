"""The h-solvers: what every one of them promises, and what each is."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from blockprop import Backtracking, GaussNewton, GradientDescent, Huber, OutputLoss, Squared
from blockprop.evaluation import Evaluation
from blockprop.gluing import Gluing
from blockprop.objective import GluingProblem, LossTerm, PenaltyTerm, Root
from blockprop.penalties import Custom


def squares(a, b):
    return 0.7 * (a - b).square().flatten(1).sum(1)


SOLVERS = [
    GradientDescent(1, 0.2),
    GradientDescent(4, 0.2),
    GradientDescent(4, 0.1, momentum=0.5),
    Backtracking(1, 0.2),
    Backtracking(3, 5.0),
    GaussNewton(1),
    GaussNewton(3, iterations=20),
]
PENALTIES = [Squared(0.7), Huber(0.7, 0.05), Custom(squares)]
EVERY = [pytest.param(s, p, id=f"{s}-{type(p).__name__}") for s, p in itertools.product(SOLVERS, PENALTIES)]


def make(penalty=None, n=5, block=None, inside=False, dtype=torch.float64, rows=slice(None)):
    """The h-step's problem for a small block, at the top of the chain or inside it."""
    torch.manual_seed(1)
    block = (block or nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))).to(dtype)
    x, y, target = torch.randn(n, 4, dtype=dtype), torch.randint(3, (n,)), 0.3 * torch.randn(n, 3, dtype=dtype)
    evaluation = Evaluation(block, x[rows])
    count = float(len(x[rows]))
    if inside:
        upper = PenaltyTerm(Squared(1.3), Gluing(evaluation.output.detach(), target[rows], count))
    else:
        upper = LossTerm(OutputLoss(nn.CrossEntropyLoss()), y[rows])
    return GluingProblem(evaluation, upper, penalty or Squared(0.7))


def dense(matrix, zero):
    """The matrix of a product, column by column."""
    columns = [matrix(e.view_as(zero)).flatten() for e in torch.eye(zero.numel(), dtype=zero.dtype)]
    return torch.stack(columns, 1)


@pytest.mark.parametrize(("solver", "penalty"), EVERY)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("inside", [False, True])
def test_every_solver_on_every_penalty_keeps_the_contract(solver, penalty, dtype, inside):
    problem = make(penalty, inside=inside, dtype=dtype)
    block = problem.evaluation.block
    weights = [p.clone() for p in block.parameters()]
    for p in block.parameters():
        p.grad = torch.ones_like(p)
    solution = solver.solve(problem)
    assert solution.displacement.shape == problem.anchor.shape
    assert solution.displacement.dtype == dtype
    assert not solution.displacement.requires_grad
    assert solution.displacement.isfinite().all()
    assert problem.value(solution.displacement) < problem.value(problem.zero())
    assert solution.stable
    assert 1 <= solution.steps <= solver.steps
    assert solution.residual >= 0
    assert solution.converged == (solution.residual <= solver.tolerance)
    for p, before in zip(block.parameters(), weights, strict=True):
        assert torch.equal(p, before)
        assert torch.equal(p.grad, torch.ones_like(p))


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_bfloat16_anchors_get_float32_displacements(solver):
    problem = make(dtype=torch.bfloat16)
    assert solver.solve(problem).displacement.dtype == torch.float32


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_gradient_descent_is_the_loop_of_the_paper(steps, momentum):
    problem = make()
    block, targets = problem.evaluation.block, problem.upper.targets
    h, velocity = problem.anchor.clone(), torch.zeros_like(problem.anchor)
    for _ in range(steps):
        h.requires_grad_()
        L = nn.functional.cross_entropy(block(h), targets, reduction="sum") + 0.7 * (h - problem.anchor).square().sum()
        (gradient,) = torch.autograd.grad(L, h)
        velocity = momentum * velocity - 0.2 * gradient
        h = h.detach() + velocity
    solution = GradientDescent(steps, 0.2, momentum).solve(problem)
    torch.testing.assert_close(solution.displacement, h - problem.anchor, rtol=1e-10, atol=1e-14)
    assert solution.steps == steps


def test_the_residual_is_that_of_the_last_point_looked_at():
    problem = make()
    start = problem.gradient(problem.zero())[1].norm()
    before_last = GradientDescent(3, 0.2).solve(problem).displacement
    expected = float(problem.gradient(before_last)[1].norm() / start)
    assert GradientDescent(4, 0.2).solve(problem).residual == pytest.approx(expected, rel=1e-9)
    assert Backtracking(4, 0.2).solve(problem).residual == pytest.approx(expected, rel=1e-9)
    assert GradientDescent(1, 0.2).solve(problem).residual == 1.0


def test_the_tolerance_spares_steps():
    full = GradientDescent(200, 0.3).solve(make())
    early = GradientDescent(200, 0.3, tolerance=1e-3).solve(make())
    assert early.converged
    assert early.residual <= 1e-3
    assert 1 < early.steps < 50
    assert full.steps == 200
    searched = Backtracking(200, 0.3, tolerance=1e-3).solve(make())
    assert searched.converged
    assert searched.steps < 50
    assert not GradientDescent(3, 1e-3, tolerance=1e-3).solve(make()).converged


@pytest.mark.parametrize("steps", [2, 3])
def test_nothing_to_solve_is_solved(steps):
    """At its minimum already: every gradient is zero."""
    problem = make(inside=True)
    problem.upper = PenaltyTerm(Squared(), Gluing(problem.evaluation.output.detach(), torch.zeros(5, 3).double(), 5.0))
    for solver in (GradientDescent(steps, 0.1), Backtracking(steps, 0.1), GaussNewton(steps)):
        solution = solver.solve(problem)
        assert torch.equal(solution.displacement, problem.zero())
        assert solution.converged
        assert solution.stable


def test_gauss_newton_on_a_linear_block_is_the_closed_form():
    problem = make(Squared(0.7), block=nn.Linear(4, 3), inside=True)
    A, r = problem.evaluation.block.weight.detach(), problem.upper.target.displacement
    expected = torch.linalg.solve(0.7 * torch.eye(4, dtype=A.dtype) + 1.3 * A.T @ A, 1.3 * A.T @ r.T).T
    solution = GaussNewton(iterations=20, tolerance=1e-12).solve(problem)
    torch.testing.assert_close(solution.displacement, expected, rtol=1e-9, atol=1e-12)
    assert solution.converged
    assert problem.gradient(solution.displacement)[1].norm() < 1e-9
    slow = GradientDescent(400, 0.2).solve(problem)
    torch.testing.assert_close(slow.displacement, expected, rtol=1e-6, atol=1e-9)


def test_gauss_newton_step_solves_the_linearised_system():
    problem = make()
    matrix = dense(problem.curvature_product(), problem.zero())
    expected = torch.linalg.solve(matrix, -problem.gradient(problem.zero())[1].flatten()).view(5, 4)
    found = GaussNewton(iterations=20, tolerance=1e-12).solve(problem)
    torch.testing.assert_close(found.displacement, expected, rtol=1e-8, atol=1e-11)
    first = GaussNewton(iterations=1, tolerance=1e-12).solve(problem)
    assert not first.converged
    assert found.residual < first.residual < 1


def test_several_gauss_newton_steps_reach_the_minimum():
    problem = make()
    solution = GaussNewton(8, iterations=20, tolerance=1e-9).solve(problem)
    assert problem.gradient(solution.displacement)[1].norm() < 1e-7
    assert solution.stable


@pytest.mark.parametrize("inside", [False, True])
def test_the_curvature_product_is_the_gauss_newton_matrix(inside):
    problem = make(inside=inside, n=2)
    matrix = dense(problem.curvature_product(), problem.zero())
    block, anchor = problem.evaluation.block, problem.anchor
    jacobian = torch.autograd.functional.jacobian(block, anchor).reshape(6, 8)
    output = block(anchor).detach()
    if inside:
        upper = 2 * 1.3 * torch.eye(6, dtype=torch.float64)
    else:
        upper = torch.autograd.functional.hessian(
            lambda o: nn.functional.cross_entropy(o, problem.upper.targets, reduction="sum"), output
        ).reshape(6, 6)
    expected = jacobian.T @ upper @ jacobian + 2 * 0.7 * torch.eye(8, dtype=torch.float64)
    torch.testing.assert_close(matrix, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "solver", [GradientDescent(4, 0.2), GradientDescent(3, 0.1, 0.5), GaussNewton(1, 10, 1e-10)], ids=str
)
@pytest.mark.parametrize("penalty", PENALTIES, ids=lambda p: type(p).__name__)
def test_a_batch_is_its_examples(solver, penalty):
    whole = solver.solve(make(penalty)).displacement
    singles = [solver.solve(make(penalty, rows=slice(i, i + 1))).displacement for i in range(5)]
    torch.testing.assert_close(whole, torch.cat(singles), rtol=1e-7, atol=1e-9)


def test_batchnorm_is_solved_as_one_system():
    block = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))
    problem = make(block=block)
    assert problem.evaluation.coupled
    matrix = dense(problem.curvature_product(), problem.zero())
    assert matrix[:4, 4:].abs().max() > 1e-3  # the examples see each other
    expected = torch.linalg.solve(matrix, -problem.gradient(problem.zero())[1].flatten()).view(5, 4)
    solution = GaussNewton(iterations=60, tolerance=1e-12).solve(problem)
    torch.testing.assert_close(solution.displacement, expected, rtol=1e-7, atol=1e-10)
    block.eval()
    assert not problem.evaluation.coupled


@pytest.mark.parametrize("solver", [GradientDescent(2, 30.0), GradientDescent(5, 30.0), GradientDescent(3, 30.0, 0.5)])
def test_a_step_too_large_is_reported(solver):
    solution = solver.solve(make())
    assert not solution.stable
    assert not solution.converged
    assert solution.displacement.isfinite().all()


@pytest.mark.parametrize("steps", [2, 3, 50, 2000])
@pytest.mark.parametrize("lr", [1e3, 1e30, 1e300])
def test_an_overflow_is_undone(steps, lr):
    solution = GradientDescent(steps, lr).solve(make(inside=True))
    assert not solution.stable
    assert solution.displacement.isfinite().all()
    assert solution.steps < steps or lr == 1e3 or steps < 4


def test_a_single_step_that_overflows_is_undone():
    large = make(inside=True, dtype=torch.float32)
    root = Root(torch.tensor(1.0), None, torch.tensor(1.0), 1.0)
    large.know_anchor(root, torch.full((5, 4), 10.0))
    solution = GradientDescent(1, 3e38).solve(large)
    assert solution.displacement.isfinite().all()
    assert not solution.stable


@settings(max_examples=25, deadline=None, derandomize=True)
@given(lr=st.floats(1e-3, 1e12), steps=st.integers(1, 4), inside=st.booleans())
def test_backtracking_never_raises_the_objective(lr, steps, inside):
    problem = make(inside=inside)
    solution = Backtracking(steps, lr).solve(problem)
    start = float(problem.value(problem.zero()))
    assert float(problem.value(solution.displacement)) <= start * (1 + 1e-5)
    assert solution.displacement.isfinite().all()
    if solution.stable:
        assert float(problem.value(solution.displacement)) < start


def test_backtracking_that_finds_no_step_stays():
    solution = Backtracking(3, 1e30).solve(make())
    assert not solution.stable
    assert solution.steps == 0
    assert torch.equal(solution.displacement, torch.zeros(5, 4, dtype=torch.float64))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(product=st.floats(0.01, 1.9), steps=st.integers(1, 6), lam=st.floats(0.01, 100))
def test_scale_is_one_minus_the_power(product, steps, lam):
    found = GradientDescent(steps, product / (2 * lam)).scale(Squared(lam))
    assert found == pytest.approx(1 - (1 - product) ** steps, rel=1e-9, abs=1e-12)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(product=st.floats(0.01, 0.9), steps=st.integers(1, 5), momentum=st.floats(0, 0.95))
def test_scale_with_momentum_is_the_share_of_the_way_on_a_quadratic(product, steps, momentum):
    """A block of zero slope: L_k is the penalty around a shifted minimum, and the share can be read off."""
    penalty = Squared(2.0)
    solver = GradientDescent(steps, product / 4, momentum)

    class Quadratic:
        """2(d - 1)²: the minimiser is 1, so the displacement is the share."""

        def zero(self):
            return torch.zeros(1, 1, dtype=torch.float64)

        def gradient(self, d):
            return 2 * (d - 1).square().sum(), 4 * (d - 1)

        def gradient_at_anchor(self):
            return self.gradient(self.zero())

        def slope_at_anchor(self):
            value, gradient = self.gradient_at_anchor()
            return Root(value, None, value, 1.0), gradient

        def gluing(self, direction, scale=1.0):
            return Gluing(self.zero(), direction, 1.0, scale)

    assert solver.solve(Quadratic()).displacement.item() == pytest.approx(solver.scale(penalty), rel=1e-9)


def test_on_fills_in_the_step_size():
    assert GradientDescent(3).on(Squared(5.0)) == GradientDescent(3, 0.1)
    assert GradientDescent(3, 0.7).on(Squared(5.0)) == GradientDescent(3, 0.7)
    assert Backtracking(2).on(Huber(0.25)) == Backtracking(2, 2.0)
    assert GaussNewton().on(Custom(squares)) == GaussNewton()
    for solver in (GradientDescent(), Backtracking()):
        with pytest.raises(ValueError, match="step size lr"):
            solver.on(Custom(squares))


def test_only_the_first_gradient_step_costs_no_evaluation():
    assert [s.evaluates for s in SOLVERS] == [False, True, True, True, True, True, True]
    problem = make()
    with_forward_only = problem.evaluation
    with_forward_only.repeatable = False
    GradientDescent(1, 0.1).solve(problem)
    with pytest.raises(AssertionError, match="repeatable"):
        GradientDescent(2, 0.1).solve(problem)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GradientDescent(0), "h-steps"),
        (lambda: GradientDescent(True), "h-steps"),
        (lambda: GradientDescent(1.5), "h-steps"),
        (lambda: GradientDescent(1, -0.1), "h-lr"),
        (lambda: GradientDescent(1, float("nan")), "h-lr"),
        (lambda: GradientDescent(1, 0.1, momentum=1), "h-momentum"),
        (lambda: GradientDescent(1, 0.1, momentum=-0.1), "h-momentum"),
        (lambda: Backtracking(0), "h-steps"),
        (lambda: Backtracking(1, 0), "h-lr"),
        (lambda: Backtracking(decrease=1.0), "decrease"),
        (lambda: GaussNewton(-1), "h-steps"),
        (lambda: GaussNewton(iterations=0), "iterations"),
        (lambda: GaussNewton(tolerance=0), "tolerance"),
    ],
)
def test_settings_out_of_range(build, message):
    with pytest.raises(ValueError, match=message):
        build()
