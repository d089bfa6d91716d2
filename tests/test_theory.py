"""The paper's theory, in float64 against autograd; docs/theory.md states what is tested here, by name.

Everything is a statement about `augmented_loss`, Eq. (4), whose partial gradients are the h-step's and the W-step's.
"""

import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import blockprop
from blockprop import GaussNewton, GradientDescent, Huber, Squared
from blockprop.augmented import augmented_loss
from blockprop.evaluation import Evaluation
from blockprop.gluing import Gluing
from blockprop.losses import OutputLoss
from blockprop.objective import GluingProblem, LossTerm, PenaltyTerm
from conftest import backprop_gradients, batch, flat, gradients, mlp, sgd

CE = OutputLoss(nn.CrossEntropyLoss())
TESTS = Path(__file__).parent


def network(K: int, width: int = 5) -> tuple[blockprop.Blocks, Tensor, Tensor]:
    """One layer a block, and a batch of three."""
    return blockprop.split(mlp(depth=K, width=width), K), *batch(3)


def energy(blocks, x, h, y, lam=1.0, beta=1.0) -> Tensor:
    """Eq. (4) summed over the batch."""
    return augmented_loss(blocks, x, h, y, loss=CE, penalty=lam, nudge=beta).sum()


def forward_pass(blocks, x) -> list[Tensor]:
    """h_2..h_K where every constraint holds."""
    h = []
    for block in list(blocks)[:-1]:
        h.append(block(h[-1] if h else x).detach())
    return h


def joint_minimum(blocks, x, y, lam=1.0, beta=1.0) -> list[Tensor]:
    """h_2..h_K at which Eq. (4) is stationary, by Newton's method from the forward pass."""
    start = forward_pass(blocks, x)
    sizes = [h.numel() for h in start]

    def parts(point: Tensor) -> list[Tensor]:
        return [part.view_as(h) for part, h in zip(point.split(sizes), start, strict=True)]

    def function(point: Tensor) -> Tensor:
        return energy(blocks, x, parts(point), y, lam, beta)

    point = torch.cat([h.flatten() for h in start])
    for _ in range(30):
        slope = torch.autograd.functional.jacobian(function, point)
        move = torch.linalg.solve(torch.autograd.functional.hessian(function, point), slope)
        point = point - move
        if move.norm() < 1e-13 * point.norm():
            return parts(point)
    raise AssertionError("Newton's method did not converge; the test's setting is too far from the forward pass")


def weight_gradient(blocks, x, h, y, lam=1.0, beta=1.0) -> list[Tensor]:
    """The gradient of Eq. (4) in the weights with the gluing variables held, block by block."""
    return [
        torch.cat([g.flatten() for g in torch.autograd.grad(energy(blocks, x, h, y, lam, beta), [*block.parameters()])])
        for block in blocks
    ]


def backprop(blocks, x, y) -> list[Tensor]:
    """Backprop's gradient of the loss's sum over the batch, block by block."""
    return [flat(g) * len(x) for g in backprop_gradients(blocks, x, y)]


def deltas(blocks, x, y) -> list[Tensor]:
    """Backprop's gradient of the loss's sum in h_2..h_K."""
    h, kept = x, []
    for block in list(blocks)[:-1]:
        h = block(h)
        kept.append(h)
    return list(torch.autograd.grad(cross_entropy(blocks[-1](h), y, reduction="sum"), kept))


def orders(errors: Sequence[float]) -> list[float]:
    """By what power the error falls when the step is halved."""
    return [math.log2(a / b) for a, b in itertools.pairwise(errors)]


