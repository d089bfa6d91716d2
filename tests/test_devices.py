"""Blocks on two devices, where there is one: tensors that have a device and a shape, and no values.

An operation on tensors of two devices fails as it would on real ones; what is asked of values is answered at random.
"""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

import blockprop
from blockprop.cache import GluingCache
from blockprop.curvature import Constant, PerExample, Secant
from blockprop.diagnostics import alignment, curvature
from blockprop.executors import CachedExecutor, PipelinedExecutor, ReplayedExecutor
from blockprop.hsolvers import Backtracking, GaussNewton, GradientDescent
from conftest import sgd

DEVICES = ("cpu", "lazy:0")  # any name of a device will do that needs no driver


class Pretended(FakeTensorMode):
    """Tensors without values, whose values are told nevertheless: 1, and equal to each other; conditions as given."""

    def __init__(self, true=True):
        super().__init__(allow_non_fake_inputs=True)
        self.true = true

    def dispatch(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            return self.true if args[0].dtype == torch.bool else torch.ones((), dtype=args[0].dtype).item()
        if func is torch.ops.aten.equal.default:
            return True
        return super().dispatch(func, types, args, kwargs)


class Cache(GluingCache):
    def check(self, ids, count):
        return ids  # that no number is in the batch twice cannot be told without values


def cache():
    return Cache(8)


EXECUTORS = {
    "local": lambda: "local",
    "pipeline": lambda: PipelinedExecutor(curvature=Constant(0.1), microbatches=2),
    "pipeline, measured": lambda: PipelinedExecutor(curvature=Secant(1), along=True, across=PerExample(Secant(1))),
    "pipeline, stashed": lambda: PipelinedExecutor(curvature=Constant(0), reuse=True, compensation=0.1),
    "pipeline, cached": lambda: PipelinedExecutor(curvature=Secant(1), cache=cache, refresh=2),
    "cached": lambda: CachedExecutor(cache(), curvature=Secant(1)),
}


def network(first, second):
    return nn.Sequential(
        nn.Linear(6, 12, device=first),
        nn.Dropout(0.1),
        nn.Linear(12, 12, device=second),
        nn.BatchNorm1d(12, device=second),
        nn.Linear(12, 5, device=second),
    )


def step(algo):
    for _ in range(5):
        algo.step(torch.randn(8, 6), torch.randint(5, (8,)), torch.arange(8))


def train(first, second, executor, true=True, **more):
    with Pretended(true):
        blocks = blockprop.split(network(first, second), at=["2"])
        algo = blockprop.BlockProp(blocks, nn.CrossEntropyLoss(), sgd(), executor=executor, **more)
        step(algo)
        algo.finish()


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
@pytest.mark.parametrize("devices", [DEVICES, DEVICES[::-1]])
@pytest.mark.parametrize("true", [True, False])
@pytest.mark.parametrize("executor", EXECUTORS)
def test_messages_come_to_the_block_s_device(executor, true, devices):
    train(*devices, EXECUTORS[executor](), true)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
@pytest.mark.parametrize("devices", [DEVICES, DEVICES[::-1]])
def test_a_pipeline_that_is_watched(devices):
    with Pretended():
        executor = PipelinedExecutor(curvature=Constant(0.1))
        blocks = blockprop.split(network(*devices), at=["2"])
        algo = blockprop.BlockProp(blocks, nn.CrossEntropyLoss(), sgd(), executor=executor)
        executor.watch(2)
        step(algo)
        assert len(executor.watched()) == 2


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
@pytest.mark.parametrize("devices", [DEVICES, DEVICES[::-1]])
@pytest.mark.parametrize(
    "more",
    [
        {"recompute": True},
        {"form": "published"},
        {"form": "rescaled"},
        {"form": "proximal", "h_solver": GradientDescent(2, 0.1)},
        {"form": "proximal", "h_solver": Backtracking(2)},
        {"form": "proximal", "h_solver": GaussNewton(2)},
    ],
)
def test_every_form_and_solver(more, devices):
    train(*devices, "local", **more)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
def test_a_checkpoint_comes_from_the_processor():
    """What was on its way lies in the processor's memory until it is used."""

    def pipeline():
        return PipelinedExecutor(curvature=Constant(0), reuse=True, prediction=1.0)

    with Pretended():
        blocks = blockprop.split(network("lazy:0", "lazy:0"), at=["2"])
        first = blockprop.BlockProp(blocks, nn.CrossEntropyLoss(), sgd(), executor=pipeline())
        step(first)
        state = tree_map_only(torch.Tensor, lambda value: value.to("cpu"), first.executor.state_dict())
        second = blockprop.BlockProp(blocks, nn.CrossEntropyLoss(), sgd(), executor=pipeline())
        second.executor.load_state_dict(state, second.stages)
        step(second)
        second.finish()


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
@pytest.mark.parametrize("devices", [DEVICES, DEVICES[::-1]])
def test_diagnostics(devices):
    with Pretended():
        blocks = blockprop.split(network(*devices), at=["2"])
        algo = blockprop.BlockProp(blocks, nn.CrossEntropyLoss(), sgd())
        batch = torch.randn(8, 6), torch.randint(5, (8,))
        assert len(alignment(algo, *batch)) == 2
        assert len(curvature(algo, *batch)) == 1


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
@pytest.mark.parametrize("devices", [DEVICES, DEVICES[::-1]])
def test_algorithm_2(devices):
    train(*devices, ReplayedExecutor(cache(), refresh=2), form="published")


@pytest.mark.gpu
def test_two_devices_train_as_one():
    """The same on a real device, with its values."""
    device = torch.accelerator.current_accelerator()
    if device is None:
        pytest.skip("there is no accelerator")
    weights = {}
    for devices in (["cpu"], ["cpu", str(device)], [str(device), "cpu"]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 5))
        algo = blockprop.BlockProp(blockprop.split(model, 2), nn.CrossEntropyLoss(), sgd(), devices=devices)
        for _ in range(5):
            algo.step(torch.randn(8, 6), torch.randint(5, (8,)))
        weights[tuple(devices)] = torch.cat([parameter.detach().cpu().flatten() for parameter in model.parameters()])
    reference = weights.pop(("cpu",))
    for found in weights.values():
        torch.testing.assert_close(found, reference, rtol=1e-3, atol=1e-5)
