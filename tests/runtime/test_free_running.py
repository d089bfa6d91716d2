"""Free-running blocks: all is learnt, in order, within the bound."""

import copy
import threading
import time

import pytest
import torch
from meeting import alone, apart, numbered, together
from torch import nn

import blockprop
from blockprop.cache import GluingCache
from blockprop.correction import Correction
from blockprop.curvature import Constant, Secant
from blockprop.executors import PipelinedExecutor
from blockprop.latestage import LateStage
from blockprop.runtime import FreeRunningExecutor, Neighbours, Place
from conftest import batch, flat, mlp, sgd

EXAMPLES = 24


def model():
    torch.manual_seed(1)
    return mlp(depth=4)


def data(count=12, n=8):
    torch.manual_seed(2)
    return numbered([batch(n) for _ in range(count)], EXAMPLES)


@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize(
    "settings", [{}, {"microbatches": 3}, {"cache": lambda: GluingCache(EXAMPLES, dtype=torch.float64)}]
)
def test_every_block_learns_from_every_batch(K, settings):
    ages = {k: [] for k in range(1, K + 1)}

    class Watched(FreeRunningExecutor):
        def step(self, *args, **kwargs):
            report = super().step(*args, **kwargs)
            ages[self.remote.place.block] += [link.age for link in report.links]
            assert len(self._late.flights) <= self.in_flight * (K - self.remote.place.block)
            return report

    def after(algo, neighbours):
        return [wstep.calls for wstep in algo.wsteps][neighbours.place.block - 1]

    correction = Correction(curvature=Secant(2), along=True, across=Secant(2))

    def executor(remote):
        return Watched(remote, correction=copy.deepcopy(correction), **settings)

    assert apart(model(), K, data(), executor, after=after) == [12] * K
    if "cache" not in settings:
        assert all(age <= 2 * (K - k) + 1 for k in ages for age in ages[k])


@pytest.mark.parametrize(("reuse", "passes"), [(False, 1.5), (True, 1.0)])
@pytest.mark.parametrize("policy", [FreeRunningExecutor, PipelinedExecutor])
def test_a_visit_without_feedback_has_one_forward_pass(policy, reuse, passes):
    """Of every two visits one has feedback; a block below evaluates again for that alone, and not with reuse."""
    forwards = []

    def executor(remote):
        correction = Correction(curvature=Constant(0.3), along=True, reuse=reuse)
        cache = {"cache": lambda: GluingCache(EXAMPLES, dtype=torch.float64), "refresh": 2}
        return policy(remote=remote, correction=correction, **cache)

    class Counting(nn.Linear):
        def forward(self, inputs):
            forwards.append(len(inputs))
            return super().forward(inputs)

    network = model()
    network[0] = Counting(network[0].in_features, network[0].out_features, dtype=torch.float64)
    apart(network, 2, data(), executor)
    if policy is FreeRunningExecutor:  # feedback that is back before the next update needs no evaluation
        assert 12 <= len(forwards) <= passes * 12
    else:
        assert len(forwards) == passes * 12


@pytest.mark.parametrize("microbatches", [1, 2, 3, 8])
def test_one_microbatch_in_flight_is_the_exact_form(microbatches):
    """A block that waits for its feedback before the next is never late; uneven parts, a short batch of fewer parts."""
    batches = [*data(6), *[(x[:3], y[:3], ids[:3]) for x, y, ids in data(1)], *data(6)]
    expected = alone(model(), 2, batches, "local")
    found = apart(
        model(), 2, batches, lambda remote: FreeRunningExecutor(remote, microbatches=microbatches, in_flight=1)
    )
    torch.testing.assert_close(torch.cat(found), expected, rtol=1e-12, atol=1e-13)


def test_where_no_update_follows_the_next_microbatch_goes_up_first(monkeypatch):
    """One on its way: with its feedback here and its batch not over, the block above need not wait for the next."""
    order = []

    def watched(name):
        inner = getattr(LateStage, name)

        def call(late, number, *args, **kwargs):
            if not late.top:
                order.append((name, number))
            return inner(late, number, *args, **kwargs)

        return call

    for name in ("forward", "learn"):
        monkeypatch.setattr(LateStage, name, watched(name))
    apart(model(), 2, data(2), lambda remote: FreeRunningExecutor(remote, microbatches=2, in_flight=1))
    first = [("forward", 0), ("forward", 1), ("learn", 0), ("learn", 1)]
    assert order == first + [(name, number + 2) for name, number in first]


