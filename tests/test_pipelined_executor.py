"""The pipeline simulated tick by tick, against the exact form, a literal simulation, and itself resumed."""

import copy
import itertools
import math
from collections import Counter
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import blockprop
from blockprop.cache import GluingCache
from blockprop.checkpoint import load_state, save_state
from blockprop.correction import Correction
from blockprop.curvature import Constant, PerExample, Secant
from blockprop.executors import PipelinedExecutor
from blockprop.executors.mail import LocalMail
from blockprop.held import Held
from blockprop.latestage import LateStage
from blockprop.objective import TargetTerm
from blockprop.proximal import proximal_sgd
from blockprop.schedules import Action, Latency, parallel, pipelined, sequential
from conftest import batch, flat, mlp, sgd

CE = nn.CrossEntropyLoss()


def network():
    torch.manual_seed(1)
    return mlp(depth=4, drop=lambda: nn.Dropout(0.2), norm=lambda: nn.BatchNorm1d(12))


def trainer(executor, K=3, model=None, lr=0.1):
    return blockprop.BlockProp(blockprop.split(model or network(), K), CE, sgd(lr), executor=executor)


def data(count=12, n=8):
    torch.manual_seed(2)
    return [batch(n) for _ in range(count)]


def trained(executor, K=3, model=None):
    algo = trainer(executor, K, model)
    torch.manual_seed(3)
    reports = [algo.step(x, y) for x, y in data()]
    algo.finish()
    return algo, reports, flat(algo.blocks.model.parameters())


def forwards_last(blocks):
    """The pipeline in three microbatches, with a block's forward always after its late backward."""
    for tick in pipelined(blocks, microbatches=3):
        own = [[action for action in tick if action.block == k] for k in range(1, blocks + 1)]
        for k, actions in enumerate(own, 1):
            actions.sort(key=lambda action: action.kind == "forward" and k < blocks)
        yield tuple(itertools.chain.from_iterable(own))


@pytest.mark.parametrize(
    "more",
    [{}, {"reuse": True}, {"curvature": Constant(0.3)}, {"curvature": Constant(0.3), "prediction": 1.0}],
    ids=str,
)
def test_the_numbers_do_not_depend_on_whether_a_block_forwards_first_where_no_update_is_due(more):
    assert list(itertools.islice(forwards_last(3), 9)) != list(itertools.islice(pipelined(3, microbatches=3), 9))
    # whoever measures κ draws dropout masks of his own, then and in another order
    model = network() if more else mlp(depth=4, norm=lambda: nn.BatchNorm1d(12))
    given = partial(pipelined, microbatches=3)
    (first, _, weights), (last, _, others) = (
        trained(PipelinedExecutor(schedule, microbatches=3, **more), model=copy.deepcopy(model))
        for schedule in (given, forwards_last)
    )
    assert torch.equal(weights, others)
    assert torch.equal(flat(first.blocks.model.buffers()), flat(last.blocks.model.buffers()))


@pytest.mark.parametrize("along", [False, True])
@pytest.mark.parametrize("curvature", [Constant(0), Constant(0.3), Constant([0.1, 2.0]), Secant(2)])
def test_without_delay_every_feedback_is_the_exact_form(curvature, along):
    _, reports, weights = trained(PipelinedExecutor(sequential, curvature=curvature, along=along))
    _, expected, reference = trained("local")
    assert torch.equal(weights, reference)
    assert [report.loss for report in reports] == [report.loss for report in expected]
    assert all([link.age for link in report.links] == [5, 3] for report in reports)
    assert all(link.drift == 0 for report in reports for link in report.links)


@pytest.mark.parametrize(
    "corrections",
    [
        {"reuse": True},
        {"reuse": True, "compensation": 0.5},
        {"prediction": 1.0},
        {"curvature": PerExample(Secant(2)), "along": True, "across": PerExample(Secant(2))},
        {"curvature": Constant(0.3), "trust": 0.0},
        {"curvature": Constant(0.3), "trust": math.inf},
    ],
    ids="-".join,
)
def test_without_delay_every_correction_leaves_the_exact_form(corrections):
    _, reports, weights = trained(PipelinedExecutor(sequential, **corrections))
    _, expected, reference = trained("local")
    assert torch.equal(weights, reference)
    assert [report.loss for report in reports] == [report.loss for report in expected]


def test_one_block_is_backprop():
    _, _, weights = trained(PipelinedExecutor(microbatches=1), K=1)
    _, _, reference = trained("local", K=1)
    assert torch.equal(weights, reference)


def literal(model, K, kappa, steps, lr=0.1, along=False):
    """The lock-step pipeline, batch by batch and block by block, from the definition of its delay."""
    blocks = list(blockprop.split(model, K))
    inputs, outputs, slopes = {}, {}, {}
    examples = data(steps)
    for tick in range(steps + 2 * K):
        pending = []
        for k in range(1, K + 1):
            new = tick - (k - 1)
            old = tick - (2 * K - 1 - k)
            if k == K:
                old = new
            if k < K and 0 <= old < steps:
                pending.append(learn(blocks, k, old, K, inputs, outputs, slopes, examples, kappa, lr, along))
            if 0 <= new < steps:
                h = examples[new][0] if k == 1 else outputs[k - 1, new]
                inputs[k, new] = h
                with torch.no_grad():
                    outputs[k, new] = blocks[k - 1](h)
                if k == K:
                    pending.append(learn(blocks, k, new, K, inputs, outputs, slopes, examples, kappa, lr, along))
        for key, slope in pending:
            slopes[key] = slope


def learn(blocks, k, number, K, inputs, outputs, slopes, examples, kappa, lr, along):
    h = inputs[k, number].detach().requires_grad_()
    out = blocks[k - 1](h)
    if k == K:
        start, slope = CE(out, examples[number][1]), None
    else:
        moved = (out - outputs[k, number]).detach()
        if along:
            unit = slopes[k, number] / slopes[k, number].norm(dim=1, keepdim=True)
            moved = unit * (unit * moved).sum(1, keepdim=True)
        start, slope = out, slopes[k, number] + kappa / len(out) * moved
    parameters = list(blocks[k - 1].parameters())
    down, *gradients = torch.autograd.grad(start, [h, *parameters], slope)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter -= lr * gradient
    return (k - 1, number), down


