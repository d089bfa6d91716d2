"""A process for every block in lock-step: the numbers of the same schedule in one process."""

import copy
import dataclasses
import math

import pytest
import torch
from meeting import alone, apart, numbered

from blockprop.cache import GluingCache
from blockprop.curvature import Constant, Secant
from blockprop.executors import PipelinedExecutor
from blockprop.schedules import Latency, sequential
from conftest import batch, mlp

EXAMPLES = 24


def model():
    torch.manual_seed(1)
    return mlp(depth=4)


def data(count=12, n=8):
    torch.manual_seed(2)
    return numbered([batch(n) for _ in range(count)], EXAMPLES)


def made(**settings):
    """New curvatures and caches for every process."""
    fresh = {key: copy.deepcopy(value) if key in ("curvature", "across") else value for key, value in settings.items()}
    return lambda remote=None: PipelinedExecutor(remote=remote, **copy.deepcopy(fresh))


@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"curvature": Secant(2), "along": True, "across": Secant(2)},
        {"microbatches": 3, "curvature": Constant(0.3)},
        {"microbatches": 3, "curvature": Secant(2)},
        {"latency": Latency(3, 0.2, 1)},
        {"reuse": True, "compensation": 0.1},
        {"prediction": 1.0},
        {"cache": lambda: GluingCache(EXAMPLES, dtype=torch.float64), "refresh": 2, "along": True},
        {"cache": lambda: GluingCache(EXAMPLES, dtype=torch.float64), "reuse": True, "curvature": Secant(2)},
        {"cache": lambda: GluingCache(EXAMPLES, dtype=torch.float64), "along": True, "microbatches": 2, "refresh": 2},
        {"schedule": sequential},
    ],
)
def test_the_numbers_are_those_of_one_process(K, settings):
    executor = made(**settings)
    expected = alone(model(), K, data(), executor())
    found = apart(model(), K, data(), executor)
    torch.testing.assert_close(torch.cat(found), expected, rtol=1e-12, atol=1e-13)


def test_the_sequential_schedule_is_the_exact_form():
    expected = alone(model(), 3, data(), "local")
    found = apart(model(), 3, data(), made(schedule=sequential))
    torch.testing.assert_close(torch.cat(found), expected, rtol=1e-12, atol=1e-13)


def test_batches_of_different_sizes():
    sizes = (8, 3, 1, 8)
    torch.manual_seed(3)
    batches = [(*batch(n), torch.arange(n)) for n in sizes]
    expected = alone(model(), 2, batches, PipelinedExecutor(microbatches=2))
    found = apart(model(), 2, batches, made(microbatches=2))
    torch.testing.assert_close(torch.cat(found), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_coarser_messages_train_as_well(precision):
    exact = torch.cat(apart(model(), 2, data(), made()))
    coarse = torch.cat(apart(model(), 2, data(), made(), precision=precision))
    start = torch.cat([p.detach().flatten() for p in model().parameters()])
    assert not torch.equal(exact, coarse)
    assert (coarse - exact).norm() < 0.05 * (exact - start).norm()


@pytest.mark.parametrize("K", [1, 2])
def test_replicas_train_as_one(K):
    """With batches that R divides, the replicas' mean gradient is the batch's."""
    settings = {"curvature": Constant(0.3), "trust": math.inf}  # measured by each replica for itself
    expected = alone(model(), K, data(), made(**settings)())
    found = apart(model(), K, data(), made(**settings), replicas=2)
    for replica in range(2):
        weights = torch.cat(found[replica::2])
        torch.testing.assert_close(weights, expected, rtol=1e-10, atol=1e-12)


def test_reports_are_of_the_link_above():
    def after(algo, neighbours):
        report = algo.executor._lates[neighbours.place.block - 1]
        return neighbours.place.block, len(report.flights), neighbours.traffic(), neighbours.waited

    found = apart(model(), 3, data(), made(), after=after)
    assert [(k, flights) for k, flights, _, _ in found] == [(1, 0), (2, 0), (3, 0)]
    up, down = ([traffic[way] for _, _, traffic, _ in found] for way in ("up", "down"))
    assert up[2] == down[0] == 0
    assert min(up[:2]) > 12 * 8 * 12 * 8  # batches x examples x width x bytes
    assert all(waited > 0 for *_, waited in found)


def test_prediction_goes_through_the_pipeline():
    x, _ = batch(5)

    def after(algo, neighbours):
        outputs = algo.predict(x if neighbours.first else None)
        return neighbours.share(None if outputs is None else outputs.tolist()), outputs

    found = apart(model(), 3, [], made(), after=after)
    torch.testing.assert_close(found[2][1], model()(x).detach())
    assert [outputs for _, outputs in found[:2]] == [None, None]
    assert found[0][0] == found[1][0] == found[2][0] == found[2][1].tolist()


def test_other_examples_are_refused():
    """One process that draws its batches with another seed would pair inputs with the labels of others."""

    class Shifted(PipelinedExecutor):
        def step(self, stages, x, y, *, ids=None, **more):
            return super().step(stages, x, y, ids=ids if self.remote.first else ids.flip(0), **more)

    with pytest.raises(ValueError, match="block 2 has other examples in batch 0"):
        apart(model(), 2, data(), lambda remote: Shifted(remote=remote))


def test_blocks_that_do_not_meet():
    network = torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.Tanh(), torch.nn.Linear(7, 5)).double()
    with pytest.raises(ValueError, match="block 2"):
        apart(network, 2, data(), made())


@pytest.mark.parametrize("count", [1, 3])
def test_a_cut_for_another_number_of_processes(count):
    def executor(remote):
        remote.place = dataclasses.replace(remote.place, blocks=count)
        return PipelinedExecutor(remote=remote)

    with pytest.raises(ValueError, match=f"cut into 2 blocks for {count} processes"):
        apart(model(), 2, data(), executor)
