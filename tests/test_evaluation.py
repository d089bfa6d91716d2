"""An evaluation is one fixed function: same masks, same buffers, and one mark left behind."""

import threading

import pytest
import torch
from torch import nn

import blockprop
from blockprop.evaluation import Evaluation


def noisy():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))


def buffers_of(block):
    return {name: buffer.clone() for name, buffer in block.named_buffers()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_repetition_draws_the_same_masks():
    block, x = noisy(), torch.randn(6, 4)
    evaluation = Evaluation(block, x)
    torch.rand(17)  # the generator moves on in between
    assert torch.equal(evaluation(x), evaluation.output)
    assert torch.equal(evaluation(x), evaluation.output)
    assert not torch.equal(block(x), evaluation.output)  # a fresh mask is another one


def test_what_the_block_gives_now_for_the_same_input():
    """At the present weights, with the masks and buffers of then; the evaluation itself is still of then."""
    block, x = noisy(), torch.randn(6, 4)
    weights = {name: p.detach().clone().requires_grad_() for name, p in block.named_parameters()}
    evaluation = Evaluation(block, x, weights=weights)
    then = evaluation.output.detach().clone()
    assert torch.equal(evaluation.moved(), then)
    with torch.no_grad():
        block[3].bias += 1
    torch.testing.assert_close(evaluation.moved(), then + 1)
    assert not evaluation.moved().requires_grad
    assert torch.equal(evaluation(x), then)


def test_generator_and_buffers_move_once():
    block, x = noisy(), torch.randn(6, 4)
    twin = noisy()
    torch.manual_seed(5)
    twin(x)
    state, buffers = torch.get_rng_state(), buffers_of(twin)
    torch.manual_seed(5)
    evaluation = Evaluation(block, x)
    for _ in range(3):
        evaluation(x + 1)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(buffers_of(block), buffers)
    assert block[1].num_batches_tracked == 1


def test_buffers_that_the_output_depends_on_are_those_of_the_first_evaluation():
    """A power iteration in the forward pass (spectral norm), and a buffer that counts."""

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return x * self.calls

    block = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), Counting())
    x = torch.randn(3, 4)
    evaluation = Evaluation(block, x)
    after = buffers_of(block)
    assert after["1.calls"] == 1
    for _ in range(2):
        assert torch.equal(evaluation(x), evaluation.output)
    assert same(buffers_of(block), after)
    assert not torch.equal(Evaluation(block, x).output, evaluation.output)  # the next batch is another function


def test_gradients_flow_through_a_repetition():
    block, x = noisy(), torch.randn(6, 4)
    evaluation = Evaluation(block, x)
    (expected,) = torch.autograd.grad(evaluation.output.square().sum(), evaluation.input)
    leaf = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(evaluation(leaf).square().sum(), leaf)
    assert torch.equal(found, expected)
    weights = torch.autograd.grad(evaluation(x).square().sum(), list(block.parameters()))
    assert all(gradient.shape == p.shape for gradient, p in zip(weights, block.parameters(), strict=True))


def test_the_graph_rebuilt_is_the_graph():
    results = []
    for keep in (True, False):
        torch.manual_seed(4)
        evaluation = Evaluation(noisy(), torch.linspace(-1, 1, 24).view(6, 4), keep_graph=keep)
        assert evaluation.output.requires_grad == keep
        torch.rand(3)
        rebuilt = evaluation.with_graph()
        assert rebuilt is evaluation
        results.append((evaluation.output, *torch.autograd.grad(evaluation.output.sum(), evaluation.input)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_the_input_is_cut_from_its_graph():
    x = torch.randn(2, 4, requires_grad=True)
    evaluation = Evaluation(nn.Linear(4, 3), x * 2)
    assert evaluation.input.is_leaf
    (evaluation.output.sum()).backward()
    assert x.grad is None
    assert Evaluation(nn.Linear(4, 3), x, differentiable=False).input.requires_grad is False


def test_evaluation_mode_and_blocks_without_chance_need_no_replay():
    block = noisy().eval()
    x = torch.randn(2, 4)
    before = buffers_of(block)
    evaluation = Evaluation(block, x)
    assert torch.equal(evaluation(x), block(x))
    assert same(buffers_of(block), before)
    assert not evaluation.coupled
    assert Evaluation(noisy(), x).coupled
    assert not Evaluation(nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)), x).coupled


def test_an_evaluation_not_made_for_it_refuses_to_be_repeated():
    with pytest.raises(AssertionError, match="repeatable"):
        Evaluation(noisy(), torch.randn(2, 4), repeatable=False)(torch.randn(2, 4))


def test_autocast_is_the_same_in_repetitions():
    x = torch.randn(3, 4)
    evaluation = Evaluation(nn.Linear(4, 3), x, precision=torch.bfloat16)
    assert evaluation.output.dtype == torch.bfloat16
    assert torch.equal(evaluation(x), evaluation.output)


def test_an_exception_leaves_the_generator_as_it_was():
    evaluation, misfit = Evaluation(noisy(), torch.randn(2, 4)), torch.randn(2, 5)
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError):
        evaluation(misfit)
    assert torch.equal(torch.get_rng_state(), state)
    evaluation(torch.randn(2, 4))  # and the lock is free


def test_threads_that_replay_at_a_time_do_not_mix_their_masks():
    x = torch.ones(64, 256)
    evaluations = [Evaluation(nn.Sequential(nn.Dropout(p), nn.Dropout(0.1)), x) for p in (0.1, 0.3, 0.5, 0.7)]
    state, wrong, begin = torch.get_rng_state(), [], threading.Barrier(4)

    def repeat(evaluation):
        begin.wait()
        wrong.extend(i for i in range(40) if not torch.equal(evaluation(x), evaluation.output))

    threads = [threading.Thread(target=repeat, args=(evaluation,)) for evaluation in evaluations]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("form", ["exact", "published", "proximal"])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_block_that_begins_in_place_is_as_good_as_one_that_does_not(form, recompute):
    def step(inplace):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Dropout(0.3, inplace=inplace),
            nn.Linear(4, 8),
            nn.Sequential(nn.ELU(inplace=inplace), nn.Linear(8, 8)),
            nn.ELU(inplace=inplace),
            nn.Linear(8, 3),
        )
        algo = blockprop.BlockProp(
            blockprop.split(model, at=["2", "3"]),
            nn.CrossEntropyLoss(),
            lambda p: torch.optim.SGD(p, 0.1),
            form=form,
            recompute=recompute,
        )
        x, y = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
        before = x.clone()
        algo.step(x, y)
        assert torch.equal(x, before), "the data are the user's"
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    torch.testing.assert_close(step(True), step(False))  # ELU differentiates its output where it works in place


class Overwriting(nn.Module):
    def forward(self, x):
        return x.tanh_()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("first", [Overwriting(), nn.Sequential(nn.Flatten(), nn.ReLU(inplace=True))])
def test_a_block_that_overwrites_its_input_unseen_is_named(first, recompute):
    model = nn.Sequential(nn.Linear(4, 8), first, nn.Linear(8, 3))
    algo = blockprop.BlockProp(
        blockprop.split(model, at=["1"]), nn.CrossEntropyLoss(), lambda p: torch.optim.SGD(p, 0.1), recompute=recompute
    )
    with pytest.raises(ValueError, match=r"^block 2 works in place on its input.*inplace=False$"):
        algo.step(torch.randn(6, 4), torch.zeros(6, dtype=torch.long))
