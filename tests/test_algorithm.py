"""The science: every form against the paper's pseudo-code and against backprop, in float64."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import blockprop
from blockprop import Backtracking, GaussNewton, GradientDescent, Huber
from conftest import backprop_gradients, batch, flat, gradients, mlp, sgd
from reference import algorithm_1_gradients

CE = nn.CrossEntropyLoss()


def ce_sum(output, targets):
    return nn.functional.cross_entropy(output, targets, reduction="sum")


def blockprop_gradients(model, K, x, y, **settings):
    algo = blockprop.BlockProp(blockprop.split(model, K), CE, sgd(), **settings)
    report = algo.gradient(x, y)
    return gradients(algo), report


def assert_same(found, expected, rtol=1e-6):
    for k, (a, b) in enumerate(zip(found, expected, strict=True)):
        a, b = flat(a), flat(b)
        cosine = torch.dot(a, b) / (a.norm() * b.norm())
        assert abs(cosine - 1) < rtol, f"block {k + 1}: cosine {cosine}"
        assert abs(a.norm() / b.norm() - 1) < rtol, f"block {k + 1}: norm ratio {a.norm() / b.norm()}"


@pytest.mark.parametrize("K", [1, 2, 3, 4])
@pytest.mark.parametrize("n_h", [1, 3])
@pytest.mark.parametrize("executor", ["local", "threads"])
def test_published_form_is_algorithm_1(K, n_h, executor):
    model, (x, y) = mlp(), batch()
    lam, gamma = [1.0, 0.5, 2.0][: K - 1], [0.1, 0.2, 0.05][: K - 1]
    blocks = blockprop.split(model, K)
    algo = blockprop.BlockProp(
        blocks, CE, sgd(), form="published", penalty=lam, executor=executor,
        h_solver=[GradientDescent(n_h, lr) for lr in gamma],
    )  # fmt: skip
    report = algo.gradient(x, y)
    expected, h = algorithm_1_gradients(blocks, x, y, ce_sum, lam, gamma, n_h)
    for found, wanted in zip(gradients(algo), expected, strict=True):
        # the reference takes the h-step's sum, the library's W-step the mean
        torch.testing.assert_close(flat(found) * len(x), flat(wanted), rtol=1e-9, atol=1e-12)
    anchor = x
    for k, block in enumerate(blocks[:-1]):
        anchor = block(anchor)
        assert report.gluing_loss[k] == pytest.approx(float((h[k] - anchor).detach().square().sum() / len(x)), rel=1e-9)


@pytest.mark.parametrize("K", [2, 3, 5, 6])
@pytest.mark.parametrize("penalty", [0.5, 1.0, 10.0, 500.0])
def test_exact_form_is_backprop_for_every_block(K, penalty):
    model, (x, y) = mlp(depth=6), batch()
    found, _ = blockprop_gradients(model, K, x, y, penalty=penalty)
    assert_same(found, backprop_gradients(blockprop.split(model, K), x, y), rtol=1e-9)


@settings(max_examples=25, deadline=None)
@given(depth=st.integers(1, 6), data=st.data(), n=st.integers(1, 9), seed=st.integers(0, 99))
def test_exact_form_is_backprop_for_any_cut(depth, data, n, seed):
    torch.manual_seed(seed)
    model, (x, y) = mlp(depth), batch(n)
    at = data.draw(st.lists(st.sampled_from([str(i) for i in range(1, 2 * depth)]), unique=True)) if depth > 1 else []
    at = [name for name in sorted(at, key=int) if int(name) < len(model)]
    blocks = blockprop.split(model, at=at)
    algo = blockprop.BlockProp(blocks, CE, sgd())
    algo.gradient(x, y)
    found = gradients(algo)
    expected = backprop_gradients(blocks, x, y)
    for a, b in zip(found, expected, strict=True):
        if a:
            torch.testing.assert_close(flat(a), flat(b), rtol=1e-9, atol=1e-13)


def test_one_block_is_backprop_bit_for_bit():
    a, b = mlp().float(), mlp().float()
    b.load_state_dict(a.state_dict())
    one = blockprop.BlockProp(blockprop.split(a, 1), CE, sgd())
    other = blockprop.Backprop(blockprop.split(b, 1), CE, sgd())
    for _ in range(5):
        x, y = batch()
        assert one.step(x.float(), y).loss == other.step(x.float(), y).loss
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)


def test_published_scale_is_two_lambda_gamma_to_the_links_above():
    """Block 1's gradient is backprop's times (2λγ)^(K-1), to first order in 2λγ (fact 2)."""
    model, (x, y) = mlp(depth=4), batch()
    s = 1e-4
    found, _ = blockprop_gradients(model, 4, x, y, form="published", h_solver=GradientDescent(1, lr=s / 2))
    expected = backprop_gradients(blockprop.split(model, 4), x, y)
    for k in range(4):
        scaled = s ** (3 - k) * flat(expected[k])
        assert (flat(found[k]) - scaled).norm() < 1e-2 * scaled.norm()


def test_several_steps_scale_by_one_minus_the_power():
    """At K = 2, N_h steps multiply block 1's gradient by 1 - (1 - 2λγ)^N_h, to first order in the displacement."""
    model, (x, y) = mlp(depth=2), batch()
    lam = 1e4  # a stiff penalty: the displacement is small although 2λγ is not
    expected = flat(backprop_gradients(blockprop.split(model, 2), x, y)[0])
    for n_h, product in itertools.product((1, 2, 4, 8), (0.1, 0.5, 1.0, 1.5)):
        solver = GradientDescent(n_h, product / (2 * lam))
        found, _ = blockprop_gradients(model, 2, x, y, form="published", penalty=lam, h_solver=solver)
        scaled = (1 - (1 - product) ** n_h) * expected
        assert (flat(found[0]) - scaled).norm() < 1e-3 * expected.norm()


