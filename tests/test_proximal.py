"""The proximal W-step: against the minimum it stands for, and as a torch optimizer."""

import pytest
import torch
from torch import nn

import blockprop
from blockprop.proximal import ProximalSGD, proximal_sgd
from conftest import batch, mlp


def test_a_step_of_1_is_the_minimum_of_the_proximal_problem():
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    a, z = torch.randn(20, 4), torch.randn(20, 3)
    start = torch.cat([layer.weight.detach(), layer.bias.detach()[:, None]], 1).clone()
    optimizer = ProximalSGD(layer.parameters(), [layer], lr=1.0, damping=0.5)
    (0.5 * (layer(a) - z).square().sum(1).mean()).backward()
    optimizer.step()
    a1 = torch.cat([a, torch.ones(20, 1)], 1)
    mu = 0.5 * (a1.T @ a1 / 20).diagonal().mean()
    expected = torch.linalg.solve(a1.T @ a1 / 20 + mu * torch.eye(5), a1.T @ z / 20 + mu * start.T).T
    found = torch.cat([layer.weight, layer.bias[:, None]], 1)
    assert torch.allclose(found, expected, atol=1e-5)


def test_other_parameters_and_layers_without_bias():
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(4, 6, bias=False), nn.LayerNorm(6), nn.ReLU())
    before = [parameter.clone() for parameter in block.parameters()]
    optimizer = proximal_sgd(block, lr=0.1)(block.parameters())
    block(torch.randn(8, 4)).sum().backward()
    norm_gradient = block[1].weight.grad.clone()
    optimizer.step()
    assert not torch.equal(block[0].weight, before[0])
    assert torch.allclose(block[1].weight, before[1] - 0.1 * norm_gradient)


def test_exact_blocks_train_as_backprop_does():
    found = []
    for kind in ("exact", "backprop"):
        torch.manual_seed(0)
        blocks = blockprop.split(mlp(3).float(), 3)
        optimizers = [proximal_sgd(block, lr=0.1) for block in blocks]
        loss = nn.CrossEntropyLoss()
        if kind == "exact":
            algo = blockprop.BlockProp(blocks, loss, optimizers)
        else:
            algo = blockprop.Backprop(blocks, loss, optimizers)
        for _ in range(12):
            x, y = batch(8)
            algo.step(x.float(), y)
        found.append(torch.cat([parameter.detach().flatten() for parameter in blocks.model.parameters()]))
    assert torch.allclose(*found, atol=1e-6)


def test_its_state_continues():
    def made():
        torch.manual_seed(0)
        layer = nn.Linear(4, 3)
        return layer, ProximalSGD(layer.parameters(), [layer], lr=0.3, momentum=0.5, every=3)

    def take(layer, optimizer, steps):
        for x in steps:
            optimizer.zero_grad()
            layer(x).square().mean().backward()
            optimizer.step()

    inputs = list(torch.randn(9, 5, 4))
    whole, parts = made(), made()
    take(*whole, inputs)
    take(*parts, inputs[:4])
    fresh = made()
    fresh[0].load_state_dict(parts[0].state_dict())
    fresh[1].load_state_dict(parts[1].state_dict())
    take(*fresh, inputs[4:])
    assert torch.equal(whole[0].weight, fresh[0].weight)


@pytest.mark.parametrize(("setting", "value"), [("damping", 0.0), ("every", 0), ("decay", 1.0)])
def test_settings_out_of_range(setting, value):
    layer = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=f"{setting} is"):
        ProximalSGD(layer.parameters(), [layer], 0.1, **{setting: value})


def test_a_checkpoint_between_a_forward_pass_and_its_update_keeps_what_was_seen():
    """Of the first of two accumulated batches; the run that goes on from there would see the second."""
    torch.manual_seed(0)
    layer, copied = nn.Linear(4, 3), nn.Linear(4, 3)
    copied.load_state_dict(layer.state_dict())
    first, second = torch.randn(2, 8, 4)
    one = ProximalSGD(layer.parameters(), [layer], lr=0.1)
    layer(first).square().mean().backward()
    other = ProximalSGD(copied.parameters(), [copied], lr=0.1)
    other.load_state_dict(one.state_dict())
    for parameter, same in zip(layer.parameters(), copied.parameters(), strict=True):
        same.grad = parameter.grad.clone()
    for network, optimizer in ((layer, one), (copied, other)):
        network(second).square().mean().backward()
        optimizer.step()
    assert torch.equal(layer.weight, copied.weight)
    assert torch.equal(layer.bias, copied.bias)
