"""Labels by the forward pass and by the energy: the minimum of Eq. (4) over the gluing variables."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import blockprop
from blockprop import Huber
from blockprop.augmented import augmented_loss
from blockprop.inference import energies, predict
from conftest import batch, mlp, sgd

CE = nn.CrossEntropyLoss()


def network(K: int, depth: int | None = None, n: int = 4):
    return blockprop.split(mlp(depth=depth or K, width=7), K), batch(n)[0]


def losses(blocks, x):
    """The loss at the forward pass of every label, [N, C]."""
    return -blocks(x).log_softmax(1).detach()


def by_descent(blocks, x, label: int, penalty) -> torch.Tensor:
    """The minimum by another method: L-BFGS on the gluing variables themselves."""
    h = []
    for block in list(blocks)[:-1]:
        h.append(block(h[-1] if h else x).detach())
    h = [value.requires_grad_() for value in h]
    y = torch.full((len(x),), label)
    optimizer = torch.optim.LBFGS(
        h, max_iter=300, tolerance_grad=1e-9, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        total = augmented_loss(blocks, x, h, y, loss=CE, penalty=penalty).sum()
        total.backward()
        return total

    optimizer.step(closure)
    blocks.model.zero_grad()
    return augmented_loss(blocks, x, h, y, loss=CE, penalty=penalty).detach()


@pytest.mark.parametrize(("K", "penalty"), [(2, 0.2), (2, 1.0), (3, [0.5, 2.0]), (4, 1.0), (4, [3.0, 0.3, 1.0])])
def test_an_energy_is_the_minimum_of_the_augmented_loss(K, penalty):
    blocks, x = network(K)
    found = energies(blocks, x, penalty=penalty, steps=60, tolerance=1e-14)
    expected = torch.stack([by_descent(blocks, x, label, penalty) for label in range(5)], 1)
    torch.testing.assert_close(found.values, expected, rtol=1e-8, atol=1e-10)
    assert found.left < 1e-10
    assert torch.equal(found.labels, expected.argmin(1))


def test_with_relus_an_energy_is_close_to_the_best_that_a_long_search_finds():
    """Minima may lie on kinks, where Gauss-Newton stops a little early and `left` says too much."""
    layers = [layer for _ in range(3) for layer in (nn.Linear(8, 8), nn.ReLU())]
    model = nn.Sequential(*layers[:-1]).double()
    blocks, x = blockprop.split(model, 3), 3 * torch.randn(3, 8, dtype=torch.float64)
    found = energies(blocks, x, penalty=0.1).values.flatten()
    many, labels = x.repeat_interleave(8, 0), torch.arange(8).repeat(3)
    h = [blocks[0](many).detach()]
    h = [value.requires_grad_() for value in (h[0], blocks[1](h[0]).detach())]
    optimizer = torch.optim.Adam(h, lr=0.05)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
    best = torch.full_like(found, float("inf"))
    for _ in range(400):
        values = augmented_loss(blocks, many, h, labels, loss=CE, penalty=0.1)
        for value, slope in zip(h, torch.autograd.grad(values.sum(), h), strict=True):
            value.grad = slope
        optimizer.step()
        scheduler.step()
        best = torch.minimum(best, values.detach())
    assert ((found - best) / best).median() < 0.01
    assert ((found - best) / best).max() < 0.1


def test_an_energy_is_at_most_the_loss_and_not_below_zero():
    blocks, x = network(3)
    for penalty in (1e-3, 1.0, 1e3):
        values = energies(blocks, x, penalty=penalty).values
        assert (values <= losses(blocks, x)).all()
        assert (values >= 0).all()


def test_for_a_large_penalty_energies_are_losses_less_the_gradients_squares():
    """ℓ - Σ_k ‖δ_k‖² / 4λ_{k-1}, up to an error of order 1/λ²."""
    blocks, x = network(3)
    expected = losses(blocks, x)
    slopes = torch.zeros(4, 5, dtype=torch.float64)
    for label in range(5):
        h2 = blocks[0](x)
        h3 = blocks[1](h2)
        loss = cross_entropy(blocks[2](h3), torch.full((4,), label), reduction="sum")
        for delta in torch.autograd.grad(loss, [h2, h3]):
            slopes[:, label] += delta.square().sum(1)
    errors = []
    for penalty in (50.0, 100.0, 200.0):
        found = energies(blocks, x, penalty=penalty, tolerance=1e-14).values
        errors.append(float((found - (expected - slopes / (4 * penalty))).norm()))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.05)
    assert errors[2] < 1e-3 * float(slopes.norm() / 800)


@pytest.mark.parametrize("K", [1, 2, 4])
def test_both_ways_agree_at_a_large_penalty(K):
    blocks, x = network(K, depth=4, n=20)
    labels = blocks(x).argmax(1)
    assert torch.equal(predict(blocks, x), labels)
    assert torch.equal(predict(blocks.model, x), labels)
    assert torch.equal(predict(blocks, x, by="energy", penalty=1e6), labels)


def test_one_block_has_the_losses_for_energies():
    blocks, x = network(1, depth=3)
    found = energies(blocks, x)
    torch.testing.assert_close(found.values, losses(blocks, x))
    assert found.left == 0


def test_a_label_that_is_cheap_to_reach_may_have_the_least_energy():
    """Label 1 is the forward pass's second choice, but its output alone listens to h_2."""
    bottom = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(bottom.weight)
    wide = nn.Linear(1, 3).double()
    with torch.no_grad():
        wide.weight.copy_(torch.tensor([[0.0], [8.0], [0.0]]))
        wide.bias.copy_(torch.tensor([0.5, 0.4, 0.5]))
    blocks = blockprop.split(nn.Sequential(bottom, wide), 2)
    x = torch.ones(1, 1, dtype=torch.float64)
    assert predict(blocks, x).item() in (0, 2)
    assert predict(blocks, x, by="energy", penalty=1.0).item() == 1
    assert predict(blocks, x, by="energy", penalty=1e3).item() != 1


