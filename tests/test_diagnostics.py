"""Diagnostics: what they say is right, and saying it changes nothing."""

import copy

import pytest
import torch
from torch import nn

import blockprop
from blockprop import GaussNewton, GradientDescent
from blockprop.cache import GluingCache
from blockprop.curvature import Secant
from blockprop.diagnostics import alignment, curvature
from blockprop.executors.cached import CachedExecutor
from conftest import batch, flat, mlp, sgd

CE = nn.CrossEntropyLoss()


def make(model, K=3, **settings):
    return blockprop.BlockProp(blockprop.split(model, K), settings.pop("loss", CE), sgd(), **settings)


@pytest.mark.parametrize("K", [1, 2, 4])
def test_the_exact_form_is_aligned(K):
    found = alignment(make(mlp(), K), *batch())
    assert len(found) == K
    for one in found:
        assert one.cosine == pytest.approx(1, rel=1e-12)
        assert one.norm_ratio == pytest.approx(1, rel=1e-9)


def test_dropout_masks_are_the_same_on_both_sides():
    model = mlp(drop=lambda: nn.Dropout(0.5), norm=lambda: nn.BatchNorm1d(12))
    for one in alignment(make(model), *batch()):
        assert one.cosine == pytest.approx(1, rel=1e-9)


def test_the_published_form_shrinks_with_every_link():
    s = 1e-4
    found = alignment(make(mlp(), 4, form="published", h_solver=GradientDescent(1, s / 2)), *batch())
    for k, one in enumerate(found, 1):
        assert one.norm_ratio == pytest.approx(s ** (4 - k), rel=1e-2)
        assert one.cosine == pytest.approx(1, abs=1e-3)
    biased = alignment(make(mlp(), 4, form="published", h_solver=GradientDescent(1, 0.5)), *batch())
    assert min(one.cosine for one in biased[1:]) < 0.999  # 2λγ = 1: the bias is no longer small


def test_several_steps_in_norm_ratio():
    lam = 1e4
    solver = GradientDescent(4, 0.1 / (2 * lam))
    found = alignment(make(mlp(depth=2), 2, form="published", penalty=lam, h_solver=solver), *batch())
    assert found[0].norm_ratio == pytest.approx(1 - 0.9**4, rel=1e-3)


def test_blocks_without_a_gradient_have_no_angle():
    model = mlp(depth=2)
    model[0].requires_grad_(False)
    found = alignment(make(model, 2), *batch())
    assert found[0].cosine != found[0].cosine  # NaN
    assert found[1].cosine == pytest.approx(1)


@pytest.mark.parametrize("ask", [alignment, curvature])
@pytest.mark.parametrize("form", ["exact", "published", "proximal"])
def test_asking_changes_nothing(ask, form):
    model = mlp(drop=lambda: nn.Dropout(0.3), norm=lambda: nn.BatchNorm1d(12))
    algo = make(model, form=form, accumulate=2)
    algo.step(*batch())  # leaves accumulated gradients
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    gradients = [p.grad.clone() for p in model.parameters()]
    calls = [wstep.calls for wstep in algo.wsteps]
    inputs = batch()
    torch.set_rng_state(random)
    ask(algo, *inputs)
    assert torch.equal(torch.get_rng_state(), random)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(p.grad, gradient)
    assert [wstep.calls for wstep in algo.wsteps] == calls
    assert model.training


def test_asking_in_vain_changes_nothing_either():
    model = mlp(norm=lambda: nn.BatchNorm1d(12))
    algo = make(model, accumulate=2)
    algo.step(*batch())
    state, gradients = copy.deepcopy(model.state_dict()), [p.grad.clone() for p in model.parameters()]
    x, y = batch()
    with pytest.raises(ValueError, match="labels"):
        alignment(algo, x, y + 5)
    with pytest.raises(ValueError, match="labels"):
        curvature(algo, x, y + 5)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))


