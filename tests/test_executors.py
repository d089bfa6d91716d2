"""Executors: the same numbers, and nothing half done when something fails."""

import threading

import pytest
import torch
from torch import nn

import blockprop
from blockprop import GradientDescent
from blockprop.executors import EXECUTORS, LocalExecutor, ThreadsExecutor
from conftest import batch, flat, mlp, sgd

CE = nn.CrossEntropyLoss()
BOTH = pytest.mark.parametrize("executor", list(EXECUTORS))


def make(model=None, K=3, loss=CE, optimizer=None, **settings):
    blocks = blockprop.split(model if model is not None else mlp(), K)
    return blockprop.BlockProp(blocks, loss, optimizer or sgd(), **settings)


def weights(algo):
    return flat(algo.blocks.model.parameters()).detach().clone()


@BOTH
@pytest.mark.parametrize("devices", [["cpu", "cpu"], ["cpu"], [torch.device("cpu")] * 3])
def test_devices_are_used_as_given(executor, devices):
    plain, placed = make(executor=executor), make(executor=executor, devices=devices)
    placed.blocks.model.load_state_dict(plain.blocks.model.state_dict())
    x, y = batch()
    assert plain.step(x, y).loss == placed.step(x, y).loss
    assert torch.equal(weights(plain), weights(placed))
    assert all(stage.device == torch.device("cpu") for stage in placed.stages)


@pytest.mark.parametrize(
    ("blocks", "devices", "expected"), [(4, 2, [0, 0, 1, 1]), (3, 2, [0, 0, 1]), (3, 3, [0, 1, 2])]
)
def test_fewer_devices_than_blocks_hold_consecutive_ones(blocks, devices, expected, monkeypatch):
    cut, placed = blockprop.split(mlp(), blocks), []
    monkeypatch.setattr(nn.Module, "to", lambda self, device: placed.append((self, device.index)))
    with pytest.raises(ValueError, match="form"):  # placing comes after the form is looked up, and before the rest
        blockprop.BlockProp(cut, CE, sgd(), form="", devices=[f"cuda:{i}" for i in range(devices)])
    assert placed == []
    blockprop.Backprop(cut, CE, sgd(), devices=[f"cuda:{i}" for i in range(devices)])
    assert [block for block, _ in placed] == list(cut)
    assert [index for _, index in placed] == expected


@BOTH
@pytest.mark.parametrize("form", ["exact", "published", "rescaled", "proximal"])
@pytest.mark.parametrize("K", [1, 2, 3])
def test_a_report_says_what_was_done(executor, form, K):
    solver = None if form == "exact" else GradientDescent(2, 0.05)
    algo, (x, y) = make(K=K, form=form, h_solver=solver, executor=executor), batch()
    expected = float(CE(algo.blocks(x), y).detach())
    report = algo.step(x, y)
    assert report.loss == pytest.approx(expected, rel=1e-12)
    assert report.examples == 7
    assert len(report.links) == len(report.gluing_loss) == K - 1
    assert [link.steps for link in report.links] == [1 if form == "exact" else 2] * (K - 1)
    assert report.stable
    algo.close()


@BOTH
def test_an_unstable_link_is_in_the_report(executor):
    solvers = [GradientDescent(3, 0.05), GradientDescent(3, 40.0)]
    algo = make(form="proximal", h_solver=solvers, executor=executor)
    report = algo.gradient(*batch())
    assert [link.stable for link in report.links][1] is False
    assert not report.stable
    algo.close()


@BOTH
def test_gradient_leaves_the_weights(executor):
    algo = make(executor=executor)
    before = weights(algo)
    algo.gradient(*batch())
    assert torch.equal(weights(algo), before)
    assert all(p.grad is not None for p in algo.blocks.model.parameters())
    algo.close()


class Stop(BaseException):
    """Not even an Exception, as KeyboardInterrupt is not."""