@pytest.mark.parametrize(("kappa", "along"), [(0.0, False), (0.7, False), (0.7, True)])
@pytest.mark.parametrize("K", [2, 4])
def test_lock_step_is_the_literal_simulation(K, kappa, along):
    torch.manual_seed(1)
    ours, theirs = mlp(depth=4), mlp(depth=4)
    theirs.load_state_dict(ours.state_dict())
    literal(theirs, K, kappa, 12, along=along)
    _, _, weights = trained(PipelinedExecutor(curvature=Constant(kappa), along=along), K, ours)
    torch.testing.assert_close(weights, flat(theirs.parameters()), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "settings", [{}, {"microbatches": 3}, {"latency": Latency(5, 0.2, 1)}, {"curvature": Constant(0.5)}]
)
def test_every_run_gives_the_same_numbers(settings):
    assert torch.equal(trained(PipelinedExecutor(**settings))[2], trained(PipelinedExecutor(**settings))[2])


def nothing_is_on_its_way(executor):
    state = executor.state_dict()
    flights = [flight for late in state["lates"] for flight in late["flights"]]
    return not (state["parts"] or flights or state["mail"]["outputs"] or state["mail"]["feedback"])


def test_all_is_learnt_once_the_pipeline_has_run_empty():
    executor = PipelinedExecutor(microbatches=2)
    algo, _, _ = trained(executor)
    assert [wstep.calls for wstep in algo.wsteps] == [12, 12, 12]
    assert nothing_is_on_its_way(executor)


def test_microbatches_of_a_frozen_network_add_up_to_the_batch():
    """With a step size of zero nothing is stale: the parts' gradients are the batch's."""
    model = mlp(depth=4)
    (x, y) = batch(10)
    seen = []
    algo = trainer(PipelinedExecutor(microbatches=4), 3, model, lr=0.0)
    for wstep in algo.wsteps:
        wstep.optimizer.register_step_pre_hook(
            lambda optimizer, *_: seen.append(flat(p.grad for g in optimizer.param_groups for p in g["params"]))
        )
    algo.step(x, y)
    algo.finish()
    reference = blockprop.Backprop(blockprop.split(model, 3), CE, sgd())
    reference.gradient(x, y)
    expected = [flat(p.grad for p in wstep.parameters) for wstep in reference.wsteps]
    assert len(seen) == 3
    for found in seen:
        assert any(found.shape == one.shape and torch.allclose(found, one, rtol=1e-9) for one in expected)


class Shifted(nn.Module):
    """Of one example the gradients in the input and in the weight are one tensor."""

    def __init__(self):
        super().__init__()
        self.by = nn.Parameter(torch.zeros(1, 12))

    def forward(self, x):
        return x + self.by


def test_feedback_on_its_way_is_no_part_of_a_sum_of_gradients():
    model = nn.Sequential(nn.Linear(6, 12), Shifted(), nn.Linear(12, 4)).double()
    x, y = torch.randn(5, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])
    executor = PipelinedExecutor(microbatches=5, latency=Latency(3, seed=1))
    algo = blockprop.BlockProp(blockprop.split(model, 3, by="layers"), CE, sgd(0.0), executor=executor)
    seen = []
    algo.wsteps[0].optimizer.register_step_pre_hook(lambda *_: seen.append(model[0].weight.grad.clone()))
    algo.step(x, y)
    algo.finish()
    (expected,) = torch.autograd.grad(CE(model(x), y), [model[0].weight])
    torch.testing.assert_close(seen, [expected])


def test_a_batch_smaller_than_its_parts():
    algo = trainer(PipelinedExecutor(microbatches=4), 2, mlp(depth=4))
    for n in (8, 3, 1, 8):
        algo.step(*batch(n))
    algo.finish()
    assert [wstep.calls for wstep in algo.wsteps] == [4, 4]


def test_inputs_are_as_old_as_their_way_was_long():
    _, reports, _ = trained(PipelinedExecutor())
    assert [link.input_age for link in reports[-1].links] == [1, 1]
    latency = Latency(3, seed=5, chances=(0, 0, 0, 1))
    algo = trainer(PipelinedExecutor(latency=latency))
    found = [algo.step(x, y) for x, y in data() * 2]
    assert [link.input_age for link in found[-1].links] == [4, 4]
    assert len(algo.executor._forwards) <= 3 * 16  # of what is on its way alone


def test_with_stashed_weights_nobody_knows_the_drift():
    _, reports, _ = trained(PipelinedExecutor(reuse=True))
    assert all(math.isnan(link.drift) and link.age for link in reports[-1].links)


def test_of_another_schedule_a_block_is_moved_on_by_the_updates_it_will_make():
    """Prediction with the default schedule, given as one of the user's own."""
    _, _, weights = trained(PipelinedExecutor(pipelined, prediction=1.0))
    _, _, expected = trained(PipelinedExecutor(prediction=1.0))
    assert torch.equal(weights, expected)
    slow = PipelinedExecutor(lambda blocks: pipelined(blocks, latency=Latency(8, chances=(0,) * 8 + (1,))))
    assert [slow._updates(4, k) for k in (1, 2, 3, 4)] == [53, 35, 17, 0]


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: PipelinedExecutor(parallel), "expected CachedExecutor"),
        (lambda: PipelinedExecutor(pipelined, latency=Latency(2)), "has its own latency"),
        (lambda: PipelinedExecutor(cache=lambda: GluingCache(8), along=False), "expected along=True"),
        (lambda: PipelinedExecutor(cache=lambda: GluingCache(8), correction=Correction()), "expected along=True"),
    ],
)
def test_what_does_not_go_together_is_refused(made, message):
    with pytest.raises(ValueError, match=message):
        made()