def distance(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    a, b = flat(found), flat(expected)
    return float((a - b).norm() / b.norm())


# --- The augmented loss and its parts -------------------------------------------------------------------------------


def test_the_augmented_loss_is_eq_4():
    blocks, x, y = network(3)
    h = [torch.randn_like(forward) for forward in forward_pass(blocks, x)]
    found = augmented_loss(blocks, x, h, y, loss=CE, penalty=[0.5, 2.0], nudge=0.3)
    expected = 0.5 * (h[0] - blocks[0](x)).square().sum(1) + 2.0 * (h[1] - blocks[1](h[0])).square().sum(1)
    expected = expected + 0.3 * cross_entropy(blocks[2](h[1]), y, reduction="none")
    torch.testing.assert_close(found, expected)
    on_the_constraints = energy(blocks, x, forward_pass(blocks, x), y)
    torch.testing.assert_close(on_the_constraints, cross_entropy(blocks(x), y, reduction="sum"))


def test_the_augmented_loss_takes_any_penalty_and_loss():
    blocks, x, _ = network(2)
    y, h = torch.randn(3, 5, dtype=torch.float64), [f + 2 for f in forward_pass(blocks, x)]
    found = augmented_loss(blocks, x, h, y, loss=nn.MSELoss(), penalty=Huber(1.5, 0.5))
    expected = 5 * 1.5 * 0.5 * (2 * 2 - 0.5) + (blocks[1](h[0]) - y).square().mean(1)
    torch.testing.assert_close(found, expected)
    distances = augmented_loss(blocks, x, h, y, loss=nn.MSELoss(), penalty=lambda a, b: (a - b).abs().sum(1), nudge=0)
    torch.testing.assert_close(distances, torch.full((3,), 10.0, dtype=torch.float64))


def test_the_augmented_loss_refuses_gluing_variables_that_do_not_fit():
    blocks, x, y = network(3)
    with pytest.raises(ValueError, match="1 gluing variables for 3 blocks"):
        energy(blocks, x, forward_pass(blocks, x)[:1], y)
    with pytest.raises(ValueError, match=r"h_3 has shape \[3, 4\]; expected that of block 2's output, \[3, 5\]"):
        energy(blocks, x, [forward_pass(blocks, x)[0], torch.zeros(3, 4)], y)


def test_the_h_steps_gradient_is_eq_4s():
    """∇L_k (Eq. 5) is the partial gradient of Eq. (4) in h_k, at any h_k and with any h_{k+1}."""
    blocks, x, y = network(4)
    lam = [0.5, 2.0, 3.0]
    h = [forward + 0.3 * torch.randn_like(forward) for forward in forward_pass(blocks, x)]
    for k in (2, 3, 4):
        below = blocks[k - 2](h[k - 3] if k > 2 else x).detach()
        leaves = [value.clone().requires_grad_() for value in h]
        (expected,) = torch.autograd.grad(energy(blocks, x, leaves, y, lam), leaves[k - 2])
        if k == 4:
            upper = LossTerm(CE, y)
        else:
            anchor = blocks[k - 1](h[k - 2]).detach()
            upper = PenaltyTerm(Squared(lam[k - 1]), Gluing(anchor, h[k - 1] - anchor, 3.0))
        problem = GluingProblem(Evaluation(blocks[k - 1], below), upper, Squared(lam[k - 2]))
        torch.testing.assert_close(problem.gradient(h[k - 2] - below)[1], expected)


@pytest.mark.parametrize("steps", [1, 3])
def test_the_w_steps_gradient_is_eq_4s(steps):
    """∇J_k (Eqs. 6, 7) is the partial gradient of Eq. (4) in block k's weights at the gluing variables h*."""
    blocks, x, y = network(4)
    solver = GradientDescent(steps, 0.2)
    algo = blockprop.BlockProp(blocks, CE, sgd(), form="published", penalty=1.0, h_solver=solver)
    evaluations, h = [], x
    for stage in algo.stages:
        evaluations.append(stage.forward(h))
        h = evaluations[-1].output
    target, h_star = y, []
    for stage, evaluation in zip(algo.stages[:0:-1], evaluations[:0:-1], strict=True):
        target = stage.h_step(evaluation, target, with_gradient=False).gluing
        h_star.insert(0, target.value)
    expected = weight_gradient(blocks, x, h_star, y)
    algo.gradient(x, y)
    for found, wanted in zip(gradients(algo), expected, strict=True):
        torch.testing.assert_close(flat(found) * len(x), wanted, rtol=1e-9, atol=1e-12)


# --- Independence of the W-step's sub-problems ----------------------------------------------------------------------


def test_no_w_gradient_contains_another_blocks_weights():
    """With h held, the mixed second derivatives of Eq. (4) in the weights of two blocks are zero."""
    blocks, x, y = network(4)
    h = [forward + 0.3 * torch.randn_like(forward) for forward in forward_pass(blocks, x)]
    parameters = [list(block.parameters()) for block in blocks]
    for k in range(4):
        total = energy(blocks, x, h, y)
        own = torch.autograd.grad(total, parameters[k], create_graph=True)
        for j in range(4):
            mixed = torch.autograd.grad(flat(own).square().sum(), parameters[j], retain_graph=True, allow_unused=True)
            assert all((g is None or not g.any()) is (j != k) for g in mixed), (j, k)


def test_a_w_gradient_stays_the_same_bit_for_bit_whatever_other_blocks_become():
    blocks, x, y = network(4)
    h = [forward + 0.3 * torch.randn_like(forward) for forward in forward_pass(blocks, x)]
    for k in range(4):
        before = weight_gradient(blocks, x, h, y)[k]
        with torch.no_grad():
            for j, block in enumerate(blocks):
                for parameter in block.parameters() if j != k else []:
                    parameter.add_(torch.randn_like(parameter))
        assert torch.equal(weight_gradient(blocks, x, h, y)[k], before)


@pytest.mark.parametrize("form", ["published", "exact"])
def test_w_steps_in_any_order_are_the_w_steps_in_parallel(form):
    """All orders of the blocks, and threads, give the same weights bit for bit."""
    x, y = batch(6)
    results = []
    for order in [*itertools.permutations(range(4)), "threads"]:
        torch.manual_seed(1)
        blocks = blockprop.split(mlp(depth=4), 4)
        executor = "threads" if order == "threads" else "local"
        algo = blockprop.BlockProp(blocks, CE, sgd(), form=form, executor=executor)
        if order == "threads":
            algo.step(x, y)
            algo.close()
        else:
            evaluations, targets, feedbacks, h = [], [y], [], x
            for stage in algo.stages:
                evaluations.append(stage.forward(h))
                h = evaluations[-1].output
            for stage, evaluation in zip(algo.stages[:0:-1], evaluations[:0:-1], strict=True):
                feedbacks.insert(0, stage.h_step(evaluation, targets[0], with_gradient=False))
                targets.insert(0, feedbacks[0].gluing)
            for k in order:
                algo.stages[k].add_gradient(evaluations[k], targets[k], [None, *feedbacks][k])
                algo.stages[k].update()
        results.append(flat(blocks.model.parameters()).detach())
    assert all(torch.equal(result, results[0]) for result in results)


# --- Lemma B.1 ------------------------------------------------------------------------------------------------------


def turned(blocks, direction, by):
    """The same network with its weights moved along a direction."""
    moved = blockprop.split(mlp(depth=len(blocks), width=5), len(blocks))
    moved.model.load_state_dict(blocks.model.state_dict())
    with torch.no_grad():
        for parameter, way in zip(moved.model.parameters(), direction, strict=True):
            parameter.add_(by * way)
    return moved


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("K", [2, 3])
def test_lemma_b1_the_two_total_derivatives_are_one(K, beta):
    """d/dθ (∂F/∂β) = d/dβ (∂F/∂θ) at the joint minimum h(θ, β), along a random direction of the weights."""
    blocks, x, y = network(K)
    direction = [torch.randn_like(parameter) for parameter in blocks.model.parameters()]
    eps = 1e-4

    def loss_at_minimum(by):  # ∂F/∂β
        there = turned(blocks, direction, by)
        output = there[-1](joint_minimum(there, x, y, 1.0, beta)[-1])
        return float(cross_entropy(output, y, reduction="sum").detach())

    def slope_at_minimum(b):  # ∂F/∂θ
        h = joint_minimum(blocks, x, y, 1.0, b)
        return float(flat(weight_gradient(blocks, x, h, y, 1.0, b)) @ flat(direction))

    left = (loss_at_minimum(eps) - loss_at_minimum(-eps)) / (2 * eps)
    right = (slope_at_minimum(beta + eps) - slope_at_minimum(beta - eps)) / (2 * eps)
    assert left == pytest.approx(right, rel=1e-5)


def test_the_gradient_of_the_minimum_is_the_gradient_at_the_minimum():
    """The envelope theorem: h(θ) need not be differentiated."""
    blocks, x, y = network(3)
    direction = [torch.randn_like(parameter) for parameter in blocks.model.parameters()]
    values = [
        float(energy(there, x, joint_minimum(there, x, y), y).detach())
        for there in (turned(blocks, direction, 1e-5), turned(blocks, direction, -1e-5))
    ]
    found = float(flat(weight_gradient(blocks, x, joint_minimum(blocks, x, y), y)) @ flat(direction))
    assert found == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-7)


