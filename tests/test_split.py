"""Where a network is cut: balanced, in order, and with nothing lost."""

import itertools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

import blockprop
from blockprop.split import balanced
from conftest import batch, mlp

COSTS = st.lists(st.integers(0, 9), min_size=1, max_size=7)


def brute_force(costs, blocks):
    """The least (dearest, squares, beginnings) of every cut there is."""
    found = []
    for starts in itertools.combinations(range(1, len(costs)), blocks - 1):
        starts = [0, *starts]
        groups = [sum(costs[a:b]) for a, b in zip(starts, [*starts[1:], len(costs)], strict=True)]
        found.append((max(groups), sum(group**2 for group in groups), starts))
    return min(found)


def groups_of(costs, starts):
    return [sum(costs[a:b]) for a, b in zip(starts, [*starts[1:], len(costs)], strict=True)]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(costs=COSTS, data=st.data())
def test_balanced_makes_the_dearest_group_as_cheap_as_can_be(costs, data):
    blocks = data.draw(st.integers(1, len(costs)))
    starts = balanced(costs, [1.0] * blocks)
    assert starts[0] == 0
    assert len(starts) == blocks
    assert starts == sorted(set(starts))
    assert max(groups_of(costs, starts)) == brute_force(costs, blocks)[0]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(costs=COSTS, data=st.integers(0, 6))
@example(costs=[8, 9, 9, 2, 20, 2, 30], data=4)
def test_balanced_is_the_most_even_of_those(costs, data):
    blocks = 1 + data % len(costs)
    assert balanced(costs, [1.0] * blocks) == brute_force(costs, blocks)[2]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(depth=st.integers(1, 6), data=st.data(), by=st.sampled_from(["flops", "layers"]), sampled=st.booleans())
def test_a_split_covers_every_layer_in_order_and_touches_no_name(depth, data, by, sampled):
    torch.manual_seed(0)
    model, (x, _) = mlp(depth), batch()
    K = data.draw(st.integers(1, depth))
    keys, before = list(model.state_dict()), [p.clone() for p in model.parameters()]
    blocks = blockprop.split(model, K, by=by, sample=x if sampled else None)
    assert len(blocks) == K
    assert [layer for block in blocks for layer in block] == list(model)
    assert list(itertools.chain(*blocks.cut.layers)) == [name for name, _ in model.named_children()]
    assert blocks.model is model
    assert list(model.state_dict()) == keys
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert torch.equal(blocks(x), model(x))
    assert len(blocks.cut.costs) == K
    for block in blocks:
        assert sum(isinstance(layer, nn.Linear) for layer in block) >= 1


def test_nested_sequentials_are_opened_and_other_modules_stay_whole():
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))

        def forward(self, x):
            return x + self.inner(x)

    class OwnForward(nn.Sequential):
        def forward(self, x):
            return x + super().forward(x)

    hooked = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    hooked.register_forward_hook(lambda module, args, output: 2 * output)
    model = nn.Sequential(
        nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.ReLU(), nn.Linear(6, 6))),
        Whole(),
        OwnForward(nn.Linear(6, 6), nn.Linear(6, 6)),
        hooked,
    )
    blocks = blockprop.split(model, 5, by="layers")
    assert blocks.cut.layers == (("0.0", "0.1.0"), ("0.1.1",), ("1",), ("2",), ("3",))
    x = torch.randn(2, 6)
    assert torch.equal(blocks(x), model(x))


def test_a_module_that_occurs_twice_is_applied_twice():
    relu = nn.ReLU()
    model = nn.Sequential(nn.Linear(6, 8), relu, nn.Linear(8, 8), relu, nn.Linear(8, 5))
    x = torch.randn(4, 6)
    torch.testing.assert_close(blockprop.split(model, 2)(x), model(x))


def test_a_model_with_a_forward_of_its_own_is_refused():
    class Residual(nn.Sequential):
        def forward(self, x):
            return x + super().forward(x)

    with pytest.raises(ValueError, match="forward"):
        blockprop.split(Residual(nn.Linear(6, 6), nn.Linear(6, 6)), 2)


def test_one_name_as_a_string_is_not_taken_letter_by_letter():
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(13)))
    try:
        cut = str(blockprop.split(model, at="12").cut)
    except ValueError:
        return
    assert cut == "0..11 | 12"