def test_rescaled_form_tends_to_backprop_as_the_step_shrinks():
    model, (x, y) = mlp(depth=4), batch()
    expected = [flat(g) for g in backprop_gradients(blockprop.split(model, 4), x, y)]
    errors = []
    for s in (1e-2, 1e-3):
        found, _ = blockprop_gradients(model, 4, x, y, form="rescaled", h_solver=GradientDescent(1, lr=s / 2))
        errors.append(max(float((flat(a) - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)))
    assert errors[0] < 0.05
    assert errors[1] < 0.15 * errors[0]  # the bias is first order in 2λγ


@pytest.mark.parametrize("form", ["exact", "published", "rescaled", "proximal"])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_mini_batch_is_the_mean_of_its_examples(form, steps):
    if form == "exact" and steps > 1:
        pytest.skip("the exact form takes one step")
    model, (x, y) = mlp(), batch()
    solver = None if form == "exact" else GradientDescent(steps, lr=0.1)
    whole, _ = blockprop_gradients(model, 3, x, y, form=form, h_solver=solver)
    singles = [
        blockprop_gradients(model, 3, x[i : i + 1], y[i : i + 1], form=form, h_solver=solver)[0] for i in range(len(x))
    ]
    for k in range(3):
        mean = torch.stack([flat(single[k]) for single in singles]).mean(0)
        torch.testing.assert_close(flat(whole[k]), mean, rtol=1e-9, atol=1e-14)


def test_the_h_step_does_not_depend_on_the_batch_size():
    model, (x, y) = mlp(), batch()
    _, once = blockprop_gradients(model, 2, x, y)
    _, twice = blockprop_gradients(model, 2, torch.cat([x, x]), torch.cat([y, y]))
    assert twice.gluing_loss == pytest.approx(once.gluing_loss, rel=1e-12)


@pytest.mark.parametrize(
    "solver",
    [GradientDescent(4, 0.2), GradientDescent(4, 0.1, momentum=0.5), Backtracking(3), GaussNewton(2, iterations=20)],
    ids=["descent", "momentum", "backtracking", "gauss-newton"],
)
@pytest.mark.parametrize("penalty", [1.0, Huber(1.0, 0.5), lambda a, b: (a - b).square().flatten(1).sum(1)])
def test_proximal_gradient_is_that_of_the_penalty_to_the_solved_target(solver, penalty):
    """Proximal: ∇J_k at the forward pass's h_k towards h*_{k+1}, whatever solved for h*."""
    if callable(penalty) and not hasattr(penalty, "weight") and not isinstance(solver, GaussNewton):
        solver = type(solver)(**{**solver.__dict__, "lr": 0.1})
    model, (x, y) = mlp(depth=2), batch()
    blocks = blockprop.split(model, 2)
    algo = blockprop.BlockProp(blocks, CE, sgd(), form="proximal", penalty=penalty, h_solver=solver)
    stage1, stage2 = algo.stages
    e1 = stage1.forward(x)
    feedback = stage2.train(stage2.forward(e1.output), y)[1]
    assert feedback is not None
    algo.wsteps[0].forget()
    algo.wsteps[1].forget()
    algo.gradient(x, y)
    h_star = feedback.gluing.value
    r = h_star - blocks[0](x)
    value = (
        2 * nn.functional.huber_loss(r, torch.zeros_like(r), reduction="none", delta=0.5)
        if isinstance(penalty, Huber)
        else r**2
    )
    expected = torch.autograd.grad(value.sum() / len(x), list(blocks[0].parameters()))
    torch.testing.assert_close(flat(gradients(algo)[0]), flat(expected), rtol=1e-8, atol=1e-12)
    assert feedback.solution.stable


@pytest.mark.parametrize("form", ["exact", "published", "rescaled", "proximal"])
@pytest.mark.parametrize("recompute", [False, True])
def test_threads_and_recomputation_change_no_number(form, recompute):
    results = []
    for executor, again in (("local", False), ("threads", recompute), ("local", recompute)):
        torch.manual_seed(3)
        model = mlp(depth=5, drop=lambda: nn.Dropout(0.3), norm=lambda: nn.BatchNorm1d(12)).float()
        algo = blockprop.BlockProp(
            blockprop.split(model, 3), CE, lambda p: torch.optim.Adam(p, 1e-2), form=form,
            executor=executor, recompute=again, clip=1.0,
        )  # fmt: skip
        for _ in range(4):
            x, y = batch()
            algo.step(x.float(), y)
        algo.close()
        results.append(model.state_dict())
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


def test_exact_form_with_dropout_and_batchnorm_is_backprop():
    states = []
    for make in (blockprop.BlockProp, blockprop.Backprop):
        torch.manual_seed(3)
        model = mlp(depth=5, drop=lambda: nn.Dropout(0.3), norm=lambda: nn.BatchNorm1d(12))
        algo = make(blockprop.split(model, 4), CE, sgd())
        for _ in range(5):
            algo.step(*batch())
        states.append(model.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("form", ["exact", "published", "proximal"])
def test_running_statistics_move_once_a_batch(form):
    model = mlp(depth=3, norm=lambda: nn.BatchNorm1d(12))
    solver = None if form == "exact" else GradientDescent(3, 0.1)
    algo = blockprop.BlockProp(blockprop.split(model, 3), CE, sgd(1e-9), form=form, h_solver=solver)
    x, y = batch()
    expected = mlp(depth=3, norm=lambda: nn.BatchNorm1d(12))
    expected.load_state_dict(model.state_dict())
    expected(x)
    algo.step(x, y)
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, expected.get_buffer(name))


def test_accumulation_is_the_mean_of_the_batches():
    x, y = batch(8)
    whole, halves = mlp(), mlp()
    halves.load_state_dict(whole.state_dict())
    blockprop.BlockProp(blockprop.split(whole, 2), CE, sgd()).step(x, y)
    algo = blockprop.BlockProp(blockprop.split(halves, 2), CE, sgd(), accumulate=2)
    before = flat(halves.parameters()).clone()
    algo.step(x[:4], y[:4])
    assert torch.equal(flat(halves.parameters()), before)
    algo.step(x[4:], y[4:])
    torch.testing.assert_close(flat(halves.parameters()), flat(whole.parameters()))


def test_clipping_is_per_block_and_the_same_in_the_baseline():
    states = []
    for make in (blockprop.BlockProp, blockprop.Backprop):
        torch.manual_seed(1)
        model = mlp()
        algo = make(blockprop.split(model, 2), CE, sgd(1.0), clip=1e-3)
        before = [flat(block.parameters()).clone() for block in algo.blocks]
        algo.step(*batch())
        moved = [float((flat(block.parameters()) - old).norm()) for block, old in zip(algo.blocks, before, strict=True)]
        assert moved == pytest.approx([1e-3, 1e-3], rel=1e-3)
        states.append(flat(model.parameters()))
    torch.testing.assert_close(*states)


def test_bfloat16_autocast_keeps_the_feedback_at_any_penalty():
    """In h*'s own bfloat16 rounding the displacement at λ = 500 would be lost; it travels apart."""
    torch.manual_seed(0)
    model = mlp(width=64).float()
    x, y = batch(32)
    for penalty in (1.0, 500.0):
        algo = blockprop.BlockProp(blockprop.split(model, 3), CE, sgd(), penalty=penalty, precision=torch.bfloat16)
        algo.gradient(x.float(), y)
        found = gradients(algo)
        baseline = blockprop.Backprop(blockprop.split(model, 3), CE, sgd(), precision=torch.bfloat16)
        baseline.gradient(x.float(), y)
        for a, b in zip(found, gradients(baseline), strict=True):
            assert torch.cosine_similarity(flat(a), flat(b), dim=0) > 0.999


def test_schedulers_and_optimizers_per_block():
    model = mlp()
    algo = blockprop.BlockProp(
        blockprop.split(model, 2), CE, [sgd(0.1), sgd(0.2)],
        scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
    )  # fmt: skip
    algo.step(*batch())
    assert [wstep.lr for wstep in algo.wsteps] == pytest.approx([0.05, 0.1])


def test_per_token_losses_count_tokens():
    model = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 11)).double()
    x, y = torch.randint(11, (4, 6)), torch.randint(11, (4, 6))
    algo = blockprop.BlockProp(blockprop.split(model, 3), CE, sgd())
    algo.gradient(x, y)
    expected = torch.autograd.grad(
        nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten()), list(model.parameters())
    )
    torch.testing.assert_close(flat(g for block in gradients(algo) for g in block), flat(expected))