@pytest.mark.parametrize("values", [[0.1], [], [0.1, 0.2, 0.3]])
def test_a_curvature_for_another_number_of_links_is_refused_before_training(values):
    algo = trainer(PipelinedExecutor(curvature=Constant(values)))
    with pytest.raises(ValueError, match=f"curvature has {len(values)} values for 2 links"):
        algo.step(*batch(8))


def test_reports_of_age_drift_and_curvature():
    _, reports, _ = trained(PipelinedExecutor(curvature=Constant([0.1, 0.2])))
    assert math.isnan(reports[0].loss)
    assert reports[0].links == []
    assert math.isfinite(reports[5].loss)
    assert [link.age for link in reports[-1].links] == [4, 2]
    assert all(link.drift > 0 for link in reports[-1].links)
    assert [link.curvature for link in reports[-1].links] == [0.1, 0.2]


@pytest.mark.parametrize(("trust", "limited"), [(0.0, 1), (1e6, 0), (math.inf, 0)])
def test_reports_of_how_many_corrections_are_cut(trust, limited):
    """All where nothing is trusted; none on a microbatch under which the block has not moved."""
    executor = PipelinedExecutor(curvature=Constant(2.0), trust=trust, microbatches=1)
    _, reports, _ = trained(executor)
    assert [link.limited for link in reports[-1].links] == [limited, limited]
    _, reports, _ = trained(PipelinedExecutor(curvature=Constant(2.0), trust=trust, microbatches=4))
    assert all(0 <= link.limited <= limited for link in reports[-1].links)


def test_losing_half_of_the_feedback_still_moves_the_blocks_below():
    executor = PipelinedExecutor(latency=Latency(0, 0.5, 0, copies=1))
    algo = trainer(executor)
    moved = [0, 0, 0]
    for x, y in data():
        before = [flat(stage.block.parameters()) for stage in algo.stages]
        algo.step(x, y)
        for k, stage in enumerate(algo.stages):
            moved[k] += not torch.equal(flat(stage.block.parameters()), before[k])
    algo.finish()
    assert moved[2] >= 10
    assert 0 < moved[0] <= moved[1] < 10
    assert nothing_is_on_its_way(executor)


def test_a_schedule_that_updates_after_every_batch_has_no_microbatches():
    with pytest.raises(ValueError, match="the schedule updates after each"):
        PipelinedExecutor(sequential, microbatches=2)


def test_compensation_adds_the_squared_gradient_times_the_way_of_the_weights():
    """DC-ASGD, Eq. 10 of Zheng et al. 2017; block 1's second update is the first that is late."""

    def first_block(compensation, steps):
        torch.manual_seed(1)
        executor = PipelinedExecutor(curvature=Constant(0), reuse=True, compensation=compensation)
        algo = trainer(executor, K=2, model=mlp(depth=4), lr=0.5)
        for x, y in data()[:steps]:
            algo.step(x, y)
        return flat(algo.stages[0].block.parameters())

    start, one, two = (first_block(0.0, steps) for steps in (1, 3, 4))
    gradient = (one - two) / 0.5
    expected = two - 0.5 * 3.0 * gradient**2 * (one - start)
    assert torch.equal(first_block(3.0, 3), one)
    torch.testing.assert_close(first_block(3.0, 4), expected)
    assert not torch.allclose(expected, two)


@pytest.mark.filterwarnings("error")
def test_the_step_size_schedule_goes_on_where_feedback_is_lost():
    """A block that lost a whole batch must not be at a larger step size than the others for the rest of the run."""

    def halving(optimizer):
        return torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)

    executor = PipelinedExecutor(latency=Latency(0, 0.5, 0, copies=1))
    blocks = blockprop.split(network(), 3)
    algo = blockprop.BlockProp(blocks, CE, sgd(0.1), executor=executor, scheduler=halving)
    for x, y in data():
        algo.step(x, y)
    algo.finish()
    assert [wstep.lr for wstep in algo.wsteps] == [0.1 / 2**12] * 3


@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0], dtype=torch.float64)])
@pytest.mark.parametrize("K", [1, 2])
def test_microbatches_weigh_by_their_predictions(K, weight):
    """Labels that are ignored are spread unevenly, and of one microbatch all are."""
    x, y = batch(16)
    y[2:9] = 1
    loss = nn.CrossEntropyLoss(weight=weight, ignore_index=1)
    found = []
    for executor in ("local", PipelinedExecutor(microbatches=4, curvature=Constant(0))):
        torch.manual_seed(1)
        model = mlp(depth=3).double()
        algo = blockprop.BlockProp(blockprop.split(model, K), loss, sgd(0.1), executor=executor)
        report = algo.step(x, y)
        found.append((report if K == 1 else None, algo.finish(), flat(model.parameters())))
    torch.testing.assert_close(found[1][2], found[0][2])
    if K == 1:
        assert found[1][0].loss == pytest.approx(found[0][0].loss)


def test_older_checkpoints_do_not_tell_how_many_predictions_a_batch_has():
    algo = trainer(PipelinedExecutor(microbatches=2), model=mlp(depth=4))
    for x, y in data()[:4]:
        algo.step(x, y)
    state = algo.state_dict()
    state["executor"]["parts"] = [part[:5] for part in state["executor"]["parts"]]
    assert any(len(part) == 5 for part in state["executor"]["parts"])
    other = trainer(PipelinedExecutor(microbatches=2), model=copy.deepcopy(algo.blocks.model))
    other.load_state_dict(copy.deepcopy(state))
    algo.finish()
    other.finish()
    ours, theirs = (flat(one.blocks.model.parameters()) for one in (algo, other))
    torch.testing.assert_close(ours, theirs)