def test_a_cut_at_names():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 2))
    blocks = blockprop.split(model, at=["1", "3"])
    assert blocks.cut.layers == (("0",), ("1.0", "1.1", "2"), ("3",))
    assert blocks.cut.by == "names"
    assert str(blocks.cut) == "0 | 1.0..2 | 3"
    assert blocks.cut.as_dict() == {"by": "names", "layers": [["0"], ["1.0", "1.1", "2"], ["3"]], "costs": []}
    assert str(blockprop.split(model, at=["1.1"]).cut) == "0..1.0 | 1.1..3"
    assert len(blockprop.split(model, at=[])) == 1


def test_flops_and_weights_balance_differently_where_convolutions_are():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Flatten(), nn.Linear(512, 10)
    )
    with pytest.warns(UserWarning, match=r"by weights.*layer '0'.*split\(model, K, sample=x\)") as caught:
        by_weights = blockprop.split(model, 2)
    assert caught[0].filename == __file__
    assert len(caught) == 1
    assert (by_weights.cut.by, str(by_weights.cut)) == ("weights", "0..2 | 3")
    by_flops = blockprop.split(model, 2, sample=torch.zeros(1, 3, 8, 8))
    assert by_flops.cut.by == "flops"
    assert by_flops.cut.costs == (2 * 64 * 216, 2 * 64 * 576 + 2 * 5120)  # 2 FLOPs a multiply-add
    assert str(by_flops.cut) == "0 | 1..3"


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2)), {}),
        (nn.Sequential(nn.Conv1d(4, 4, 1), nn.Conv1d(4, 4, 1), nn.Conv1d(4, 2, 1)), {"blocks": 1}),
        (nn.Sequential(nn.Conv1d(4, 4, 1), nn.Conv1d(4, 4, 1), nn.Conv1d(4, 2, 1)), {"blocks": 3}),
        (nn.Sequential(nn.Conv1d(4, 4, 1), nn.Conv1d(4, 4, 1), nn.Conv1d(4, 2, 1)), {"by": "layers"}),
        (nn.Sequential(nn.Conv1d(4, 4, 1), nn.Conv1d(4, 4, 1), nn.Conv1d(4, 2, 1)), {"sample": torch.zeros(1, 4, 3)}),
    ],
)
def test_no_warning_where_the_cut_is_what_was_asked_for(model, settings, recwarn):
    blockprop.split(model, **{"blocks": 2, **settings})
    assert not recwarn


@pytest.mark.parametrize("at", [[2], [0, 2], 2, ["0", 2], [2.0], [None]])
def test_a_cut_at_numbers_is_refused_with_the_names(at):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"expected names .*at=\['2'\]; the model has 0, 1, 2") as caught:
        blockprop.split(model, at=at)
    assert "\n" not in str(caught.value)


def test_a_split_by_time_takes_the_slow_layer_for_slow():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1500), nn.Linear(1500, 1500), nn.Linear(1500, 2))
    blocks = blockprop.split(model, 2, by="time", sample=torch.randn(64, 2))
    assert blocks.cut.by == "time"
    assert blocks.cut.layers[1][0] in ("2", "3")  # the slow layer is at the cut
    assert all(seconds > 0 for seconds in blocks.cut.costs)


def test_a_list_of_modules_is_a_model():
    layers = [nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)]
    for model in (layers, tuple(layers), nn.ModuleList(layers)):
        blocks = blockprop.split(model, 2)
        assert [layer for block in blocks for layer in block] == layers


def test_layers_that_do_not_fit_each_other_are_named():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(6, 2))
    with pytest.raises(ValueError, match=r"layer '2' \(Linear\) does not take an input of shape \[3, 5\]"):
        blockprop.split(model, 2, sample=torch.zeros(3, 4))


@pytest.mark.parametrize("passes", [[1.0], [1.0, 0.0], [1.0, float("inf")]])
def test_bad_numbers_of_passes(passes):
    with pytest.raises(ValueError, match="passes is .* for 2 blocks; expected as many positive numbers"):
        blockprop.split(mlp(depth=4), 2, passes=passes)


def test_a_block_of_more_passes_has_fewer_layers():
    model = mlp(depth=7, width=8, inputs=8, classes=8)
    lower, upper = blockprop.split(model, 2, by="layers", passes=[4, 3])
    assert (len(lower), len(upper)) == (6, 7)  # three layers of two modules, and four of which the last has one
