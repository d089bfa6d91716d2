"""The W-step: gradients in, one optimizer step out."""

import copy

import pytest
import torch
from torch import nn

import blockprop
from blockprop.wstep import WStep
from conftest import batch, flat, mlp, sgd


def parameters(*values):
    return [nn.Parameter(torch.tensor(value)) for value in values]


def test_gradients_are_divided_and_added():
    a, b = parameters([1.0, 2.0], [3.0])
    wstep = WStep([a, b], sgd(1.0), accumulate=2)
    wstep.add([torch.tensor([4.0, 8.0]), None], divide_by=0.5)
    wstep.update()
    assert a.tolist() == [1.0, 2.0]
    assert a.grad.tolist() == [4.0, 8.0]
    assert b.grad is None
    wstep.add([torch.tensor([2.0, 2.0]), torch.tensor([1.0])])
    wstep.update()
    assert a.tolist() == [1 - 5.0, 2 - 9.0]
    assert b.tolist() == [2.5]
    assert a.grad is None


def test_a_sum_is_added_to_in_place_unless_somebody_holds_it():
    (a,) = parameters([0.0])
    wstep = WStep([a], sgd(1.0))
    wstep.add([torch.tensor([1.0])])
    first = a.grad
    wstep.add([torch.tensor([2.0])])
    assert a.grad is first
    assert wstep.hold() == [first]
    wstep.add([torch.tensor([4.0])])
    assert a.grad.tolist() == [7.0]
    assert first.tolist() == [3.0]


@pytest.mark.parametrize(("clip", "norm"), [(1.0, 1.0), (100.0, 5.0), (None, 5.0)])
def test_clipping_is_of_the_blocks_whole_gradient(clip, norm):
    a, b = parameters([0.0], [0.0])
    wstep = WStep([a, b], sgd(1.0), clip=clip)
    wstep.add([torch.tensor([3.0]), torch.tensor([4.0])])
    wstep.update()
    assert float(flat([a, b]).detach().norm()) == pytest.approx(norm, rel=1e-5)
    assert float(a.detach() / b.detach()) == pytest.approx(0.75)


def test_accumulated_gradients_are_clipped_once():
    (a,) = parameters([0.0])
    wstep = WStep([a], sgd(1.0), clip=1.0, accumulate=2)
    for value in (8.0, -7.0):
        wstep.add([torch.tensor([value])])
        wstep.update()
    assert a.tolist() == pytest.approx([-0.5])


def test_two_parameters_that_share_a_gradient_are_clipped_once():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(5, 6)), nn.Parameter(torch.randn(5, 6))

        def forward(self, x):
            return x @ (self.a + self.b).T

    model = Sum().double()
    twin = copy.deepcopy(model)
    x, y = batch()
    blockprop.BlockProp(blockprop.split(nn.Sequential(model), 1), nn.CrossEntropyLoss(), sgd(1.0), clip=1e-2).step(x, y)
    nn.functional.cross_entropy(twin(x), y).backward()
    torch.nn.utils.clip_grad_norm_(twin.parameters(), 1e-2)
    torch.optim.SGD(twin.parameters(), 1.0).step()
    torch.testing.assert_close(model.a, twin.a)


def test_a_block_without_parameters_does_nothing():
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    wstep = WStep([frozen], lambda params: pytest.fail("no optimizer for no parameters"))
    wstep.add([])
    wstep.update()
    wstep.forget()
    assert wstep.lr == 0
    twin = WStep([], sgd())
    twin.load_state_dict(wstep.state_dict())
    assert twin.calls == 1
    assert frozen.tolist() == [1, 1]


def test_the_scheduler_follows_the_updates_and_not_the_calls():
    (a,) = parameters([0.0])
    wstep = WStep([a], sgd(0.8), lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5), accumulate=2)
    seen = []
    for _ in range(4):
        wstep.add([torch.ones(1)])
        wstep.update()
        seen.append(wstep.lr)
    assert seen == pytest.approx([0.8, 0.4, 0.4, 0.2])
    assert a.item() == pytest.approx(-0.8 - 0.4)


def test_forgetting_leaves_weights_and_optimizer():
    (a,) = parameters([1.0])
    wstep = WStep([a], sgd())
    wstep.add([torch.ones(1)])
    wstep.forget()
    assert a.grad is None
    assert a.item() == 1.0


def test_state_round_trip_in_the_middle_of_an_accumulation():
    def make(a):
        schedule = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)  # noqa: E731
        return WStep([a], lambda params: torch.optim.Adam(params, 0.1), schedule, accumulate=3)

    (a,), (b,) = parameters([1.0, 2.0]), parameters([0.0, 0.0])
    first = make(a)
    for value in range(5):
        first.add([torch.tensor([1.0, value])])
        first.update()
    second = make(b)
    b.data.copy_(a.data)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for wstep in (first, second):
        for value in range(4):
            wstep.add([torch.tensor([value, -1.0])])
            wstep.update()
    assert torch.equal(a, b)
    assert first.lr == second.lr < 0.1


def test_a_state_of_another_block_is_refused():
    wstep = WStep(parameters([1.0]), sgd())
    with pytest.raises(ValueError, match="2 parameters, the block has 1"):
        wstep.load_state_dict(WStep(parameters([1.0], [2.0]), sgd()).state_dict())
    algo = blockprop.BlockProp(blockprop.split(mlp(), 2), nn.CrossEntropyLoss(), sgd())
    other = blockprop.BlockProp(blockprop.split(mlp(), 3), nn.CrossEntropyLoss(), sgd())
    with pytest.raises(ValueError, match="3 blocks, this network is cut into 2"):
        algo.load_state_dict(other.state_dict())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip": 0.0}, "clip"),
        ({"clip": float("nan")}, "clip"),
        ({"clip": float("inf")}, "clip"),
        ({"accumulate": 0}, "accumulate"),
        ({"accumulate": True}, "accumulate"),
        ({"accumulate": 1.5}, "accumulate"),
        pytest.param(
            {"optimizer": lambda params: None},
            "NoneType",
        ),
        ({"optimizer": list}, "list"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        WStep(parameters([1.0]), **{"optimizer": sgd(), **settings})


def test_an_optimizer_over_other_parameters_is_refused():
    block, other = nn.Linear(2, 2), nn.Linear(2, 2)
    with pytest.raises(ValueError, match="not the block's"):
        WStep(block.parameters(), lambda params: torch.optim.SGD(other.parameters(), lr=0.1))