def test_energies_of_a_batch_are_those_of_its_examples():
    blocks, x = network(3, n=7)
    whole = energies(blocks, x, tolerance=1e-12).values
    torch.testing.assert_close(energies(blocks, x, tolerance=1e-12, batch_size=3).values, whole, rtol=1e-7, atol=1e-9)
    singles = torch.cat([energies(blocks, x[i : i + 1], tolerance=1e-12).values for i in range(7)])
    torch.testing.assert_close(singles, whole, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("by", ["forward", "energy"])
def test_nothing_is_changed(by):
    model = mlp(depth=4, norm=lambda: nn.BatchNorm1d(12), drop=lambda: nn.Dropout(0.5))
    blocks = blockprop.split(model, 3)
    algo = blockprop.BlockProp(blocks, CE, sgd())
    algo.gradient(*batch())
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    slopes = [parameter.grad.clone() for parameter in model.parameters()]
    x, _ = batch(5)
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    first = predict(blocks, x, by=by)
    assert torch.equal(predict(blocks, x, by=by), first)
    assert first.shape == (5,)
    assert not first.is_floating_point()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), slopes, strict=True))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("by", ["forward", "energy"])
def test_modes_come_back_after_a_mistake(by):
    blocks, x = network(2)
    with pytest.raises(ValueError, match=r"block 1 failed on an input of shape \[4, 3\]"):
        predict(blocks, x[:, :3], by=by)
    assert all(module.training for module in blocks.model.modules())


@pytest.mark.parametrize("by", ["forward", "energy"])
def test_blocks_that_begin_in_place(by):
    layers = [nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 5)]
    plain = blockprop.split(nn.Sequential(*layers).double(), at=["1"])
    layers[1] = nn.ReLU(inplace=True)
    in_place = blockprop.split(nn.Sequential(*layers), at=["1"])
    x, _ = batch(20)
    assert torch.equal(predict(in_place, x, by=by), predict(plain, x, by=by))
    torch.testing.assert_close(energies(in_place, x).values, energies(plain, x).values)


def test_images_and_single_precision():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    x = torch.randn(6, 1, 8, 8)
    blocks = blockprop.split(model, 3, sample=x)
    found = energies(blocks, x, penalty=100.0, loss=nn.CrossEntropyLoss(reduction="sum"))
    assert found.values.shape == (6, 3)
    assert found.left <= 1e-3
    assert torch.equal(found.labels, predict(model, x))


def test_the_losss_own_weights_and_kind_count():
    blocks, x = network(2)
    weight = torch.tensor([1.0, 2.0, 0.5, 1.0, 1.0], dtype=torch.float64)
    found = energies(blocks, x, loss=nn.CrossEntropyLoss(weight), penalty=1e9).values
    torch.testing.assert_close(found, losses(blocks, x) * weight, rtol=1e-6, atol=1e-8)
    scores = blockprop.split(nn.Sequential(*blocks.model, nn.LogSoftmax(1)), 2)
    torch.testing.assert_close(
        energies(scores, x, loss=nn.NLLLoss(), penalty=1e9).values, losses(blocks, x), rtol=1e-6, atol=1e-8
    )


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda b, x: predict(b, x, by="luck"), "unknown way to predict 'luck'; expected one of forward, energy"),
        (lambda b, x: predict(b.model, x, by="energy"), "energies of a Sequential; expected Blocks"),
        (lambda b, x: energies(b, x, penalty=Huber()), "squared penalty, not Huber"),
        (lambda b, x: energies(b, x, penalty=[1.0, 2.0, 3.0]), "3 values for 1 links"),
        (lambda b, x: energies(b, x, penalty=-1.0), "λ is -1.0"),
        (lambda b, x: energies(b, x, loss=nn.MSELoss()), "MSELoss; expected a loss over labels"),
        (lambda b, x: energies(b, x, steps=0), "steps is 0"),
        (lambda b, x: energies(b, x, batch_size=True), "batch size is True"),
        (lambda b, x: energies(b, x, tolerance=0.0), "tolerance is 0.0"),
        (lambda b, x: energies(b, x[:0]), "no rows"),
        (lambda b, x: predict(nn.Unflatten(1, (2, 3)), x), r"shape \[4, 2, 3\]; expected \[N, C\]"),
    ],
)
def test_mistakes_take_one_line(ask, message):
    with pytest.raises(ValueError, match=message) as caught:
        ask(*network(2))
    assert "\n" not in str(caught.value)