def test_labels_that_are_all_ignored_tell_no_curvature():
    correction = Correction()
    correction.measured(0, [torch.ones(3, 2), torch.zeros(3, 2)], [torch.zeros(3, 2), torch.zeros(3, 2)])
    assert correction.curvature.values == {}


def test_a_report_is_of_all_microbatches():
    """The last of them never see their block move, which the first do."""
    algo = trainer(PipelinedExecutor(microbatches=2, curvature=Constant(0.1)), K=2)
    reports = [algo.step(x, y) for x, y in data()]
    assert all(report.links[0].drift > 0 for report in reports[3:])


@pytest.mark.parametrize("name", ["proximal", "published"])
def test_only_of_the_exact_form_the_displacement_is_the_feedback(name):
    blocks = blockprop.split(network(), 2)
    algo = blockprop.BlockProp(blocks, CE, sgd(0.1), form=name, executor=PipelinedExecutor())
    with pytest.raises(ValueError, match="expected that"):
        algo.step(*batch(8))


def test_where_feedback_is_lost_a_cache_learns_at_the_weights_of_now():
    """A loss completes an update after the forward pass of a batch that learns from the cache in the same tick."""
    settings = {"reuse": True, "along": True, "refresh": 2, "cache": lambda: GluingCache(48, dtype=torch.float64)}
    algo = trainer(PipelinedExecutor(microbatches=2, latency=Latency(0, 0.3, 0), **settings), K=4)
    for _ in range(4):
        for index, (x, y) in enumerate(data()[:6]):
            algo.step(x, y, torch.arange(8 * index, 8 * index + 8))
    algo.finish()
    assert flat(algo.blocks.model.parameters()).isfinite().all()


class Elsewhere:
    """A process with the first of two blocks, as far as an executor is made with it."""

    block, blocks, replicas, average, waited = 1, 2, 1, None, 0.0


def test_no_optimizer_keeps_a_block_that_lives_elsewhere():
    algo = trainer(PipelinedExecutor(remote=Elsewhere()), K=2)
    assert [all(p.is_meta for p in wstep.parameters) for wstep in algo.wsteps] == [False, True]


def test_a_short_last_batch_is_cut_into_parts_of_the_same_size():
    """BatchNorm has no statistics of one example."""
    model = nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 5)).double()
    algo = trainer(PipelinedExecutor(microbatches=4), 2, model)
    for n in (16, 16, 5):
        algo.step(*batch(n))
    algo.finish()
    assert [wstep.calls for wstep in algo.wsteps] == [3, 3]


@pytest.mark.parametrize(
    "settings",
    [{}, {"microbatches": 2, "latency": Latency(3, 0.1, 4)}, {"prediction": 0.5}, {"reuse": True, "compensation": 0.1}],
)
def test_a_resumed_pipeline_is_the_uninterrupted_one(tmp_path, settings):
    _, _, expected = trained(PipelinedExecutor(curvature=Secant(3), **settings))

    first = trainer(PipelinedExecutor(curvature=Secant(3), **settings))
    torch.manual_seed(3)
    for x, y in data()[:5]:
        first.step(x, y)
    model, state = first.blocks.model.state_dict(), first.state_dict()
    save_state(tmp_path / "state", {"model": dict(model), "algo": state, "random": torch.get_rng_state()})

    state = load_state(tmp_path / "state")
    second = trainer(PipelinedExecutor(curvature=Secant(3), **settings))
    second.blocks.model.load_state_dict(state["model"])
    second.load_state_dict(state["algo"])
    torch.manual_seed(99)
    torch.set_rng_state(state["random"])
    for x, y in data_again(5):
        second.step(x, y)
    second.finish()
    assert torch.equal(flat(second.blocks.model.parameters()), expected)


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("after", [4, 7])
def test_a_resumed_pipeline_has_what_was_cached(tmp_path, reuse, after):
    """In the first epoch, of which all feedback comes; and in the second, of which none does."""
    x, y = batch(24)

    def made():
        torch.manual_seed(1)
        cache = lambda: GluingCache(24, dtype=torch.float64)  # noqa: E731
        return trainer(PipelinedExecutor(curvature=Secant(3), cache=cache, refresh=3, reuse=reuse), 3, mlp(depth=4))

    def steps(algo, some):
        for first in some:
            ids = torch.arange(first, first + 8)
            algo.step(x[ids], y[ids], ids)

    visits = [0, 8, 16] * 4
    whole, first, second = made(), made(), made()
    steps(whole, visits)
    whole.finish()
    steps(first, visits[:after])
    state = {"model": dict(first.blocks.model.state_dict()), "algo": first.state_dict()}
    save_state(tmp_path / "state", state)
    state = load_state(tmp_path / "state")
    second.blocks.model.load_state_dict(state["model"])
    second.load_state_dict(state["algo"])
    steps(second, visits[after:])
    second.finish()
    ours, theirs = (flat(algo.blocks.model.parameters()) for algo in (second, whole))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("K", [2, 3])
@pytest.mark.parametrize("more", [{}, {"microbatches": 2}, {"latency": Latency(2, seed=1)}])
@pytest.mark.parametrize("reuse", [False, True])
def test_with_a_cache_every_block_learns_on_every_visit(K, more, reuse):
    x, y = batch(24)
    executor = PipelinedExecutor(cache=lambda: GluingCache(24, dtype=torch.float64), refresh=3, reuse=reuse, **more)
    algo = trainer(executor, K, mlp(depth=4))
    for first in (0, 8, 16) * 4:
        ids = torch.arange(first, first + 8)
        algo.step(x[ids], y[ids], ids)
    algo.finish()
    assert [wstep.calls for wstep in algo.wsteps] == [12] * K
    assert nothing_is_on_its_way(executor)