def test_curvature_is_the_hessians_largest_eigenvalue_times_the_step():
    """Linear blocks, where the Gauss-Newton matrix is the Hessian of L_k."""
    lam, gamma = [0.5, 2.0], [0.3, 0.1]
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(3, 4)).double()
    x, y = torch.randn(3, 4, dtype=torch.float64), torch.tensor([0, 3, 1])
    algo = make(model, 3, form="proximal", penalty=lam, h_solver=[GradientDescent(1, lr) for lr in gamma])
    found = curvature(algo, x, y, iterations=400)

    def top(h):
        return nn.functional.cross_entropy(model[2](h), y, reduction="sum") + lam[1] * (h - h3).square().sum()

    h3 = model[1](model[0](x)).detach()
    hessian = torch.autograd.functional.hessian(top, h3).view(9, 9)
    assert found[1] == pytest.approx(gamma[1] * float(torch.linalg.eigvalsh(hessian)[-1]), rel=1e-6)
    A = model[1].weight.detach()
    inside = 2 * lam[1] * A.T @ A + 2 * lam[0] * torch.eye(5, dtype=torch.float64)
    assert found[0] == pytest.approx(gamma[0] * float(torch.linalg.eigvalsh(inside)[-1]), rel=1e-6)


def test_curvature_inside_a_chain_that_is_not_linear():
    """2λ(I + AᵀA), A the block's Jacobian: the worst example counts."""
    model, (x, y) = mlp(depth=3, width=4), batch()
    algo = make(model, 3, penalty=0.5)
    h2 = algo.blocks[0](x).detach()
    largest = 0.0
    for h in h2:
        A = torch.autograd.functional.jacobian(algo.blocks[1], h)
        largest = max(largest, 1 + float(torch.linalg.matrix_norm(A, 2)) ** 2)
    assert curvature(algo, x, y, iterations=300)[0] == pytest.approx(largest, rel=1e-4)  # 2λγ = 1
    assert curvature(algo, x, y, iterations=3)[0] <= largest + 1e-12


def test_curvature_foretells_instability():
    model, (x, y) = mlp(depth=2), batch()
    at = curvature(make(model, 2, form="proximal", h_solver=GradientDescent(1, 1.0)), x, y, 100)[0]
    for factor, stable in ((1.9, True), (2.3, False)):
        solver = GradientDescent(60, factor / at)
        report = make(model, 2, form="proximal", h_solver=solver).gradient(x, y)
        assert report.stable is stable


def test_solvers_without_a_step_size():
    model, (x, y) = mlp(), batch()
    implicit = curvature(make(model, form="proximal", penalty=2.0, h_solver=GaussNewton()), x, y)
    explicit = curvature(make(model, form="proximal", penalty=2.0, h_solver=GradientDescent(1, 0.25)), x, y)
    assert implicit[-1] == pytest.approx(explicit[-1])
    assert curvature(make(model, 1), x, y) == []


@pytest.mark.parametrize(
    ("x", "y"),
    [
        ([[1.0]], torch.zeros(1)),
        (torch.zeros(2, 6).double(), [0, 1]),
    ],
    ids=["inputs", "targets"],
)
def test_curvature_refuses_what_a_step_refuses(x, y):
    with pytest.raises(ValueError, match="expected"):
        curvature(make(mlp()), x, y)


def test_alignment_under_a_cache_leaves_the_cache_alone():
    """Exact where a batch is due for a refresh, and what the cached slopes give between; training stays the same."""
    x, y = batch()
    ids = torch.arange(len(x))

    def steps(watched):
        torch.manual_seed(1)
        algo = make(mlp(), executor=CachedExecutor(GluingCache(len(x)), refresh=3, curvature=Secant(1)))
        found = []
        for _ in range(6):
            found.append(alignment(algo, x, y, ids) if watched else None)
            algo.step(x, y, ids)
        return found, flat(algo.blocks.model.state_dict().values())

    found, weights = steps(watched=True)
    assert torch.equal(weights, steps(watched=False)[1])
    for visit, blocks in enumerate(found):
        exact = [one.cosine == pytest.approx(1, rel=1e-12) for one in blocks]
        assert exact == [visit == 0, visit == 0, True]