def test_a_microbatch_that_no_update_came_between_is_not_late():
    """A lone batch of three microbatches, all on their way at once: it is learnt at the weights that it was sent at."""
    drifts = []

    class Watched(FreeRunningExecutor):
        def step(self, *args, **kwargs):
            return self.watch(super().step(*args, **kwargs))

        def drain(self, stages):
            return self.watch(super().drain(stages))

        def watch(self, report):
            drifts.extend(link.drift for link in report.links)
            return report

    lone = data(1)
    found = apart(model(), 2, lone, lambda remote: Watched(remote, microbatches=3, in_flight=3))
    torch.testing.assert_close(torch.cat(found), alone(model(), 2, lone, "local"), rtol=1e-12, atol=1e-13)
    assert drifts
    assert set(drifts) == {0.0}


def test_the_loss_falls():
    x, y = batch(40)
    batches = [(x, y, torch.arange(40) % EXAMPLES)] * 400
    found = apart(model(), 3, batches, FreeRunningExecutor, lr=0.1)
    trained = model()
    with torch.no_grad():
        for parameter, value in zip(trained.parameters(), _like(trained, torch.cat(found)), strict=True):
            parameter.copy_(value)
    loss = torch.nn.functional.cross_entropy
    after, before = loss(trained(x), y), loss(model()(x), y)
    assert after < 0.7 * before


def _like(network, values):
    parts = values.split([p.numel() for p in network.parameters()])
    return [part.view(p.shape) for part, p in zip(parts, network.parameters(), strict=True)]