# --- Theorem 5.1 ----------------------------------------------------------------------------------------------------

STRENGTHS = [0.2 / 2**i for i in range(6)]
# as docs/theory.md prints them, for K = 3; the third row is the first
ONE_SIDED = [5.6e-2, 2.8e-2, 1.4e-2, 7.2e-3, 3.6e-3, 1.8e-3]
SYMMETRIC = [2.1e-3, 5.3e-4, 1.3e-4, 3.3e-5, 8.3e-6, 2.1e-6]


def nudged(blocks, x, y, lam, beta):
    """∂F/∂θ at the nudged minimum."""
    return weight_gradient(blocks, x, joint_minimum(blocks, x, y, lam, beta), y, lam, beta)


@pytest.mark.parametrize("K", [2, 3, 4])
def test_theorem_5_1_the_free_phase_is_the_forward_pass(K):
    """At β = 0 the energy is zero, on the constraints, and so is its gradient in every weight."""
    blocks, x, y = network(K)
    h = joint_minimum(blocks, x, y, beta=0.0)
    for found, forward in zip(h, forward_pass(blocks, x), strict=True):
        torch.testing.assert_close(found, forward)
    assert energy(blocks, x, h, y, beta=0.0) == 0
    assert not flat(weight_gradient(blocks, x, h, y, beta=0.0)).any()


