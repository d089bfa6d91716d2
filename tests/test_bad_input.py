"""Mistakes a user makes in Python: each gives a ValueError of one line, and no weight has moved."""

import pytest
import torch
from torch import nn

import blockprop
from blockprop import Backtracking, GaussNewton, GradientDescent, Huber, OutputLoss, Squared
from conftest import batch, mlp, sgd

CE = nn.CrossEntropyLoss()


def squares(a, b):
    return (a - b).square().flatten(1).sum(1)


def trained(K=3, loss=CE, optimizer=None, x=None, y=None, make=blockprop.BlockProp, cut=None, **settings):
    """The mistake of constructing with these settings, or of stepping on that batch."""

    def run(model):
        algo = make(cut(model) if cut else blockprop.split(model, K), loss, optimizer or sgd(), **settings)
        inputs, targets = batch()
        algo.step(inputs if x is None else x(inputs), targets if y is None else y(targets))

    return run


def cut(*args, **settings):
    return lambda model: blockprop.split(model, *args, **settings)


def placed(value, row=2, column=3):
    def put(x):
        x[row, column] = value
        return x

    return put


def tied(model):
    model[2].weight = model[4].weight
    return blockprop.split(model, 4)


def between(layer):
    return lambda model: blockprop.split(nn.Sequential(*model[:2], layer, *model[2:]), at=["3"])


class Argmax(nn.Module):
    def forward(self, x):
        return x.argmax(1, keepdim=True)


class Unlike(nn.Module):
    def forward(self, x):
        return x[:3]


class Overwriting(nn.Module):
    def forward(self, x):
        return x.tanh_()


def solved(*solvers, **settings):
    return trained(form="proximal", h_solver=list(solvers) if len(solvers) > 1 else solvers[0], **settings)


def later(build):
    return lambda model: build()