@pytest.mark.parametrize(
    "more", [{}, {"microbatches": 3}, {"latency": Latency(3, 0.2, 1, copies=1), "microbatches": 2}]
)
def test_after_it_has_run_empty_a_pipeline_goes_on(more):
    def made():
        return trainer(PipelinedExecutor(curvature=Constant(0.1), **more))

    algo = made()
    for number, (x, y) in enumerate(data()):
        algo.step(x, y)
        if number % 5 == 4:
            algo.finish()
            assert nothing_is_on_its_way(algo.executor)
    algo.finish()
    assert nothing_is_on_its_way(algo.executor)
    assert algo.wsteps[-1].calls == 12
    # and a checkpoint of an empty pipeline is continued in the same way
    resumed = made()
    resumed.blocks.model.load_state_dict(algo.blocks.model.state_dict())
    resumed.load_state_dict(algo.state_dict())
    for one in (algo, resumed):
        torch.manual_seed(4)
        for x, y in data(3):
            one.step(x, y)
        one.finish()
    assert torch.equal(*(flat(one.blocks.model.parameters()) for one in (algo, resumed)))


def data_again(first):
    state = torch.get_rng_state()
    rest = data()[first:]
    torch.set_rng_state(state)
    return rest


def test_blocks_do_what_they_can_before_they_wait_for_feedback(monkeypatch):
    order = []
    renew, take = LateStage.renew, LocalMail.take_feedback

    def renewed(late, number):
        if late.flights[number].old is None:
            order.append(("evaluated", late.stage.index, number))
        renew(late, number)

    def taken(mail, k, number):
        order.append(("taken", k, number))
        return take(mail, k, number)

    monkeypatch.setattr(LateStage, "renew", renewed)
    monkeypatch.setattr(LocalMail, "take_feedback", taken)
    trained(PipelinedExecutor())
    assert order[::2] == [("evaluated", *rest) for _, *rest in order[1::2]]
    assert len(order) == 2 * 2 * 12


def test_running_statistics_move_once_a_batch():
    algo, _, _ = trained(PipelinedExecutor())
    counts = [m.num_batches_tracked.item() for m in algo.blocks.model.modules() if isinstance(m, nn.BatchNorm1d)]
    assert counts == [12, 12, 12]


def test_running_statistics_of_microbatches_are_of_as_many_examples():
    """Two microbatches of the same examples move the mean as far as one batch of them; the momentum stays."""
    x, y = batch(8)
    models = []
    for microbatches, rows in ((1, slice(None)), (2, [*range(8), *range(8)])):
        model = nn.Sequential(nn.BatchNorm1d(6, momentum=0.3), nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 5)).double()
        algo = trainer(PipelinedExecutor(microbatches=microbatches), 2, model)
        algo.step(x[rows], y[rows])
        algo.finish()
        models.append(model)
    assert models[0][0].running_mean.abs().min() > 0
    torch.testing.assert_close(models[1][0].running_mean, models[0][0].running_mean)
    assert models[1][0].momentum == 0.3


@pytest.mark.parametrize("proximal", [False, True])
def test_a_measurement_leaves_no_trace(proximal):
    """Measuring the curvature and not using it changes nothing; an optimizer that looks at inputs sees none of it."""

    class Watching(Secant):
        def at(self, link, slope):
            return 0.0

    def weights(curvature):
        blocks = blockprop.split(network().float(), 3)
        optimizer = [proximal_sgd(block, 0.1) for block in blocks] if proximal else sgd(0.1)
        algo = blockprop.BlockProp(blocks, CE, optimizer, executor=PipelinedExecutor(curvature=curvature))
        torch.manual_seed(3)
        for x, y in data():
            algo.step(x.float(), y)
        algo.finish()
        return flat(blocks.model.parameters())

    watching = Watching(1)
    assert torch.equal(weights(watching), weights(Constant(0)))
    assert watching.values.keys() == {0, 1}


def test_watching_compares_with_the_gradient_of_today():
    """Without delay the late gradient is today's; with it, it is not quite."""
    for schedule, exact in ((sequential, True), (None, False)):
        executor = PipelinedExecutor(schedule, curvature=Constant(0.1))
        algo = trainer(executor, model=mlp(depth=4), lr=0.5)
        for x, y in data()[:6]:
            algo.step(x, y)
        executor.watch(3)
        assert executor.watched() is None
        for x, y in data()[6:]:
            algo.step(x, y)
        found = executor.watched()
        assert found[-1] == (1.0, 1.0)
        assert all((abs(cosine - 1) < 1e-9 and abs(ratio - 1) < 1e-9) == exact for cosine, ratio in found[:-1])
        assert executor.watched() is None


def test_watching_counts_the_batches_of_an_update():
    """The gradients of n batches are each added as an n-th: so is backprop's that they are held against."""
    executor = PipelinedExecutor(sequential, curvature=Constant(0.1))
    algo = blockprop.BlockProp(blockprop.split(mlp(depth=4), 3), CE, sgd(0.5), executor=executor, accumulate=3)
    executor.watch(3)
    for x, y in data(3):
        algo.step(x, y)
    assert list(itertools.chain(*executor.watched())) == pytest.approx([1.0] * 6)


def test_the_gradient_alone_is_refused():
    with pytest.raises(ValueError, match="learn from different batches"):
        trainer(PipelinedExecutor()).gradient(*batch())


@pytest.mark.parametrize("form", ["published", "rescaled"])
def test_other_forms_are_refused(form):
    algo = blockprop.BlockProp(blockprop.split(network(), 2), CE, sgd(), form=form, executor=PipelinedExecutor())
    with pytest.raises(ValueError, match="form 'exact'"):
        algo.step(*batch())


def test_the_secant_of_a_quadratic_is_its_curvature():
    secant = Secant(memory=0.5)
    way, slope = torch.randn(4, 3), torch.randn(4, 3)
    secant.measure(0, way, 3.0 * way, slope)
    assert secant.at(0, slope) == pytest.approx(3.0, rel=1e-5)
    secant.measure(0, way, 5.0 * way, slope)
    assert secant.at(0, slope) == pytest.approx(4.0, rel=1e-5)
    secant.measure(0, way, 10.0 * way, slope)
    assert secant.at(0, slope) == pytest.approx(7.0, rel=1e-5)  # no longer all alike
    secant.measure(0, way, 1.0 * way, slope)
    assert secant.at(0, slope) == pytest.approx(4.0, rel=1e-5)
    secant.measure(1, way, -way, slope)
    assert secant.at(1, slope) == 0.0
    secant.measure(0, 0 * way, 0 * way, slope)
    assert secant.at(0, slope) == pytest.approx(4.0, rel=1e-5)


