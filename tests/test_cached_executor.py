"""Cached targets: the exact form where they are fresh, and nothing but weight gradients where they are not."""

import copy
import itertools

import pytest
import torch
from torch import nn

import blockprop
from blockprop.cache import GluingCache
from blockprop.checkpoint import load_state, save_state
from blockprop.cost import counted
from blockprop.curvature import Constant, Secant
from blockprop.data import batches
from blockprop.executors.cached import CachedExecutor
from conftest import flat, gradients, mlp, sgd

CE = nn.CrossEntropyLoss()
EXAMPLES = 23


def data(examples: int = EXAMPLES):
    return torch.randn(examples, 6, dtype=torch.float64), torch.randint(5, (examples,))


def make(model=None, K=3, cache=None, optimizer=None, loss=CE, **executor) -> blockprop.BlockProp:
    model = model or mlp()
    cache = cache or GluingCache(EXAMPLES, dtype=torch.float64)
    return blockprop.BlockProp(
        blockprop.split(model, K, by="layers"), loss, optimizer or sgd(), executor=CachedExecutor(cache, **executor)
    )


def train(algo, x, y, epochs, first=0):
    """Reports of shuffled epochs in batches of 5, the last of 3."""
    return [
        algo.step(x[ids], y[ids], ids)
        for epoch in range(first, first + epochs)
        for ids in batches(len(x), 5, seed=0, epoch=epoch)
    ]