@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_checkpoint_holds_what_is_on_its_way(microbatches):
    """Saved at the same step by all, put into new executors, and run to the end: every batch was learnt once."""
    batches = data()
    states = {}

    def save(algo, neighbours):
        k = neighbours.place.block
        return flat(algo.blocks[k - 1].parameters()), [wstep.calls for wstep in algo.wsteps][k - 1]

    class Saving(FreeRunningExecutor):
        def step(self, stages, *args, **kwargs):
            report = super().step(stages, *args, **kwargs)
            if self._fed == 6 * microbatches:
                states[self.remote.place.block] = copy.deepcopy(self.state_dict())
            return report

    def cut(kind):
        return lambda remote: kind(remote, microbatches=microbatches)

    apart(model(), 3, batches[:6], cut(Saving), after=save)
    flights = [[number for number, _ in states[k]["late"]["flights"]] for k in (1, 2, 3)]
    waiting = [len(states[k]["messages"]) for k in (1, 2, 3)]
    assert flights[2] == []
    assert len(flights[0]) >= waiting[0]

    class Resumed(FreeRunningExecutor):
        def step(self, stages, *args, **kwargs):
            if self._fed == 0:
                self.load_state_dict(states[self.remote.place.block], stages)
            return super().step(stages, *args, **kwargs)

    found = apart(model(), 3, batches[6:], cut(Resumed), after=save)
    unfinished = [len({number // microbatches for number in numbers}) for numbers in flights]
    assert [calls for _, calls in found] == [6 + batches for batches in unfinished]


@pytest.mark.parametrize("in_flight", [0, -1, 1.5, True])
def test_bad_bounds(in_flight):
    with pytest.raises(ValueError, match="in-flight is"):
        FreeRunningExecutor(None, in_flight=in_flight)


def test_a_block_that_would_wait_repeats_its_latest_w_step():
    """The top of two blocks waits for a block that sleeps, and goes on learning; no more often than it may."""
    calls = {}

    class Slow(FreeRunningExecutor):
        def step(self, *args, **kwargs):
            if self.remote.first:
                time.sleep(0.05)
            return super().step(*args, **kwargs)

    def after(algo, neighbours):
        calls[neighbours.place.block] = algo.wsteps[neighbours.place.block - 1].calls

    apart(model(), 2, data(), lambda remote: Slow(remote, repeats=3), after=after)
    assert 12 < calls[2] <= 12 * 4
    apart(model(), 2, data(), Slow, after=after)
    assert calls == {1: 12, 2: 12}


@pytest.mark.parametrize("slow", [2, 3])
def test_the_newest_of_the_messages_that_wait_wins(slow):
    """The others go on sending while one sleeps; what it passes over, all others do without."""
    learnt, passed = {}, {}

    class Slow(FreeRunningExecutor):
        def step(self, *args, **kwargs):
            if self.remote.place.block == slow:
                time.sleep(0.02)
            report = super().step(*args, **kwargs)
            k = self.remote.place.block
            learnt[k] = learnt.get(k, 0) + len(report.links) + (report.loss == report.loss)
            return report

    def after(algo, neighbours):
        k = neighbours.place.block
        passed[k] = algo.executor.passed
        assert not algo.executor._late.flights
        return algo.wsteps[k - 1].calls

    # a step-size schedule goes on where a batch is passed over
    assert apart(model(), 3, data(24), lambda remote: Slow(remote, in_flight=6, newest=True), after=after) == [24] * 3
    assert passed[1] >= passed[2] >= passed[3]
    assert passed[slow] > 0
    assert learnt[3] == 24 - passed[3]
    apart(model(), 3, data(24), lambda remote: Slow(remote, in_flight=6), after=after)
    assert passed == {1: 0, 2: 0, 3: 0}


def test_where_nothing_waits_the_newest_is_the_oldest():
    expected = alone(model(), 2, data(), "local")
    found = apart(model(), 2, data(), lambda remote: FreeRunningExecutor(remote, in_flight=1, newest=True))
    torch.testing.assert_close(torch.cat(found), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("more", [{"repeats": 1}, {"newest": True}, {"cache": lambda: GluingCache(EXAMPLES)}])
def test_microbatches_exclude_what_is_of_whole_batches(more):
    with pytest.raises(ValueError, match="microbatches is 2, and"):
        FreeRunningExecutor(None, microbatches=2, **more)


def test_a_batch_that_is_passed_over_leaves_the_weights():
    """The only feedback of a lone batch is empty: block 1 stays where it was, and the second batch is learnt from."""

    class Blind(FreeRunningExecutor):
        def step(self, *args, **kwargs):
            if self.remote.last and self._fed == 0:
                while not self.remote.post.newer("output", 0):
                    time.sleep(0.001)
            return super().step(*args, **kwargs)

    second = data(2)[1:]
    expected = alone(model(), 2, second, "local")
    found = apart(model(), 2, data(2), lambda remote: Blind(remote, newest=True))
    torch.testing.assert_close(torch.cat(found), expected, rtol=1e-12, atol=1e-13)


def test_a_cache_keeps_the_feedback_of_all():
    with pytest.raises(ValueError, match="expected one of the two"):
        FreeRunningExecutor(None, newest=True, cache=lambda: GluingCache(EXAMPLES))


def test_a_repeated_w_step_is_a_gradient_step_on_the_same_target():
    x, y, _ = data()[0]
    blocks = blockprop.split(model(), 2)
    algo = blockprop.BlockProp(blocks, nn.CrossEntropyLoss(), sgd(0.1))
    late = LateStage(algo.stages[1], 2, Correction(curvature=Constant(0.0)))
    h = blocks[0](x).detach()
    assert not late.again()
    late.forward(0, h, 0)
    late.learn_top(0, y)
    late.update()
    once = copy.deepcopy(blocks[1])
    assert late.again()
    nn.functional.cross_entropy(once(h), y).backward()
    for ours, theirs in zip(blocks[1].parameters(), once.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs - 0.1 * theirs.grad)


def test_the_mean_of_what_has_come_counts_what_is_repeated():
    """Of three gradients that an update is of, one is a repeated one and one is lost: it is the mean of the two."""
    x, y, _ = data()[0]
    blocks = blockprop.split(model(), 2)
    algo = blockprop.BlockProp(blocks, nn.CrossEntropyLoss(), sgd(0.1), accumulate=3)
    late = LateStage(algo.stages[1], 2, Correction())
    h = blocks[0](x).detach()
    once = copy.deepcopy(blocks[1])
    late.forward(0, h, 0)
    late.learn_top(0, y)
    late.update()
    assert late.again()
    late.drop(1)
    late.update()
    nn.functional.cross_entropy(once(h), y).backward()
    for ours, theirs in zip(blocks[1].parameters(), once.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs - 0.1 * theirs.grad)


def test_repeated_w_steps_do_not_use_up_the_step_size_schedule():
    x, y, _ = data()[0]

    def falling(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda updates: 1 - updates / 10)

    blocks = blockprop.split(model(), 2)
    algo = blockprop.BlockProp(blocks, nn.CrossEntropyLoss(), sgd(0.1), scheduler=falling)
    late = LateStage(algo.stages[1], 2, Correction())
    for number in range(3):
        late.forward(number, blocks[0](x).detach(), number)
        late.learn_top(number, y)
        late.update()
        assert late.again() and late.again()
    assert algo.wsteps[1].lr == pytest.approx(0.07)


def test_there_is_room_for_all_that_may_be_on_its_way():
    """What is shared at an evaluation comes behind all the feedback, of which none is taken before."""
    ahead = threading.Event()
    batches = data(90, 2)

    def work(rank, rendezvous):
        neighbours = Neighbours(Place.of_rank(rank, 2), rendezvous)
        blocks = blockprop.split(model(), 2)
        executor = FreeRunningExecutor(neighbours, in_flight=90)
        algo = blockprop.BlockProp(blocks, nn.CrossEntropyLoss(), sgd(0.1), executor=executor)
        if rank == 1:
            assert ahead.wait(30)
        for x, y, ids in batches:
            algo.step(x if rank == 0 else None, y if rank == 1 else None, ids)
        ahead.set()
        told = neighbours.share(rank)
        algo.finish()
        algo.close()
        return told

    assert together(2, work) == [1, 1]