def test_regression_and_a_plain_function_as_loss():
    model, (x, _) = mlp(), batch()
    y = torch.randn(7, 5, dtype=torch.float64)
    for loss in (nn.MSELoss(), nn.MSELoss(reduction="sum"), nn.MSELoss(reduction="none"), nn.functional.mse_loss):
        algo = blockprop.BlockProp(blockprop.split(model, 3), loss, sgd())
        algo.gradient(x, y)
        assert_same(gradients(algo), backprop_gradients(blockprop.split(model, 3), x, y, loss), 1e-9)


def test_the_trained_model_is_the_users_own():
    model, (x, y) = mlp(), batch()
    keys = list(model.state_dict())
    algo = blockprop.BlockProp(blockprop.split(model, 3), CE, sgd(0.5))
    losses = [algo.step(x, y).loss for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(model(x), algo.predict(x))


def test_state_round_trip_continues_bit_for_bit():
    def make(model):
        return blockprop.BlockProp(blockprop.split(model, 2), CE, lambda p: torch.optim.AdamW(p, 1e-2), accumulate=2)

    model, batches = mlp(), [batch() for _ in range(5)]
    algo = make(model)
    for one in batches[:3]:
        algo.step(*one)
    twin = mlp()
    twin.load_state_dict(model.state_dict())
    resumed = make(twin)
    resumed.load_state_dict(copy.deepcopy(algo.state_dict()))
    for one in batches[3:]:
        algo.step(*one)
        resumed.step(*one)
    assert torch.equal(flat(model.parameters()), flat(twin.parameters()))


def test_an_exception_in_a_thread_is_raised_and_nothing_hangs():
    class Stop(Exception):
        pass

    class Refusing(torch.optim.SGD):
        def step(self, closure=None):
            raise Stop("no")

    algo = blockprop.BlockProp(
        blockprop.split(mlp(), 3), CE, [sgd(), lambda p: Refusing(p, lr=0.1), sgd()], executor="threads"
    )
    with pytest.raises(Stop, match="no"):
        algo.step(*batch())
    assert all(p.grad is None for wstep in algo.wsteps for p in wstep.parameters)
    algo.close()


@pytest.mark.parametrize("executor", ["local", "threads"])
@pytest.mark.parametrize(("K", "count", "lam"), [(2, 32, 1.0), (4, 48, 1.0), (5, 7, 0.3), (5, 33, 123.4)])
def test_exact_form_is_backprop_bit_for_bit(K, count, lam, executor):
    """The h-step's factor and the penalty's cancel before anything is multiplied by them, at any λ and batch."""
    forms = {blockprop.BlockProp: {"penalty": lam, "executor": executor}, blockprop.Backprop: {}}
    states = []
    for make, form in forms.items():
        torch.manual_seed(3)
        model = mlp(depth=5, drop=lambda: nn.Dropout(0.3), norm=lambda: nn.BatchNorm1d(12)).float()
        optimizer = lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9)  # noqa: E731
        algo = make(blockprop.split(model, K), CE, optimizer, **form)
        for _ in range(10):
            x, y = batch(count)
            algo.step(x.float(), y)
        states.append(model.state_dict())
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