INF = float("inf")
MISTAKES = {
    # the cut
    "blocks-zero": cut(0),
    "blocks-negative": cut(-2),
    "blocks-bool": cut(True),
    "blocks-float": cut(2.0),
    "blocks-string": cut("2"),
    "blocks-too-many": cut(5),
    "neither-blocks-nor-at": cut(),
    "both-blocks-and-at": cut(2, at=["2"]),
    "split-by-unknown": cut(2, by="params"),
    "split-by-time-without-sample": cut(2, by="time"),
    "sample-of-another-width": cut(2, sample=torch.zeros(2, 9).double()),
    "sample-of-another-dtype": cut(2, sample=torch.zeros(2, 6)),
    "at-unknown": cut(at=["layer7"]),
    "at-out-of-order": cut(at=["4", "2"]),
    "at-twice": cut(at=["2", "2"]),
    "at-first": cut(at=["0"]),
    "at-number": cut(at=[2]),
    "at-a-number": cut(at=2),
    "tied-weights": tied,
    "model-not-sequential": later(lambda: blockprop.split(nn.Linear(2, 2), 1)),
    "model-none": later(lambda: blockprop.split(None, 1)),
    "model-string": later(lambda: blockprop.split("mlp", 1)),
    "model-list-of-functions": later(lambda: blockprop.split([torch.tanh], 1)),
    "model-dict": later(lambda: blockprop.split(nn.ModuleDict({"a": nn.Linear(2, 2)}), 1)),
    "model-empty": later(lambda: blockprop.split(nn.Sequential(), 1)),
    "model-empty-list": later(lambda: blockprop.split([], 1)),
    "model-not-split": trained(cut=lambda model: model),
    "model-not-split-on-devices": trained(cut=lambda model: model, devices=["cpu"]),
    # settings
    "form-unknown": trained(form="Exact"),
    "form-none": trained(form=None),
    "executor-unknown": trained(executor="thread"),
    "executor-none": trained(executor=None),
    "penalty-zero": trained(penalty=0),
    "penalty-negative": trained(penalty=-1.0),
    "penalty-inf": trained(penalty=INF),
    "penalty-nan": trained(penalty=float("nan")),
    "penalty-bool": trained(penalty=True),
    "penalty-string": trained(penalty="squared"),
    "penalty-none": trained(penalty=None),
    "penalty-list-too-short": trained(penalty=[1.0]),
    "penalty-list-too-long": trained(penalty=[1.0, 1.0, 1.0]),
    "penalty-list-with-a-bool": trained(penalty=[1.0, True]),
    "penalty-class": trained(penalty=Squared),
    "penalty-weight-string": later(lambda: Squared("1")),
    "huber-delta-zero": later(lambda: Huber(1.0, 0)),
    "huber-in-the-exact-form": trained(penalty=Huber()),
    "custom-penalty-without-lr": trained(form="proximal", penalty=squares),
    "custom-penalty-scalar": solved(GradientDescent(1, 0.1), penalty=lambda a, b: (a - b).square().sum()),
    "custom-penalty-number": solved(GradientDescent(1, 0.1), penalty=lambda a, b: 0.0),
    "custom-penalty-negative": solved(GradientDescent(1, 0.1), penalty=lambda a, b: -squares(a, b)),
    "custom-penalty-negative-one-way": solved(GradientDescent(1, 0.1), penalty=lambda a, b: (a - b).flatten(1).sum(1)),
    "custom-penalty-not-zero-at-equality": solved(GradientDescent(1, 0.1), penalty=lambda a, b: squares(a, b) + 1),
    "custom-penalty-zero-elsewhere": solved(GradientDescent(1, 0.1), penalty=lambda a, b: 0 * squares(a, b)),
    "custom-penalty-detached": solved(GradientDescent(1, 0.1), penalty=lambda a, b: squares(a, b).detach()),
    "h-solver-list-too-short": trained(h_solver=[GradientDescent()]),
    "h-solver-string": trained(h_solver="gradient"),
    "h-solver-number": trained(h_solver=0.5),
    "h-solver-class": trained(h_solver=GradientDescent),
    "h-solver-for-another-form": trained(h_solver=GaussNewton()),
    "h-steps-zero": later(lambda: GradientDescent(0)),
    "h-steps-bool": later(lambda: Backtracking(True)),
    "h-steps-float": later(lambda: GaussNewton(2.0)),
    "h-lr-negative": later(lambda: GradientDescent(1, -0.1)),
    "h-lr-zero": later(lambda: Backtracking(1, 0.0)),
    "h-lr-string": later(lambda: GradientDescent(1, "0.1")),
    "h-momentum-one": later(lambda: GradientDescent(1, 0.1, momentum=1)),
    "h-decrease-one": later(lambda: Backtracking(decrease=1)),
    "h-halvings-zero": later(lambda: Backtracking(halvings=0)),
    "h-iterations-float": later(lambda: GaussNewton(iterations=2.5)),
    "h-tolerance-negative": later(lambda: GradientDescent(tolerance=-1.0)),
    "clip-zero": trained(clip=0),
    "clip-negative": trained(clip=-1.0),
    "clip-string": trained(clip="1"),
    "accumulate-zero": trained(accumulate=0),
    "accumulate-float": trained(accumulate=2.0),
    "optimizer-an-optimizer": trained(optimizer=torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)),
    "optimizer-string": trained(optimizer="sgd"),
    "optimizer-makes-a-list": trained(optimizer=list),
    "optimizer-makes-nothing": trained(optimizer=lambda params: None),
    "optimizer-list-too-short": trained(optimizer=[sgd(), sgd()]),
    "scheduler-not-callable": trained(scheduler=5),
    "scheduler-list-too-long": trained(scheduler=[None] * 4),
    "scheduler-plateau": trained(scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau),
    "precision-string": trained(precision="bfloat16"),
    "devices-too-many": trained(devices=["cpu"] * 4),
    "devices-none-listed": trained(devices=[]),
    "devices-unknown": trained(devices=["gpu:0"]),
    "devices-string": trained(devices="cpu"),
    "devices-number": trained(devices=1),
    "loss-not-callable": trained(loss="cross_entropy"),
    "loss-none": trained(loss=None),
    "loss-class": trained(loss=nn.CrossEntropyLoss),
    "loss-returns-a-number": trained(loss=lambda a, b: 1.0),
    "loss-weights-too-few": trained(loss=nn.CrossEntropyLoss(torch.ones(2).double()), y=lambda y: y * 0 + 4),
    "class-dim-3": later(lambda: OutputLoss(CE, class_dim=3)),
    # the batch
    "label-too-large": trained(y=lambda y: y * 0 + 5),
    "label-too-large-for-a-function": trained(loss=nn.functional.cross_entropy, y=lambda y: y * 0 + 5),
    "label-negative": trained(y=lambda y: y - 5),
    "labels-float": trained(y=lambda y: y.double()),
    "labels-int32": trained(y=lambda y: y.int()),
    "labels-bool": trained(y=lambda y: y > 2),
    "labels-column": trained(y=lambda y: y[:, None]),
    "labels-all-ignored": trained(y=lambda y: y * 0 - 100),
    "labels-list": trained(y=lambda y: y.tolist()),
    "regression-without-targets-shape": trained(loss=nn.MSELoss(), y=lambda y: torch.zeros(7, 4)),
    "rows-mismatched": trained(y=lambda y: y[:-1]),
    "inputs-nan": trained(x=placed(float("nan"))),
    "inputs-inf": trained(x=placed(INF)),
    "inputs-nan-published": trained(x=placed(float("nan")), form="published"),
    "inputs-inf-threads": trained(x=placed(INF), executor="threads"),
    "inputs-empty": trained(x=lambda x: x[:0], y=lambda y: y[:0]),
    "inputs-0-dim": trained(x=lambda x: x[0, 0], y=lambda y: y[0]),
    "inputs-list": trained(x=lambda x: x.tolist()),
    "inputs-numpy": trained(x=lambda x: x.numpy()),
    "inputs-too-wide": trained(x=lambda x: torch.cat([x, x], 1)),
    "inputs-float32": trained(x=lambda x: x.float()),
    "inputs-integer": trained(x=lambda x: x.long()),
    "integer-output-between-blocks": trained(cut=between(Argmax())),
    "input-overwritten-by-a-block": trained(cut=lambda model: blockprop.split([model, Overwriting()], at=["1"])),
    "rows-lost-between-blocks": trained(cut=between(Unlike())),
    "backprop-label-too-large": trained(make=blockprop.Backprop, y=lambda y: y * 0 + 5),
    "backprop-inputs-nan": trained(make=blockprop.Backprop, x=placed(float("nan"))),
    "backprop-inputs-inf": trained(make=blockprop.Backprop, x=placed(INF)),
    "backprop-inputs-too-wide": trained(make=blockprop.Backprop, x=lambda x: torch.cat([x, x], 1)),
    "backprop-not-split": trained(make=blockprop.Backprop, cut=lambda model: model),
}


@pytest.mark.parametrize(
    "mistake",
    [
        pytest.param(
            mistake,
            id=name,
        )
        for name, mistake in MISTAKES.items()
    ],
)
def test_a_mistake_is_a_value_error_of_one_line_and_moves_no_weight(mistake):
    model = mlp()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError) as caught:
        mistake(model)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    if mistake is not tied:  # which itself replaces a weight
        for p, old in zip(model.parameters(), before, strict=True):
            assert torch.equal(p, old)


def test_the_batch_of_the_table_is_a_good_one():
    """What is wrong in the table is the mistake, and nothing else."""
    trained()(mlp())
    solved(GradientDescent(1, 0.1), penalty=squares)(mlp())
    trained(loss=nn.CrossEntropyLoss(torch.ones(5).double()))(mlp())
    trained(make=blockprop.Backprop)(mlp())