def test_a_measurement_counts_by_how_far_the_block_had_moved():
    """Moves grow and the curvature falls: κ is that of the long moves at once, where the mean of quotients is 2.5."""
    secant = Secant()
    way, slope = torch.randn(4, 3), torch.randn(4, 3)
    secant.measure(0, way, 4.0 * way, slope)
    secant.measure(0, 10 * way, 1.0 * 10 * way, slope)
    assert secant.at(0, slope) == pytest.approx((4 + 100) / (1 + 100), rel=1e-5)
    secant.measure(0, way, -50 * way, slope)  # noise of a short move
    assert secant.at(0, slope) == pytest.approx((4 + 100 - 50) / (1 + 100 + 1), rel=1e-5)
    assert secant.values == {0: secant.at(0, slope)}
    older = Secant()
    older.load_state_dict({"values": {0: 3.0}, "counts": {0: 2}})  # a mean of quotients, which is measured anew
    assert older.values == {}


def test_curvatures_in_proportion_to_slopes_are_found():
    """One measurement finds ρ where every example's curvature is 0.7 times its slope's norm; no slope, no curvature."""
    norms = torch.tensor([0.5, 2.0, 0.0, 3.0])
    slope = norms[:, None, None] * torch.nn.functional.normalize(torch.randn(4, 6), dim=1).view(4, 2, 3)
    way = torch.randn(4, 2, 3)
    curvature = PerExample()
    curvature.measure(0, way, 0.7 * norms[:, None, None] * way, slope)
    assert torch.allclose(curvature.at(0, slope), 0.7 * norms[:, None, None], rtol=1e-5)
    assert torch.allclose(PerExample(Constant(2.0)).at(0, slope), 2 * norms[:, None, None], rtol=1e-5)


def test_a_microbatch_that_no_update_came_between_is_not_evaluated_again():
    """Of two microbatches one is late by an update, the other by none: the numbers are those of two passes for both."""
    forwards = []

    class Counting(nn.Linear):
        def forward(self, inputs):
            forwards.append(len(inputs))
            return super().forward(inputs)

    model = network()
    model[0] = Counting(6, 12, dtype=torch.float64)
    again = copy.deepcopy(model)
    _, _, weights = trained(PipelinedExecutor(microbatches=2), 2, model)
    # 24 microbatches, 12 of them late, and the first on time, of which nothing was known yet
    assert len(forwards) == 24 + 12 + 1

    class Forgetful(dict):
        def get(self, *_):
            return False

    executor = PipelinedExecutor(microbatches=2)
    algo = trainer(executor, 2, again)
    executor._furnish(algo.stages)
    executor._lates[0]._still = Forgetful()
    forwards.clear()
    torch.manual_seed(3)
    for x, y in data():
        algo.step(x, y)
    algo.finish()
    assert len(forwards) == 48
    assert torch.equal(flat(algo.blocks.model.parameters()), weights)


@pytest.mark.parametrize("reuse", [False, True])
def test_with_a_cache_curvatures_are_measured_on_the_first_visits(reuse):
    """Stashed weights do not move, but the block has; two blocks, so that its feedback is late."""
    curvature = Secant(2)
    cache = {"cache": lambda: GluingCache(48, dtype=torch.float64)}
    algo = trainer(PipelinedExecutor(curvature=curvature, along=True, reuse=reuse, **cache), K=2)
    for index, (x, y) in enumerate(data()[:6]):
        algo.step(x, y, torch.arange(8 * index, 8 * index + 8))
    assert 0 in curvature.values


def test_a_constant_per_example_makes_targets_equally_far():
    """κ_i = ρ ‖g_i‖: the slope vanishes at b_old - ĝ/ρ, for every example."""
    slope, old = torch.randn(5, 4).double(), torch.randn(5, 4).double()
    count = 5.0
    curvature = PerExample(Constant(4.0)).at(0, slope)
    target = old - torch.nn.functional.normalize(slope, dim=1) / 4
    for along in (False, True):
        root = TargetTerm(old, slope / count, count, curvature, along).root(target)
        assert root.slope is not None
        assert torch.allclose(root.slope, torch.zeros(5, 4).double(), atol=1e-12)