@BOTH
@pytest.mark.parametrize("failure", [Stop, KeyError, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("failing", [0, 1, 2])
def test_exceptions_pass_through_as_they_are_and_the_next_step_works(executor, failure, failing):
    armed = [False]

    class Failing(torch.optim.SGD):
        def step(self, closure=None):
            if armed[0]:
                raise failure("no")
            return super().step(closure)

    optimizers = [sgd(), sgd(), sgd()]
    optimizers[failing] = lambda params: Failing(params, lr=0.1)
    algo = make(optimizer=optimizers, executor=executor)
    algo.step(*batch())
    armed[0] = True
    with pytest.raises(failure, match="no"):
        algo.step(*batch())
    armed[0] = False
    assert all(p.grad is None for p in algo.blocks.model.parameters())
    twin = make()
    twin.blocks.model.load_state_dict(algo.blocks.model.state_dict())
    x, y = batch()
    algo.step(x, y)
    twin.step(x, y)
    torch.testing.assert_close(weights(algo), weights(twin), rtol=1e-12, atol=1e-14)
    algo.close()


@BOTH
@pytest.mark.parametrize("form", ["exact", "published", "rescaled", "proximal"])
@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_a_loss_that_is_not_finite_leaves_the_weights(executor, form, K, bad):
    algo = make(K=K, form=form, executor=executor, loss=lambda a, b: nn.functional.cross_entropy(a, b) * float(bad))
    before = weights(algo)
    with pytest.raises(ValueError, match=f"the loss is {bad}") as caught:
        algo.step(*batch())
    assert "\n" not in str(caught.value)
    assert torch.equal(weights(algo), before)
    assert all(p.grad is None for p in algo.blocks.model.parameters())
    algo.close()


@BOTH
def test_a_failed_step_leaves_what_was_accumulated_before(executor):
    x, y = batch(8)
    algo, twin = make(executor=executor, accumulate=2), make(accumulate=2)
    twin.blocks.model.load_state_dict(algo.blocks.model.state_dict())
    for one in (algo, twin):
        one.step(x[:4], y[:4])
        if one is algo:
            with pytest.raises(ValueError, match="labels"):
                one.step(x, y + 5)
        one.step(x[4:], y[4:])
    torch.testing.assert_close(weights(algo), weights(twin))
    algo.close()


@BOTH
def test_shapes_that_do_not_fit_name_the_block(executor):
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    algo = make(model, executor=executor)
    before = weights(algo)
    with pytest.raises(ValueError, match=r"block 2 failed on an input of shape \[7, 8\]") as caught:
        algo.step(*batch())
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"block 1 failed on an input of shape \[7, 3\]"):
        algo.step(*batch(inputs=3))
    with pytest.raises(ValueError, match=r"block 1 .* torch.float32"):
        algo.step(batch()[0].float(), batch()[1])
    assert torch.equal(weights(algo), before)
    algo.close()


def test_backprop_names_the_block_as_well():
    algo = blockprop.Backprop(blockprop.split(mlp(), 3), CE, sgd())
    with pytest.raises(ValueError, match="block 1"):
        algo.step(*batch(inputs=3))


def test_an_error_without_a_message_names_the_block():
    class Unfinished(nn.Module):
        def forward(self, x):
            raise NotImplementedError

    with pytest.raises(ValueError, match="block 1"):
        make(nn.Sequential(nn.Linear(6, 5).double(), Unfinished()), K=1).step(*batch())


def test_w_steps_run_in_threads_of_their_own_and_end_when_closed():
    seen = []

    class Spy(torch.optim.SGD):
        def step(self, closure=None):
            seen.append(threading.current_thread())
            return super().step(closure)

    algo = make(optimizer=lambda params: Spy(params, lr=0.1), executor="threads")
    algo.step(*batch())
    assert len(seen) == 3
    assert all(thread is not threading.main_thread() for thread in seen)
    assert any(thread.is_alive() for thread in seen)
    algo.close()
    assert not any(thread.is_alive() for thread in seen)
    algo.step(*batch())  # it can be used again
    algo.close()
    algo.close()


def test_the_w_steps_really_overlap():
    """Two W-steps that wait for each other: in turn, they would wait for ever."""
    meeting = threading.Barrier(3, timeout=20)

    class Meeting(torch.optim.SGD):
        def step(self, closure=None):
            meeting.wait()
            return super().step(closure)

    algo = make(optimizer=lambda params: Meeting(params, lr=0.1), executor="threads")
    algo.step(*batch())
    algo.close()


def test_one_executor_may_serve_networks_of_any_depth():
    executor = ThreadsExecutor()
    for K in (2, 4, 3):
        assert make(K=K, executor=executor).step(*batch()).examples == 7
    executor.close()


def test_executors_by_name():
    assert {"local": LocalExecutor, "threads": ThreadsExecutor} == EXECUTORS
    own = LocalExecutor()
    assert make(executor=own).executor is own


@BOTH
def test_recomputation_keeps_no_graph_of_the_lower_blocks(executor):
    """Of the forward pass, only the boundaries: counted by what autograd saves."""
    saved = []

    class Saving(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            saved.append("backward")
            return g

    class Layer(nn.Module):
        def forward(self, x):
            saved.append(("forward", torch.is_grad_enabled()))
            return Saving.apply(x)

    model = mlp(depth=3, spy=Layer)
    algo = make(model, executor=executor, recompute=True)
    algo.step(*batch())
    forwards = [entry for entry in saved if entry != "backward"]
    assert forwards[:2] == [("forward", False)] * 2
    assert forwards.count(("forward", True)) == 2  # each rebuilt once
    algo.close()


def test_a_reports_repr_is_a_short_line():
    algo = make()
    report = algo.step(*batch())
    first, second = report.gluing_loss
    shown = f"StepReport(loss {report.loss:.4g}, 7 examples, gluing loss [{first:.3g}, {second:.3g}])"
    assert repr(report) == shown
    assert "unstable" in repr(make(form="proximal", h_solver=GradientDescent(4, 1e3)).step(*batch()))