def momentum(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def weights(algo):
    return flat(parameter.detach() for parameter in algo.blocks.model.parameters())


@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize("recompute", [False, True])
def test_refreshed_at_every_visit_it_is_the_exact_form_to_the_bit(K, recompute):
    (x, y), model = data(), mlp(dropout=lambda: nn.Dropout(0.3), norm=lambda: nn.BatchNorm1d(12))
    made = []
    for executor in ("local", CachedExecutor(GluingCache(EXAMPLES), refresh=1)):
        torch.manual_seed(1)
        algo = blockprop.BlockProp(
            blockprop.split(copy.deepcopy(model), K, by="layers"), CE, sgd(), executor=executor, recompute=recompute
        )
        made.append((train(algo, x, y, 2), weights(algo), [*algo.blocks.model.buffers()]))
    (reports, w, buffers), (ours, our_w, our_buffers) = made
    assert torch.equal(w, our_w)
    assert all(torch.equal(one, other) for one, other in zip(buffers, our_buffers, strict=True))
    assert [report.loss for report in reports] == [report.loss for report in ours]
    assert [report.gluing_loss for report in reports] == [report.gluing_loss for report in ours]


@pytest.mark.parametrize("refresh", [1, 2, 4])
def test_every_e_th_visit_is_refreshed(refresh):
    x, y = data()
    algo = make(refresh=refresh, curvature=Constant(0.1))
    for epoch in range(5):
        reports = train(algo, x, y, 1, first=epoch)
        steps = 0 if epoch % refresh else 1
        assert {link.steps for report in reports for link in report.links} == {steps}
        assert {link.age for report in reports for link in report.links} == {epoch % refresh}
        assert all((link.drift > 0) == (steps == 0) for report in reports for link in report.links)
        assert {link.curvature for report in reports for link in report.links} == {0.0 if steps else 0.1}
        assert all(len(report.links) == 2 and report.examples for report in reports)


@pytest.mark.parametrize("along", [False, True])
def test_cached_gradients_are_those_of_the_definition(along):
    """In other batches than those that filled the cache: block k has ⟨g, b⟩ + κ/2 ‖b - old‖², per example."""
    x, y = data()
    kappa = [0.3, 0.7]
    loss = nn.CrossEntropyLoss(weight=torch.rand(5, dtype=torch.float64) + 0.5)
    algo = make(curvature=Constant(kappa), along=along, loss=loss)
    stored = [torch.zeros(EXAMPLES, 12, dtype=torch.float64) for _ in range(4)]
    for ids in batches(EXAMPLES, 5, seed=0, epoch=0):
        outputs = [x[ids]]
        for block in algo.blocks:
            outputs.append(block(outputs[-1]))
        total = nn.functional.cross_entropy(outputs[-1], y[ids], weight=loss.weight, reduction="sum")
        slopes = torch.autograd.grad(total, outputs[1:-1])
        for link in (0, 1):
            stored[2 * link][ids], stored[2 * link + 1][ids] = outputs[1 + link].detach(), slopes[link]
        algo.step(x[ids], y[ids], ids)
    ids = torch.tensor([3, 22, 7])
    algo.executor.step(algo.stages, x[ids], y[ids], ids=ids, update=False)
    found = gradients(algo)
    h = x[ids]
    for k, block in enumerate(algo.blocks):
        output = block(h.detach())
        if k < 2:
            old, g = stored[2 * k][ids], stored[2 * k + 1][ids]
            moved = output - old
            # along the slope alone: ⟨g, moved⟩² / ‖g‖²
            square = (g * moved).sum(1).square() / g.square().sum(1) if along else moved.square()
            term = (g * output).sum() + kappa[k] / 2 * square.sum()
        else:
            term = nn.functional.cross_entropy(output, y[ids], weight=loss.weight, reduction="sum")
        expected = torch.autograd.grad(term / loss.weight[y[ids]].sum(), list(block.parameters()))
        torch.testing.assert_close(flat(found[k]), flat(expected), rtol=1e-9, atol=1e-12)
        h = output
    assert (algo.executor.cache.visits(ids) == 0).all()  # asking for a gradient leaves the cache alone


@pytest.mark.parametrize("refreshed", [True, False])
def test_an_infrequent_h_step_skips_its_work(refreshed):
    layers = [nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(4)]
    x, y, ids = torch.randn(8, 16), torch.randint(16, (8,)), torch.arange(8)
    algo = make(nn.Sequential(*layers), K=4, cache=GluingCache(8), refresh=1 if refreshed else 2, curvature=Constant(1))
    algo.step(x, y, ids)
    _, flops = counted(algo.step, x, y, ids)
    forward = 4 * 2 * 8 * 16 * 16
    # forward and weight gradients; and, if refreshed, those in the inputs of all blocks but the first
    assert flops == forward * (2.75 if refreshed else 2)


def test_a_batch_with_one_new_example_is_refreshed():
    x, y = data()
    algo = make(refresh=4, curvature=Constant(0.1))
    algo.step(x[:4], y[:4], torch.arange(4))
    assert algo.step(x[:4], y[:4], torch.arange(4)).links[0].steps == 0
    assert algo.step(x[2:6], y[2:6], torch.arange(2, 6)).links[0].steps == 1
    assert algo.executor.cache.visits(torch.arange(7)).tolist() == [[1, 1, 0, 0, 0, 0, -1]] * 2


def test_the_residual_asks_for_a_refresh_when_the_block_has_moved_too_far():
    (x, y), ids = data(), torch.arange(5)
    taken = {}
    for residual in (None, 1e-9, 1e9):
        torch.manual_seed(0)
        algo = make(refresh=10, curvature=Constant(1.0), residual=residual)
        taken[residual] = [algo.step(x[ids], y[ids], ids).links[0].steps for _ in range(4)]
    assert taken == {None: [1, 0, 0, 0], 1e9: [1, 0, 0, 0], 1e-9: [1, 1, 1, 1]}


@pytest.mark.parametrize("along", [False, True])
def test_the_secant_is_measured_at_refreshes_from_what_is_there(along):
    """Only the lower block moves, so that the secant is that of the loss above."""
    (x, y), ids = data(), torch.arange(EXAMPLES)
    model = mlp()
    curvature = Secant(every=1)
    sizes = iter([0.1, 0.0])  # of the lower block, of the upper one
    algo = make(
        model, K=2, curvature=curvature, along=along, optimizer=lambda params: torch.optim.SGD(params, lr=next(sizes))
    )
    outputs = []
    for _ in range(2):
        outputs.append(algo.blocks[0](x).detach().requires_grad_())
        algo.step(x, y, ids)
    slopes = [
        torch.autograd.grad(nn.functional.cross_entropy(algo.blocks[1](h), y, reduction="sum"), h)[0] for h in outputs
    ]
    way = (outputs[1] - outputs[0]).detach()
    if along:
        unit = slopes[0] / slopes[0].norm(dim=1, keepdim=True)
        way = (way * unit).sum(1, keepdim=True) * unit
    expected = float(((slopes[1] - slopes[0]) * way).sum() / way.square().sum())
    assert expected > 0
    assert curvature.at(0, slopes[1]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_a_resumed_run_equals_the_uninterrupted_one_to_the_bit(tmp_path, mapped, dtype):
    (x, y), model = data(), mlp()

    def fresh(name):
        cache = GluingCache(EXAMPLES, path=tmp_path / name if mapped else None, dtype=dtype)
        return make(copy.deepcopy(model), cache=cache, optimizer=momentum, refresh=3, curvature=Secant(every=4))

    whole, half = fresh("whole"), fresh("half")
    train(whole, x, y, 5)
    train(half, x, y, 2)
    state = {"model": half.blocks.model.state_dict(), "algorithm": half.state_dict()}
    save_state(tmp_path / "state.safetensors", state)
    train(half, x, y, 1)  # what came after the checkpoint is lost
    resumed, saved = fresh("resumed"), load_state(tmp_path / "state.safetensors")
    resumed.blocks.model.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["algorithm"])
    train(resumed, x, y, 3, first=2)
    assert torch.equal(weights(whole), weights(resumed))
    assert whole.executor.curvature == resumed.executor.curvature
    assert torch.equal(*(a.executor.cache.visits(torch.arange(EXAMPLES)) for a in (whole, resumed)))


def test_the_same_weights_whether_mapped_or_in_memory(tmp_path):
    (x, y), model = data(), mlp()
    made = []
    for path in (None, tmp_path):
        algo = make(copy.deepcopy(model), cache=GluingCache(EXAMPLES, path=path, dtype=torch.int8))
        train(algo, x, y, 4)
        made.append(weights(algo))
    assert torch.equal(*made)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 0.01), (torch.int8, 0.02)])