@pytest.mark.parametrize("curvature", [0.0, 0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("inside", [True, False])
def test_step_sizes_up_to_which_a_target_converges(curvature, inside):
    """w₊ = w - γ(a w₋ + κ(w - w₋)), one update late, converges for γκ < 1 + γa/2 and γ(a - κ) < 1; here a = 1."""
    edges = [1 / (curvature - 0.5) if curvature > 0.5 else math.inf, 1 / (1 - curvature) if curvature < 1 else math.inf]
    lr = min(*edges, 4.0) * (0.9 if inside else 1.1)
    weight = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.ones_(weight.weight)
    half = nn.Linear(1, 1, bias=False, dtype=torch.float64).requires_grad_(False)
    nn.init.constant_(half.weight, math.sqrt(0.5))  # of which the squared error has the curvature 1
    model = nn.Sequential(weight, half)
    executor = PipelinedExecutor(microbatches=1, curvature=Constant(curvature), trust=math.inf)
    algo = blockprop.BlockProp(blockprop.split(model, 2, by="layers"), nn.MSELoss(), sgd(lr), executor=executor)
    for _ in range(150):
        algo.step(torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64))
    assert (abs(float(weight.weight.detach())) < 1) == inside


@pytest.mark.parametrize("along", [False, True])
@pytest.mark.parametrize("longest", [0.0, 0.8, math.inf])
def test_a_target_s_slope_is_the_gradient_of_its_mean(along, longest):
    """Of some examples the way is so long that the correction is cut, of one there is none."""
    torch.manual_seed(0)
    old, slope = torch.randn(2, 6, 3, 2, dtype=torch.float64)
    output = (old + slope.new_tensor([0, 0.01, 0.1, 1, 10, 100]).view(6, 1, 1) * torch.randn_like(old)).requires_grad_()
    term = TargetTerm(old, slope / 6, 6, 2.0, along, 0.5 if along else 0.0, longest)
    root = term.root(output)
    mean, _ = term.mean(output)
    (gradient,) = torch.autograd.grad(mean, output)
    assert torch.equal(root.mean, mean)
    torch.testing.assert_close(root.slope, gradient)


def test_a_correction_is_no_longer_than_trusted():
    """κ d itself up to a length, then of that length; every example for itself, however large the batch."""
    torch.manual_seed(0)
    old, slope, way = torch.randn(3, 5, 4, dtype=torch.float64)
    way = way.new_tensor([[0], [1], [2], [4], [8]]) * torch.nn.functional.normalize(way)
    root = TargetTerm(old, slope / 5, 5, 0.1, longest=0.3).root(old + way)
    assert root.slope is not None
    correction = 5 * root.slope - slope
    torch.testing.assert_close(correction[:3], 0.1 * way[:3])
    torch.testing.assert_close(correction[3:].norm(dim=1), way.new_tensor([0.3, 0.3]))
    torch.testing.assert_close(correction[3:] / way[3:], 0.1 * (way.new_tensor([[0.75], [0.375]])).expand(2, 4))
    alone = TargetTerm(old[3:4], slope[3:4], 1, 0.1, longest=0.3).root(old[3:4] + way[3:4])
    torch.testing.assert_close(alone.slope, 5 * root.slope[3:4])


def test_a_correction_is_trusted_up_to_a_share_of_what_feedback_its_link_has():
    """Of the root of the mean square over examples and messages; an example with little feedback is no exception."""
    correction = Correction(trust=0.5)
    first, second = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[0.0, 1.0], [2.0, 2.0]])
    assert correction.longest(0, first) == pytest.approx(0.5 * math.sqrt(25 / 2))
    assert correction.longest(1, second) == pytest.approx(0.5 * math.sqrt(9 / 2))
    resumed = Correction(trust=0.5)
    resumed.load_state_dict(correction.state_dict())
    for one in (correction, resumed):
        assert one.longest(0, second) == pytest.approx(0.5 * math.sqrt((25 + 9) / 4))
    assert Correction(trust=math.inf).longest(0, first) == math.inf
    for idle in (Correction(reuse=True), Correction(curvature=Constant(0.0))):  # which correct nothing
        assert idle.longest(0, first) == math.inf
    assert Correction(curvature=Constant(0.0), along=True, across=Constant(1.0)).longest(0, first) < math.inf


def test_what_is_not_trusted_is_the_delayed_gradient():
    """Not at all, and the pipeline trains as with κ = 0; without a limit, otherwise than with one."""
    by_trust = [trained(PipelinedExecutor(curvature=Constant(2.0), trust=trust))[2] for trust in (0.0, 0.01, math.inf)]
    assert torch.equal(by_trust[0], trained(PipelinedExecutor(curvature=Constant(0.0)))[2])
    assert not torch.equal(by_trust[1], by_trust[0])
    assert not torch.equal(by_trust[1], by_trust[2])


@pytest.mark.parametrize("trust", [-0.1, math.nan])
def test_a_trust_that_is_none_is_refused(trust):
    with pytest.raises(ValueError, match="trust is"):
        PipelinedExecutor(trust=trust)


def test_curvatures_per_example_are_measured_and_used():
    """Another κ per example gives other weights than one per link."""
    ratio = Secant(every=2)
    across = PerExample(Secant(2))
    _, _, weights = trained(PipelinedExecutor(curvature=PerExample(ratio), along=True, across=across))
    assert set(ratio.values) == {0, 1}
    assert min(ratio.values.values()) > 0
    _, _, others = trained(PipelinedExecutor(curvature=Secant(2), along=True, across=Secant(2)))
    assert not torch.equal(weights, others)


def test_the_links_take_turns():
    secant = Secant(3)
    found = [(tick, link) for tick, link in itertools.product(range(12), range(2)) if secant.wants(link, 2, tick)]
    assert found == [(0, 0), (3, 1), (6, 0), (9, 1)]


@pytest.mark.parametrize(("microbatches", "accumulate"), [(6, 1), (2, 2), (1, 4)])
def test_every_link_is_measured_once_in_its_turn(monkeypatch, microbatches, accumulate):
    """Few microbatches of a batch, or of accumulated batches, see the weights move: these are waited for."""
    asked = Counter()
    measure = Secant.measure

    def counting(self, link, way, change, slope):
        assert way.any()
        asked[link] += 1
        measure(self, link, way, change, slope)

    monkeypatch.setattr(Secant, "measure", counting)
    executor = PipelinedExecutor(microbatches=microbatches, curvature=Secant(5))
    algo = blockprop.BlockProp(blockprop.split(mlp(depth=6), 4), CE, sgd(0.1), executor=executor, accumulate=accumulate)
    batches = 240 // microbatches
    for x, y in data(batches, 24):
        algo.step(x, y)
    turns = 240 // 5 // 3
    assert set(asked) == {0, 1, 2}
    assert all(turns - 3 <= count <= turns for count in asked.values())


