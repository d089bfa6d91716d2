"""What a step costs: exact numbers where they can be said, Appendix A's bounds on every model of the zoo."""

import itertools

import pytest
import torch
from torch import nn

import blockprop
from blockprop.cost import count_flops, counted
from blockprop.experiments.cost import random_data
from blockprop.hsolvers import GradientDescent
from blockprop.models import NAMES, build, gpt
from blockprop.stepcost import CASES, Case, StepCost, step_costs

CE = nn.CrossEntropyLoss()
AS_PUBLISHED = Case("published", reuse=False)
N, WIDTHS = 4, (9, 7, 8, 6, 5)
LAYERS = [2.0 * N * a * b for a, b in itertools.pairwise(WIDTHS)]  # FLOPs of each layer's one product


def chain(K: int, **settings):
    """A perceptron of four layers in K blocks, with the numbers of the layers of each block."""
    layers = [layer for a, b in itertools.pairwise(WIDTHS) for layer in (nn.Linear(a, b), nn.ReLU())]
    blocks = blockprop.split(nn.Sequential(*layers[:-1]), K, by="layers")
    cut = [[int(name) // 2 for name in names if int(name) % 2 == 0] for names in blocks.cut.layers]
    x, y = torch.randn(N, WIDTHS[0]), torch.randint(WIDTHS[-1], (N,))
    return step_costs(blocks, CE, x, y, **settings), cut


def flops(cut, *, first_inputs: bool) -> float:
    """Of one product a layer of these blocks: with or without the first layer of each."""
    return sum(LAYERS[i] for block in cut for i in (block if first_inputs else block[1:]))


@pytest.mark.parametrize("form", ["published", "rescaled", "exact", "proximal"])
@pytest.mark.parametrize(("K", "h_steps"), [(2, 1), (4, 3)])
def test_the_parts_are_those_of_a_step_as_it_is_trained(form, K, h_steps):
    """The same counter around the whole of `step`, of an algorithm that knows nothing of parts."""
    torch.manual_seed(0)
    layers = [layer for a, b in itertools.pairwise(WIDTHS) for layer in (nn.Linear(a, b), nn.ReLU())]
    blocks = blockprop.split(nn.Sequential(*layers[:-1]), K, by="layers")
    x, y = torch.randn(N, WIDTHS[0]), torch.randint(WIDTHS[-1], (N,))
    expected = step_costs(blocks, CE, x, y, h_steps=h_steps).cases[Case(form)].total
    settings = {} if form == "exact" else {"h_solver": GradientDescent(h_steps, 0.01)}
    algo = blockprop.BlockProp(blocks, CE, lambda params: torch.optim.SGD(params, lr=0.1), form=form, **settings)
    assert counted(algo.step, x, y)[1] == expected


@pytest.mark.parametrize("K", [2, 3, 4])
@pytest.mark.parametrize("h_steps", [1, 3])
def test_every_part_is_the_products_it_takes(K, h_steps):
    """A layer's forward pass, its weights' gradient and its input's gradient are one product each."""
    costs, cut = chain(K, h_steps=h_steps)
    F, upper_F = flops(cut, first_inputs=True), flops(cut[1:], first_inputs=True)
    inside = flops(cut, first_inputs=False)  # input gradients that weights' gradients need anyway
    assert costs.forward == F
    assert costs.backprop == 3 * F - LAYERS[0]
    expected = {
        AS_PUBLISHED: StepCost(F, h_steps * 2 * upper_F, 2 * F + inside),
        Case("published"): StepCost(F, (2 * h_steps - 1) * upper_F, F + upper_F + inside),
        Case("published", cached=True): StepCost(0, 0, 2 * F + inside),
        Case("exact"): StepCost(F, upper_F, F + flops(cut[:1], first_inputs=False)),
        Case("exact", cached=True): StepCost(F, 0, F + inside),
        Case("proximal"): StepCost(F, (2 * h_steps - 1) * upper_F, F + flops(cut[:1], first_inputs=False)),
    }
    for case, cost in expected.items():
        assert costs.cases[case] == cost, case
    for cached in (False, True):
        assert costs.cases[Case("rescaled", cached=cached)] == costs.cases[Case("published", cached=cached)]
        if cached:
            assert costs.cases[Case("proximal", cached=True)] == costs.cases[Case("exact", cached=True)]


@pytest.mark.parametrize("K", [2, 3, 4])
@pytest.mark.parametrize("h_steps", [1, 2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_appendix_a_bounds_the_published_form(name, K, h_steps):
    """C(backprop) + C(forward) < C(total) < C(forward) + (N_h + 1) C(backprop), nothing shared."""
    data = random_data(name, 2, context=8)
    sizes = {"mlp": {"width": 12, "depth": 5}, "gpt": {"width": 16, "depth": 3}}.get(name, {"width": 2})
    blocks = blockprop.split(build(name, data, **sizes), K, sample=data.sample)
    batch = data.train.batch(torch.arange(2))
    costs = step_costs(
        blocks, CE, *batch, h_steps=h_steps, cases=[AS_PUBLISHED, Case("exact"), Case("exact", cached=True)]
    )
    total = costs.cases[AS_PUBLISHED].total
    assert costs.backprop + costs.forward < total < costs.forward + (h_steps + 1) * costs.backprop
    assert costs.verdict(AS_PUBLISHED) == "within"
    # one graph for both gradients: backprop's FLOPs, below the lower bound
    assert costs.cases[Case("exact")].total == costs.backprop
    assert costs.verdict(Case("exact")) == "below"
    assert costs.cases[Case("exact", cached=True)].total <= costs.backprop


def test_sharing_takes_the_published_form_below_the_bound_by_the_first_blocks_forward_pass():
    """One layer a block, N_h = 1: what is shared is worth F_1 more than the bound allows for."""
    costs, _ = chain(4)
    assert costs.cases[Case("published")].total == costs.lower - LAYERS[0]
    assert costs.verdict(Case("published")) == "below"
    costs, _ = chain(4, h_steps=3)
    assert costs.verdict(Case("published")) == "within"


def test_verdicts_at_the_bounds():
    costs, _ = chain(2, cases=[AS_PUBLISHED])
    for total, verdict in ((0.0, "below"), (costs.upper(AS_PUBLISHED), "above"), (costs.lower * 1.01, "within")):
        costs.cases[AS_PUBLISHED] = StepCost(total, 0, 0)
        assert costs.verdict(AS_PUBLISHED) == verdict
    assert costs.upper(Case("exact")) == costs.forward + 2 * costs.backprop


def test_attention_counts_on_every_device():
    model = gpt(11, context=8, width=16, depth=1, heads=2)
    tokens = torch.zeros(3, 8, dtype=torch.long)
    (block,) = [
        cost
        for (name, _), cost in zip(model.named_children(), count_flops([*model.named_children()], tokens), strict=True)
        if name == "block1"
    ]
    products = 2 * 3 * 8 * 16 * (3 * 16 + 16 + 4 * 16 + 4 * 16)
    attention = 2 * (2 * 3 * 8 * 8 * 16)  # queries by keys, weights by values
    assert block == products + attention
    x = torch.randn(3, 8, 16, requires_grad=True)
    _, both = counted(lambda: torch.autograd.grad(model.block1(x).sum(), [x, *model.block1.parameters()]))
    assert both == 3 * block


def test_a_count_of_a_gradient_to_a_modules_input():
    """Where the counter by modules gives up."""
    layer, x = nn.Linear(3, 5), torch.randn(2, 3, requires_grad=True)
    assert counted(lambda: torch.autograd.grad(layer(x).sum(), x))[1] == 2 * (2 * 2 * 3 * 5)


def test_seconds_of_every_case_and_nothing_is_touched():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4)).eval()
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    batch = torch.zeros(5, 6), torch.arange(5) % 4
    costs = step_costs(blockprop.split(model, 2), CE, *batch, h_steps=2, repeats=2)
    assert set(costs.cases) == set(CASES)
    for case, cost in costs.cases.items():
        assert cost.total > 0
        assert (cost.h_step == 0) is case.cached
        assert (cost.forward == 0) is (case.cached and case.form in ("published", "rescaled"))
    assert 0 < costs.forward < costs.backprop
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"K": 1}, "a network of 1 block has no h-step"),
        ({"K": 2, "repeats": -1}, "repeats is -1"),
        ({"K": 2, "h_steps": 0}, "h-steps is 0"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        chain(**settings)


def test_cases_by_name():
    assert [str(case) for case in CASES[:3]] == ["published, nothing shared", "published", "published, cached"]
    assert len(set(CASES)) == len(CASES) == 9