def test_a_coarser_dtype_gives_nearly_the_same_gradients(dtype, bound):
    (x, y), model, ids = data(), mlp(), torch.arange(EXAMPLES)
    found = []
    for of in (torch.float64, dtype):
        algo = make(copy.deepcopy(model), cache=GluingCache(EXAMPLES, dtype=of), curvature=Constant(0.1))
        algo.step(x, y, ids)
        algo.executor.step(algo.stages, x, y, ids=ids, update=False)
        found.append(gradients(algo))
    for ours, exact in zip(found[1], found[0], strict=True):
        assert (flat(ours) - flat(exact)).norm() < bound * flat(exact).norm()


def test_accumulated_steps_and_language_models():
    """Tokens are the predictions: the slope of an example is the sum over its own."""
    model = nn.Sequential(nn.Embedding(7, 8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 7))
    tokens = torch.randint(7, (EXAMPLES, 5))
    algo = make(model, K=2, cache=GluingCache(EXAMPLES), curvature=Constant(0.1), optimizer=sgd(0.5))
    algo.wsteps[0].accumulate = algo.wsteps[1].accumulate = 2
    reports = train(algo, tokens, tokens, 6)
    assert reports[-1].loss < reports[0].loss
    assert algo.executor.cache.shapes == [(5, 8)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"refresh": 0}, "refresh is 0; expected a whole number of visits"),
        ({"refresh": True}, "refresh is True"),
        ({"residual": -1.0}, "residual is -1.0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        CachedExecutor(GluingCache(3), **settings)


def test_bad_steps_are_refused_and_leave_the_cache_alone():
    (x, y), ids = data(), torch.arange(EXAMPLES)
    algo = make()
    with pytest.raises(ValueError, match="needs the examples' numbers"):
        algo.step(x, y)
    with pytest.raises(ValueError, match="expected numbers from 0 to 22"):
        algo.step(x, y, ids + 1)
    with pytest.raises(ValueError, match="the cache needs"):
        make(cache=GluingCache(EXAMPLES, limit=10)).step(x, y, ids)
    with torch.no_grad():
        algo.blocks.model[-1].bias.fill_(float("inf"))
    with pytest.raises(ValueError, match="diverged"):
        algo.step(x, y, ids)
    assert (algo.executor.cache.visits(ids) == -1).all()
    published = blockprop.BlockProp(
        blockprop.split(mlp(), 2), CE, sgd(), form="published", executor=CachedExecutor(GluingCache(EXAMPLES))
    )
    with pytest.raises(ValueError, match="defined for the form 'exact'"):
        published.step(x, y, ids)


def test_batches_of_any_sizes_and_orders(tmp_path):
    (x, y), algo = data(), make(refresh=2, curvature=Constant(0.05))
    sizes = itertools.cycle([1, 7, 3])
    for _ in range(20):
        ids = torch.randperm(EXAMPLES)[: next(sizes)]
        report = algo.step(x[ids], y[ids], ids)
        assert all(link.age in (0, 1) for link in report.links)