def test_losing_a_whole_update_is_no_update_of_a_proximal_step():
    """Its preconditioner counts updates, and has seen no inputs since the last."""
    model = mlp(depth=4).float()
    blocks = blockprop.split(model, 3)
    optimizers = [proximal_sgd(block, 0.1, damping=1.0) for block in blocks]
    executor = PipelinedExecutor(latency=Latency(0, 0.5, 0), curvature=Constant(0))
    algo = blockprop.BlockProp(blocks, CE, optimizers, executor=executor)
    for x, y in data():
        algo.step(x.float(), y)
    algo.finish()
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.mark.parametrize("K", [2, 3, 4, 5, 6])
def test_with_as_many_microbatches_as_ticks_every_link_is_measured(K):
    """Some places in a batch are never late; a link must not be asked there alone."""
    executor = PipelinedExecutor(microbatches=2 * (K - 1), curvature=Secant())
    algo = trainer(executor, K, mlp(depth=6))
    for x, y in data(120, 20):
        algo.step(x, y)
    assert set(executor.correction.curvature.values) == set(range(K - 1))


@pytest.mark.parametrize("first", [lambda: nn.ReLU(inplace=True), lambda: nn.Linear(12, 12)])
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_curvature_is_measured_through_blocks_of_every_kind(first, precision):
    model = nn.Sequential(nn.Linear(6, 12), first(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 5))
    model = model.to(torch.float32 if precision else torch.float64)
    executor = PipelinedExecutor(curvature=Secant(2))
    blocks = blockprop.split(model, at=["1", "2"])
    algo = blockprop.BlockProp(blocks, CE, sgd(0.1), executor=executor, precision=precision)
    for x, y in data():
        algo.step(x.to(next(model.parameters()).dtype), y)
    assert min(executor.correction.curvature.values.values()) > 0


@pytest.mark.parametrize(
    ("K", "more"), [(4, {"microbatches": 6}), (2, {"microbatches": 2, "latency": Latency(3, 0.05, 2)})]
)
def test_what_came_last_is_learnt_from_as_well(K, more):
    """A last batch of fewer examples than parts, and updates that are still due when the pipeline has run empty."""
    algo = trainer(PipelinedExecutor(curvature=Constant(0.1), **more), K, mlp(depth=5))
    for n in (12, 12, 3):
        algo.step(*batch(n))
    algo.finish()
    assert all(p.grad is None or not p.grad.any() for wstep in algo.wsteps for p in wstep.parameters)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Constant(-1), "curvature is -1"),
        (lambda: Constant([0.1, math.inf]), "curvature is inf"),
        (lambda: Secant(0), "every is 0"),
        (lambda: Secant(memory=1.0), "memory is 1.0"),
    ],
)
def test_bad_curvatures(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_most_that_is_held_has_the_microbatch_that_was_forwarded_before_the_oldest_was_learnt_from():
    executor = PipelinedExecutor(microbatches=4, curvature=Constant(0.3))
    algo = trainer(executor, K=2, model=mlp(depth=4))
    for x, y in data(3):
        algo.step(x, y)
    lower, top = (2 * (inputs + outputs) * 8 for inputs, outputs in ((6, 12), (12, 5)))  # of two examples each
    assert executor.held() == Held(3 * lower + top)


def test_microbatches_between_two_updates_share_one_copy_of_the_weights():
    executor = PipelinedExecutor(microbatches=4, reuse=True)
    algo = trainer(executor, K=2)
    for x, y in data(3):
        algo.step(x, y)
    flights = executor._lates[0].flights.values()
    copies = {(one.version, id(next(iter(one.evaluation.weights.values())))) for one in flights}
    assert len(flights) > len(copies) == len({version for version, _ in copies})


def test_a_state_loaded_over_as_many_other_updates_does_not_meet_their_weights():
    def made(lr):
        algo = trainer(PipelinedExecutor(microbatches=4, reuse=True), K=2, lr=lr)
        for x, y in data(4):
            algo.step(x, y)
        return algo

    one, other = made(0.1), made(0.2)
    other.blocks.model.load_state_dict(one.blocks.model.state_dict())
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    for algo in (one, other):
        torch.manual_seed(5)
        for x, y in data(4):
            algo.step(x, y)
    assert torch.equal(*(flat(algo.blocks.model.parameters()) for algo in (one, other)))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_gradient_is_the_mean_over_what_was_not_lost(accumulate):
    """The second of two microbatches is lost on its way to the first block."""

    def lossy(blocks):
        del blocks
        for at in itertools.count(0, 2):
            yield (Action(1, "forward", at),)
            yield Action(2, "forward", at), Action(2, "backward", at), Action(1, "forward", at + 1)
            above = [Action(2, kind, at + 1) for kind in ("forward", "backward", "update")]
            yield *above, Action(1, "backward", at), Action(1, "drop", at + 1), Action(1, "update", at)

    model, batches = mlp(depth=4), [batch(8) for _ in range(accumulate)]
    plain = copy.deepcopy(model)
    cut = len(list(blockprop.split(plain, 2)[0].parameters()))
    weights = list(plain.parameters())
    whole, half = (
        torch.autograd.grad(sum(CE(plain(x[:n]), y[:n]) for x, y in batches) / accumulate, weights) for n in (8, 4)
    )
    expected = [w - 0.1 * g for w, g in zip(weights, [*half[:cut], *whole[cut:]], strict=True)]
    executor = PipelinedExecutor(lossy, microbatches=2, curvature=Constant(0.0))
    algo = blockprop.BlockProp(blockprop.split(model, 2), CE, sgd(0.1), executor=executor, accumulate=accumulate)
    for x, y in batches:
        algo.step(x, y)
    torch.testing.assert_close(flat(model.parameters()), flat(expected))


def test_sums_of_gradients_take_no_new_memory_from_one_step_to_the_next():
    """The top begins with a batch at the end of the step before."""

    class Sums(TorchDispatchMode):
        found = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            del types
            self.found += function is torch.ops.aten.add.Tensor and args[0].shape == (12, 12)
            return function(*args, **kwargs or {})

    algo = trainer(PipelinedExecutor(microbatches=4, curvature=Constant(0.0)), model=mlp(depth=4))
    with Sums() as sums:
        for x, y in data(6):
            algo.step(x, y)
    assert sums.found == 0