@pytest.mark.parametrize("K", [2, 3, 4])
def test_theorem_5_1_one_sided_nudging_converges_with_order_1(K):
    """(∂F/∂θ at β - ∂F/∂θ at 0) / β is backprop's gradient, up to an error of order β."""
    blocks, x, y = network(K)
    expected = backprop(blocks, x, y)
    errors = [distance([g / b for g in nudged(blocks, x, y, 1.0, b)], expected) for b in STRENGTHS]
    assert errors[-1] < 0.01
    assert orders(errors)[-3:] == pytest.approx([1.0] * 3, abs=0.05)
    if K == 3:
        assert errors == pytest.approx(ONE_SIDED, rel=0.05)


@pytest.mark.parametrize("K", [2, 3, 4])
def test_theorem_5_1_symmetric_nudging_converges_with_order_2(K):
    """(∂F/∂θ at β - ∂F/∂θ at -β) / 2β: up to an error of order β²."""
    blocks, x, y = network(K)
    expected = backprop(blocks, x, y)
    errors = []
    for b in STRENGTHS:
        up, down = nudged(blocks, x, y, 1.0, b), nudged(blocks, x, y, 1.0, -b)
        errors.append(distance([(p - m) / (2 * b) for p, m in zip(up, down, strict=True)], expected))
    assert errors[-1] < 1e-3
    assert orders(errors)[-3:] == pytest.approx([2.0] * 3, abs=0.05)
    if K == 3:
        assert errors == pytest.approx(SYMMETRIC, rel=0.05)


@pytest.mark.parametrize("K", [2, 3, 4])
def test_theorem_5_1_in_the_limit_of_a_large_penalty(K):
    """BlockProp's own reading, β = 1: ∇J_k at the joint minimum is backprop's gradient up to order 1/λ."""
    blocks, x, y = network(K)
    expected = backprop(blocks, x, y)
    errors = [distance(nudged(blocks, x, y, 1 / b, 1.0), expected) for b in STRENGTHS]
    assert errors[-1] < 0.01
    assert orders(errors)[-3:] == pytest.approx([1.0] * 3, abs=0.05)
    if K == 3:
        assert errors == pytest.approx(ONE_SIDED, rel=0.05)


