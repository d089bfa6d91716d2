import pytest
import torch
from torch import nn

from blockprop.experiments.optimizers import MuonAndAdamW, optimizer_named


def block():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def step(optimizer, model, seed):
    torch.manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()


@pytest.mark.parametrize("name", ["sgd", "nesterov", "adam", "adamw", "nadam", "muon"])
def test_every_optimizer_resumes_bit_for_bit(name):
    make = optimizer_named(name, 0.01, 0.8, 0.1)
    one, other = block(), block()
    first, second = make(one.parameters()), make(other.parameters())
    step(first, one, 1)
    step(second, other, 1)
    resumed = make(other.parameters())
    resumed.load_state_dict(second.state_dict())
    step(first, one, 2)
    step(resumed, other, 2)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_muon_takes_the_matrices_and_adamw_the_rest():
    model, muon, adamw = block(), block(), block()
    step(MuonAndAdamW(model.parameters(), 0.02, 0.1), model, 1)
    step(torch.optim.Muon([p for p in muon.parameters() if p.ndim == 2], lr=0.02, weight_decay=0.1), muon, 1)
    step(torch.optim.AdamW(adamw.parameters(), lr=0.003, weight_decay=0.1), adamw, 1)
    for found, matrix, other in zip(model.parameters(), muon.parameters(), adamw.parameters(), strict=True):
        assert torch.equal(found, matrix if found.ndim == 2 else other)


def test_a_scheduler_moves_both_step_sizes():
    model = block()
    optimizer = MuonAndAdamW(model.parameters(), 0.02)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.0)
    before = [p.detach().clone() for p in model.parameters()]
    step(optimizer, model, 1)
    for old, p in zip(before, model.parameters(), strict=True):
        assert torch.equal(old, p)


def test_a_block_without_matrices_and_one_of_nothing_else():
    norm = nn.LayerNorm(4)
    step(MuonAndAdamW(norm.parameters(), 0.02), norm, 1)
    linear = nn.Linear(4, 4, bias=False)
    step(MuonAndAdamW(linear.parameters(), 0.02), linear, 1)
    assert not torch.equal(norm.weight, torch.ones(4))


@pytest.mark.parametrize("name", ["adam", "adamw", "nadam"])
def test_momentum_is_the_first_beta(name):
    for given, expected in ((None, 0.9), (0.8, 0.8), (0.0, 0.0)):
        assert optimizer_named(name, 0.01, given)(block().parameters()).defaults["betas"] == (expected, 0.999)


def test_momentum_of_sgd():
    for name, given, expected in (("sgd", None, 0.0), ("sgd", 0.5, 0.5), ("nesterov", None, 0.9)):
        assert optimizer_named(name, 0.01, given)(block().parameters()).defaults["momentum"] == expected
