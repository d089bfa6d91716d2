"""Forms: their defaults, their scales, and what they refuse."""

import pytest
import torch
from torch import nn

import blockprop
from blockprop import Backtracking, GaussNewton, GradientDescent, Huber, Squared
from blockprop.forms import form_named
from blockprop.penalties import Custom
from conftest import batch, mlp, sgd

CUSTOM = Custom(lambda a, b: (a - b).square().flatten(1).sum(1))


def make(**settings):
    return blockprop.BlockProp(blockprop.split(mlp(), 3), nn.CrossEntropyLoss(), sgd(), **settings)


@pytest.mark.parametrize(
    ("settings", "alternative"),
    [
        ({"penalty": Huber()}, "proximal"),
        ({"penalty": CUSTOM, "h_solver": GradientDescent(1, 0.5)}, "proximal"),
        ({"penalty": [1.0, Huber()]}, "proximal"),
        ({"h_solver": GaussNewton()}, "proximal"),
        ({"h_solver": Backtracking()}, "proximal"),
        ({"h_solver": GradientDescent(2)}, "proximal"),
        ({"h_solver": GradientDescent(1, 0.1)}, "rescaled"),
        ({"h_solver": GradientDescent(1, 0.5), "penalty": [1.0, 2.0]}, "rescaled"),
        ({"form": "rescaled", "penalty": Huber()}, "proximal"),
        ({"form": "rescaled", "h_solver": GaussNewton()}, "proximal"),
        ({"form": "rescaled", "h_solver": Backtracking(1, 0.1)}, "proximal"),
    ],
)
def test_what_a_form_is_not_defined_for_is_refused_with_the_one_to_use(settings, alternative):
    with pytest.raises(ValueError, match=f"{alternative}") as caught:
        make(**settings)
    assert "\n" not in str(caught.value)
    assert settings.get("form", "exact") in str(caught.value)


@pytest.mark.parametrize(
    ("settings"),
    [
        {"h_solver": GradientDescent(1, 0.5)},
        {"h_solver": [GradientDescent(1, 0.5), GradientDescent(1, 0.125)], "penalty": [1.0, 4.0]},
        {"penalty": 3.0, "h_solver": GradientDescent()},
        {"h_solver": GradientDescent(1, 0.5, momentum=0.9)},  # of one step, momentum takes no part
        {"form": "published", "penalty": Huber(), "h_solver": Backtracking()},
        {"form": "proximal", "penalty": CUSTOM, "h_solver": GaussNewton()},
        {"form": "rescaled", "h_solver": GradientDescent(4, 0.1, 0.5)},
    ],
)
def test_what_a_form_is_defined_for_runs(settings):
    report = make(**settings).step(*batch())
    assert report.stable
    assert all(loss > 0 for loss in report.gluing_loss)


@pytest.mark.parametrize(("form", "product"), [("exact", 1.0), ("published", 0.02), ("rescaled", 0.1), ("proximal", 1)])
@pytest.mark.parametrize("penalty", [1.0, 10.0, 500.0])
def test_the_default_step_fits_the_penalty(form, product, penalty):
    for link in make(form=form, penalty=penalty).links:
        assert 2 * penalty * link.solver.lr == pytest.approx(product, rel=1e-12)
        assert link.solver.steps == 1


def test_a_penalty_of_unknown_curvature_needs_a_step_size():
    with pytest.raises(ValueError, match="step size lr"):
        make(form="proximal", penalty=CUSTOM)


def test_scales_are_products_from_the_top():
    solvers = [GradientDescent(1, 0.1), GradientDescent(2, 0.2), GradientDescent(1, 0.05)]
    penalties = [Squared(1.0), Squared(0.5), Squared(2.0)]
    links = [0.2, 1 - 0.8**2, 0.2]
    expected = [links[0] * links[1] * links[2], links[1] * links[2], links[2], 1.0]
    assert form_named("rescaled").scales(solvers, penalties) == pytest.approx(expected)
    for name in ("exact", "published", "proximal"):
        assert form_named(name).scales(solvers, penalties) == [1.0] * 4


def test_a_scale_of_zero_is_refused():
    with pytest.raises(ValueError, match="rescaled"):
        make(form="rescaled", h_solver=GradientDescent(2, 1.0))


def test_forms_differ_where_they_should():
    flags = {name: form_named(name) for name in ("exact", "published", "rescaled", "proximal")}
    assert [f.at_forward for f in flags.values()] == [True, False, False, True]
    assert [f.rescaled for f in flags.values()] == [False, False, True, False]
    with pytest.raises(ValueError, match="unknown form 'exakt'; expected one of exact, published, rescaled, proximal"):
        form_named("exakt")


@pytest.mark.parametrize(
    "form",
    [
        "exact",
        "published",
        "rescaled",
        "proximal",
    ],
)
@pytest.mark.parametrize("executor", ["local", "threads"])
@pytest.mark.parametrize("bottom", ["frozen", "parameterless"])
def test_a_first_block_with_nothing_to_train(form, executor, bottom):
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), *mlp(2)).double()
    if bottom == "frozen":
        model[0].requires_grad_(False)
        blocks = blockprop.split(model, at=["2"])
    else:
        model = nn.Sequential(nn.Tanh(), *mlp(2)).double()
        blocks = blockprop.split(model, at=["1"])
    before = [p.clone() for p in model.parameters()]
    algo = blockprop.BlockProp(blocks, nn.CrossEntropyLoss(), sgd(), form=form, executor=executor)
    algo.step(*batch())
    algo.close()
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    assert moved == ([False, False] if bottom == "frozen" else []) + [True] * 4