def test_only_the_ratio_of_nudge_and_penalty_moves_the_minimum():
    """So that β → 0 and λ → ∞ are one limit; weights' gradients scale with them."""
    blocks, x, y = network(3)
    for one, other in zip(joint_minimum(blocks, x, y, 1.0, 0.1), joint_minimum(blocks, x, y, 10.0, 1.0), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    small, large = nudged(blocks, x, y, 1.0, 0.1), nudged(blocks, x, y, 10.0, 1.0)
    torch.testing.assert_close(flat(small) * 10, flat(large), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("K", [1, 2, 3])
def test_theorem_5_1_with_an_output_unit(K):
    """The energy with a nudged h_{K+1} is BlockProp with one block more, which is the loss alone: same limit."""
    blocks, x, y = network(K)
    expected = backprop(blocks, x, y)
    with_output = [*blocks, nn.Identity()]
    errors = []
    for b in STRENGTHS:
        h = joint_minimum(with_output, x, y, 1.0, b)
        found = torch.autograd.grad(energy(with_output, x, h, y, 1.0, b), [*blocks.model.parameters()])
        errors.append(distance([flat(found) / b], [flat(expected)]))
    assert errors[-1] < 0.01
    assert orders(errors)[-3:] == pytest.approx([1.0] * 3, abs=0.05)


@pytest.mark.parametrize("lam", [0.5, 1.0, 20.0])
def test_at_the_joint_minimum_residuals_are_backprops_gradients_through_the_displaced_network(lam):
    """No limit: r_k = -δ_k / 2λ, and ∇J_k is backprop's gradient, both of the network whose h_k are moved by r_k."""
    blocks, x, y = network(4)
    h = joint_minimum(blocks, x, y, lam)
    residuals = [
        (value - block(below)).detach() for block, below, value in zip(list(blocks)[:-1], [x, *h[:-1]], h, strict=True)
    ]
    moved, kept = x, []
    for block, residual in zip(list(blocks)[:-1], residuals, strict=True):
        moved = block(moved) + residual
        kept.append(moved)
    loss = cross_entropy(blocks[-1](moved), y, reduction="sum")
    slopes = torch.autograd.grad(loss, kept, retain_graph=True)
    for residual, slope in zip(residuals, slopes, strict=True):
        torch.testing.assert_close(residual, -slope / (2 * lam), rtol=1e-8, atol=1e-12)
    of_weights = torch.autograd.grad(loss, list(blocks.model.parameters()))
    torch.testing.assert_close(flat(weight_gradient(blocks, x, h, y, lam)), flat(of_weights), rtol=1e-8, atol=1e-12)


# --- What Algorithm 1 makes of the theorem: one sweep from the top ----------------------------------------------------


def solved_sweep(blocks, x, y, lam):
    """The weights' gradients after one sweep of h-steps, each solved to the end (published form)."""
    solver = GaussNewton(20, iterations=40, tolerance=1e-13)
    algo = blockprop.BlockProp(blocks, CE, sgd(), form="published", penalty=lam, h_solver=solver)
    algo.gradient(x, y)
    return [flat(g) * len(x) for g in gradients(algo)]


@pytest.mark.parametrize("lam", [1.0, 5.0, 100.0])
def test_with_two_blocks_one_h_step_solved_is_the_joint_minimum(lam):
    blocks, x, y = network(2)
    found, expected = solved_sweep(blocks, x, y, lam), nudged(blocks, x, y, lam, 1.0)
    torch.testing.assert_close(flat(found), flat(expected), rtol=1e-6, atol=1e-9)


def test_with_three_blocks_one_sweep_solved_is_damped_at_any_penalty():
    """Its limit as λ → ∞: block 1 gets (I + AᵀA)⁻¹ δ_2 and block 2 gets (I + AAᵀ)⁻¹ δ_3 with A = ∂b_2/∂h_2."""
    blocks, x, y = network(3)
    x, y = x[:1], y[:1]
    found = solved_sweep(blocks, x, y, 1e6)
    (h2, _), (delta2, delta3) = forward_pass(blocks, x), deltas(blocks, x, y)
    A = torch.autograd.functional.jacobian(blocks[1], h2).view(5, 5)
    eye = torch.eye(5, dtype=torch.float64)
    damped = [torch.linalg.solve(eye + A.T @ A, delta2[0]), torch.linalg.solve(eye + A @ A.T, delta3[0])]
    for k, (block, inputs) in enumerate(zip(blocks[:2], (x, h2), strict=True)):
        expected = flat(torch.autograd.grad(block(inputs), [*block.parameters()], damped[k][None]))
        torch.testing.assert_close(found[k], expected, rtol=1e-4, atol=1e-8)
    assert distance(found, backprop(blocks, x, y)) > 0.05


def test_the_error_of_one_sweep_solved_stays_where_the_joint_minimums_falls():
    """On the network of the table in docs/theory.md, for all its examples."""
    blocks, x, y = network(3)
    for lam in (1e2, 1e4, 1e6):
        assert distance(solved_sweep(blocks, x, y, lam), backprop(blocks, x, y)) == pytest.approx(0.16, abs=0.01)
        assert distance(nudged(blocks, x, y, lam, 1.0), backprop(blocks, x, y)) == pytest.approx(0.28 / lam, rel=0.1)


def test_sweeps_repeated_reach_the_joint_minimum():
    blocks, x, y = network(3)
    expected, (h2, h3) = joint_minimum(blocks, x, y), forward_pass(blocks, x)
    solver, errors = GaussNewton(10, iterations=15, tolerance=1e-12), []
    anchor = blocks[0](x).detach()
    for _ in range(25):
        below = Evaluation(blocks[1], h2).output.detach()
        top = GluingProblem(Evaluation(blocks[2], below), LossTerm(CE, y), Squared())
        h3 = below + solver.solve(top).displacement
        evaluation = Evaluation(blocks[1], anchor)
        target = Gluing(evaluation.output.detach(), h3 - evaluation.output.detach(), 3.0)
        h2 = anchor + solver.solve(GluingProblem(evaluation, PenaltyTerm(Squared(), target), Squared())).displacement
        errors.append(distance([h2, h3], expected))
    assert errors[0] > 1e-3
    assert errors[-1] < 1e-8


# --- The facts of docs/choosing.md that have no test elsewhere --------------------------------------------------------


@pytest.mark.parametrize("N", [1, 4, 32])
def test_fact_1_a_mean_would_divide_every_gluing_gradient_by_the_batch_size(N):
    blocks = blockprop.split(mlp(), 2)
    x, y = batch(N)
    evaluation = Evaluation(blocks[1], blocks[0](x).detach())
    summed = GluingProblem(evaluation, LossTerm(CE, y), Squared()).gradient_at_anchor()[1]
    h = evaluation.input.detach().requires_grad_()
    (mean,) = torch.autograd.grad(cross_entropy(blocks[1](h), y), h)
    torch.testing.assert_close(summed, N * mean)


@pytest.mark.parametrize("s", [0.02, 0.5, 1.0])
def test_fact_3_the_bias_of_interior_blocks(s):
    """To first order in δ: s^(K-k) (∂b_k/∂W_k)ᵀ (I - s A_k A_kᵀ) δ_{k+1} for 1 < k < K, with s = 2λγ_h."""
    blocks, x, y = network(4)
    x, y = x[:1], y[:1]
    lam = 1e7  # so that δ / λ, the displacement, is small and s is not
    solver = GradientDescent(1, s / (2 * lam))
    algo = blockprop.BlockProp(blocks, CE, sgd(), form="published", penalty=lam, h_solver=solver)
    algo.gradient(x, y)
    found, delta, h = gradients(algo), deltas(blocks, x, y), forward_pass(blocks, x)
    for k in (2, 3):
        block, inputs = blocks[k - 1], h[k - 2]
        A = torch.autograd.functional.jacobian(block, inputs).view(5, 5)
        biased = delta[k - 1] - s * (A @ A.T @ delta[k - 1][0])
        expected = s ** (4 - k) * flat(torch.autograd.grad(block(inputs), [*block.parameters()], biased))
        assert distance(found[k - 1], [expected]) < 1e-4
    unbiased = flat(torch.autograd.grad(blocks[0](x), [*blocks[0].parameters()], s**3 * delta[0]))
    assert distance(found[0], [unbiased]) < 1e-4


def test_fact_3_the_last_blocks_gradient_is_backprops_one_step_further():
    """Block K's is exactly backprop's taken at h_K - γ_h δ_K."""
    blocks, x, y = network(3)
    algo = blockprop.BlockProp(blocks, CE, sgd(), form="published", h_solver=GradientDescent(1, 0.3))
    algo.gradient(x, y)
    there = forward_pass(blocks, x)[-1] - 0.3 * deltas(blocks, x, y)[-1]
    loss = cross_entropy(blocks[-1](there), y)
    expected = torch.autograd.grad(loss, [*blocks[-1].parameters()])
    torch.testing.assert_close(flat(gradients(algo)[-1]), flat(expected), rtol=1e-9, atol=1e-12)


def test_fact_4_a_fresh_dropout_mask_swamps_the_residual():
    """The residual at h*: with one mask it is the displacement, with two it is the masks' difference."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(8, 40), nn.Tanh(), nn.Dropout(0.5)).double()
    top = nn.Linear(40, 5).double()
    x, y = torch.randn(512, 8, dtype=torch.float64), torch.randint(5, (512,))
    evaluation = Evaluation(block, x)
    h = evaluation.output.detach().requires_grad_()
    (delta,) = torch.autograd.grad(cross_entropy(top(h), y, reduction="sum"), h)
    h_star = h.detach() - 0.01 * delta
    with torch.no_grad():
        one_mask, two_masks = h_star - evaluation(x), h_star - block(x)
    torch.testing.assert_close(one_mask, -0.01 * delta)
    assert two_masks.norm() > 100 * one_mask.norm()
    assert torch.cosine_similarity(two_masks.flatten(), -delta.flatten(), dim=0).abs() < 0.1


@pytest.mark.parametrize(("product", "stable"), [(1.9, True), (1.99, True), (2.01, False), (2.1, False)])
def test_fact_5_gradient_steps_are_stable_below_two(product, stable):
    """Inside the chain the Hessian is 2λ(I + AᵀA); its largest eigenvalue times γ_h is the product."""
    lam = 0.7
    block = nn.Linear(4, 6, bias=False).double()
    A = block.weight.detach()
    largest = float(torch.linalg.eigvalsh(2 * lam * (torch.eye(4, dtype=torch.float64) + A.T @ A))[-1])
    evaluation = Evaluation(block, torch.randn(3, 4, dtype=torch.float64))
    target = Gluing(evaluation.output.detach(), torch.randn(3, 6, dtype=torch.float64), 3.0)
    problem = GluingProblem(evaluation, PenaltyTerm(Squared(lam), target), Squared(lam))
    norms = [
        float(problem.gradient(GradientDescent(steps, product / largest).solve(problem).displacement)[1].norm())
        for steps in (60, 61)
    ]
    # after many steps the worst direction is left, and each step multiplies it by 1 - γ_h times its curvature
    assert norms[1] / norms[0] == pytest.approx(product - 1, rel=1e-3)
    assert (norms[1] < norms[0]) is stable


def test_fact_6_parallel_sweeps_carry_the_error_one_block_each():
    """One sweep from the top moves every h_k; of parallel (Jacobi) sweeps, m move the upper m and no other."""
    K = 5
    blocks, x, y = network(K)
    start = forward_pass(blocks, x)

    def step(h, k):
        leaves = [value.clone().requires_grad_() for value in h]
        return h[k] - 0.1 * torch.autograd.grad(energy(blocks, x, leaves, y), leaves[k])[0]

    h = list(start)
    for k in range(K - 2, -1, -1):
        h[k] = step(h, k)
    assert all((a - b).norm() > 1e-9 for a, b in zip(h, start, strict=True))

    h = list(start)
    for sweep in range(1, K):
        h = [step(h, k) for k in range(K - 1)]
        # on the constraints the energy's gradient is zero up to the rounding of a forward pass
        moved = [bool((a - b).norm() > 1e-12) for a, b in zip(h, start, strict=True)]
        assert moved == [False] * (K - 1 - sweep) + [True] * sweep


def test_every_test_that_the_page_names_exists_and_every_test_here_is_named():
    named = set(re.findall(r"`(test_\w+)`", (TESTS.parent / "docs" / "theory.md").read_text()))

    def defined(*files: Path) -> set[str]:
        return {name for file in files for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)}

    assert named <= defined(*TESTS.rglob("test_*.py"))
    assert defined(Path(__file__)) - named == {
        "test_every_test_that_the_page_names_exists_and_every_test_here_is_named"
    }
