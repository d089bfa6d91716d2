"""Algorithm 2 as published, against the paper's pseudo-code in float64."""

import copy

import pytest
import torch
from torch import nn

import blockprop
from blockprop import GradientDescent
from blockprop.cache import GluingCache
from blockprop.checkpoint import load_state, save_state
from blockprop.cost import counted
from blockprop.data import batches
from blockprop.executors.replayed import ReplayedExecutor
from conftest import flat, mlp, sgd
from reference import algorithm_2_gradients

CE = nn.CrossEntropyLoss()
EXAMPLES = 13


def ce_sum(output, targets):
    return nn.functional.cross_entropy(output, targets, reduction="sum")


def data():
    return torch.randn(EXAMPLES, 6, dtype=torch.float64), torch.randint(5, (EXAMPLES,))


def make(model=None, K=4, cache=None, h_solver=None, penalty=1.0, **executor):
    cache = cache or GluingCache(EXAMPLES, dtype=torch.float64)
    return blockprop.BlockProp(
        blockprop.split(model or mlp(), K),
        CE,
        sgd(),
        form="published",
        penalty=penalty,
        h_solver=h_solver or GradientDescent(1, 0.1),
        executor=ReplayedExecutor(cache, **executor),
    )


@pytest.mark.parametrize(
    ("K", "n_h", "refresh", "sweep"), [(1, 1, 1, True), (2, 1, 1, True), (4, 1, 2, False), (4, 3, 3, True)]
)
def test_it_is_algorithm_2(K, n_h, refresh, sweep):
    """Four epochs of shuffled batches, weights and all: every h, and every weight, as the transcription has them."""
    x, y = data()
    lam, gamma = [1.0, 0.5, 2.0][: K - 1], [0.1, 0.2, 0.05][: K - 1]
    algo = make(K=K, penalty=lam, h_solver=[GradientDescent(n_h, lr) for lr in gamma], refresh=refresh, sweep=sweep)
    ours = copy.deepcopy(algo.blocks)
    stored = [torch.zeros(EXAMPLES, 12, dtype=torch.float64) for _ in range(K - 1)]
    known = torch.zeros(EXAMPLES, dtype=torch.bool)
    for epoch in range(4):
        for ids in batches(EXAMPLES, 5, seed=0, epoch=epoch):
            algo.step(x[ids], y[ids], ids)
            gradients, h = algorithm_2_gradients(
                ours, x[ids], y[ids], ce_sum, lam, gamma, n_h, [old[ids] for old in stored], known[ids],
                h_step=epoch % refresh == 0, sweep=sweep,
            )  # fmt: skip
            with torch.no_grad():
                for block, slopes in zip(ours, gradients, strict=True):
                    for parameter, slope in zip(block.parameters(), slopes, strict=True):
                        parameter -= 0.1 * slope / len(ids)
            known[ids] = True
            for old, new in zip(stored, h, strict=True):
                old[ids] = new
    for block, mine in zip(algo.blocks, ours, strict=True):
        torch.testing.assert_close(flat(block.parameters()), flat(mine.parameters()), rtol=1e-9, atol=1e-12)
    for link, old in enumerate(stored):
        entries = algo.executor.cache.read(link, torch.arange(EXAMPLES))
        torch.testing.assert_close(entries.anchor + entries.direction, old, rtol=1e-9, atol=1e-12)


def test_only_new_examples_are_filled_in_by_the_forward_pass():
    (x, y), ids = data(), torch.arange(5)
    algo = make(K=2, h_solver=GradientDescent(1, 1e-12))
    algo.step(x[:3], y[:3], ids[:3])
    before = algo.executor.cache.read(0, ids)
    h = algo.blocks[0](x[:5]).detach()
    algo.step(x[:5], y[:5], ids)
    after = algo.executor.cache.read(0, ids)
    # those there were stay where they were; the anchor is the block's output at the weights of the step
    torch.testing.assert_close(sum(after)[:3], sum(before)[:3], rtol=0, atol=1e-9)
    torch.testing.assert_close(sum(after)[3:], h[3:], rtol=0, atol=1e-9)
    torch.testing.assert_close(after.anchor, h, rtol=0, atol=1e-12)


def test_an_infrequent_h_step_skips_its_work():
    layers = [nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(4)]
    x, y, ids = torch.randn(8, 16), torch.randint(16, (8,)), torch.arange(8)
    algo = make(nn.Sequential(*layers), cache=GluingCache(8), refresh=2)
    forward = 4 * 2 * 8 * 16 * 16
    # at h_k forward and the gradient in it, then at h*_k forward and the weights' gradient; the first block stays at x
    assert counted(algo.step, x, y, ids)[1] == forward * (4 - 2 / 4)
    assert counted(algo.step, x, y, ids)[1] == forward * 2


def test_a_resumed_run_equals_the_uninterrupted_one_to_the_bit(tmp_path):
    (x, y), model = data(), mlp(dropout=lambda: nn.Dropout(0.2))

    def train(algo, epochs):
        for epoch in epochs:
            for ids in batches(EXAMPLES, 5, seed=0, epoch=epoch):
                torch.manual_seed(epoch)
                algo.step(x[ids], y[ids], ids)

    whole, half, resumed = (make(copy.deepcopy(model), refresh=2) for _ in range(3))
    train(whole, range(4))
    train(half, range(2))
    save_state(tmp_path / "state", {"model": half.blocks.model.state_dict(), "algorithm": half.state_dict()})
    saved = load_state(tmp_path / "state")
    resumed.blocks.model.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["algorithm"])
    train(resumed, range(2, 4))
    assert torch.equal(*(flat(algo.blocks.model.parameters()) for algo in (whole, resumed)))


def test_reports_tell_age_and_drift():
    (x, y), ids = data(), torch.arange(EXAMPLES)
    algo = make(refresh=3)
    reports = [algo.step(x, y, ids) for _ in range(4)]
    assert [[link.steps for link in report.links] for report in reports] == [[1] * 3, [0] * 3, [0] * 3, [1] * 3]
    assert [report.links[0].age for report in reports] == [0, 1, 2, 3]
    assert reports[0].links[0].drift == 0
    assert reports[2].links[0].drift > 0


def test_what_it_is_not_defined_for_is_refused():
    (x, y), ids = data(), torch.arange(EXAMPLES)
    with pytest.raises(ValueError, match="refresh is 0"):
        ReplayedExecutor(GluingCache(3), refresh=0)
    with pytest.raises(ValueError, match="needs the examples' numbers"):
        make().step(x, y)
    with pytest.raises(ValueError, match="plain gradient steps"):
        make(h_solver=GradientDescent(2, 0.1, momentum=0.5)).step(x, y, ids)
    exact = blockprop.BlockProp(blockprop.split(mlp(), 2), CE, sgd(), executor=ReplayedExecutor(GluingCache(EXAMPLES)))
    with pytest.raises(ValueError, match="defined for the form 'published'"):
        exact.step(x, y, ids)
