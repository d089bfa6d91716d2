"""The networks that are trained, their data and optimizers, and where they are cut."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import blockprop
from benchmarks.pipelines.memory import InFlight
from blockprop.data import Dataset
from blockprop.experiments.ingredients import dataset_of, network_of
from blockprop.experiments.settings import Settings

SEED = 0


@dataclass(frozen=True)
class Workload:
    """A network with its data, its optimizer, its cuts and its budget.

    Attributes:
        name: short, for the command line.
        title: in the tables.
        settings: of one-process backprop, resolved; `steps` is the budget of the curves. A warm-up is everybody's.
        cut: where two blocks are even if each does a forward and a backward pass.
        recomputing_cut: where they are even if the lower one does a second forward pass.
        four: three names that make four stages; the first and the last one are on rank 0, as ZBV wants them.
        large: microbatches of a whole batch each in the large-batch pipeline.
        evaluations: in the budget.
        cached: whether examples come again unchanged, which cached feedback needs.
        batch_norm: whether statistics depend on how a batch is cut.
    """

    name: str
    title: str
    settings: Settings
    cut: str
    recomputing_cut: str
    four: tuple[str, str, str]
    large: int = 8
    evaluations: int = 50
    cached: bool = True
    batch_norm: bool = False
    large_lrs: tuple[float, ...] = field(default=())

    @property
    def batch(self) -> int:
        """Examples a step."""
        return self.settings.batch_size

    @property
    def budget(self) -> int:
        """Steps."""
        assert self.settings.steps is not None
        return self.settings.steps

    def data(self) -> Dataset:
        """The data, as a run with these settings sees them."""
        return dataset_of(self.settings)

    def model(self, data: Dataset) -> nn.Sequential:
        """The network, the same one every time."""
        torch.manual_seed(SEED)
        return network_of(self.settings, data)

    @property
    def optimizer(self) -> tuple[Any, float, float]:
        """Name, step size and momentum, for `optimizer_named`."""
        given = self.settings
        assert given.lr is not None and given.momentum is not None
        return given.optimizer, given.lr, given.momentum


def prepare(workload: Workload, path: Path, batches: int = 8) -> dict[str, Any]:
    """Write the model and some batches to a file that every process reads; the facts about them.

    Args:
        workload: the workload.
        path: of the file.
        batches: as many are gone through again and again.

    Returns:
        Bytes of the weights; the numbers that an example has at each cut; what two blocks keep for their backward.
    """
    data = workload.data()
    model = workload.model(data)
    pairs = [data.train.batch(torch.arange(i * workload.batch, (i + 1) * workload.batch)) for i in range(batches)]
    torch.save({"model": model, "inputs": [x for x, _ in pairs], "targets": [y for _, y in pairs]}, path)
    sample = data.sample
    names = {workload.cut, workload.recomputing_cut, *workload.four}
    return {
        "weights": sum(p.numel() * p.element_size() for p in model.parameters()),
        "boundaries": {name: boundary(model, name, sample) for name in sorted(names)},
        "saved": {name: saved(model, name, pairs[0][0]) for name in (workload.cut, workload.recomputing_cut)},
    }


def saved(model: nn.Sequential, at: str, inputs: Tensor) -> list[int]:
    """Bytes that either of two blocks keeps for its backward pass on a batch."""
    found = []
    for block in blockprop.split(model, at=[at]):
        with InFlight([model]) as flight:
            outputs = block(inputs)
        found.append(flight.peak)
        inputs = outputs.detach().requires_grad_()
    return found


@torch.no_grad()
def boundary(model: nn.Sequential, at: str, sample: Tensor) -> int:
    """Numbers of one example that cross the cut at this name."""
    model.eval()
    lower = blockprop.split(model, at=[at])[0]
    found = lower(sample).numel() // len(sample)
    model.train()
    return found


def workloads(data_dir: Path | None, *, quick: bool = False) -> list[Workload]:
    """All of them, with smaller budgets if it is to be quick."""
    base = Settings(data_dir=data_dir, threads=1, algorithm="backprop")
    mnist = replace(base, data="mnist", model="mlp", width=1024, batch_size=128, validation=0.017, train_size=12800)
    text = replace(base, data="shakespeare", model="gpt", width=96, depth=6, batch_size=32, validation=0.02)
    cifar = replace(
        base,
        data="cifar10",
        model="resnet18",
        width=16,
        batch_size=128,
        validation=0.01,
        train_size=12800,
        augment=False,
    )
    found = [
        Workload(
            "mlp3",
            "MLP 784-1024^3-10, MNIST",
            replace(mnist, depth=4, lr=0.1, steps=600),
            "layer3",
            "layer2",
            ("layer2", "layer3", "layer4"),
            large_lrs=(0.1, 0.2, 0.4),
        ),
        Workload(
            "mlp8",
            "MLP 784-1024^8-10, MNIST",
            replace(mnist, depth=9, lr=0.05, steps=400),
            "layer5",
            "layer4",
            ("layer3", "layer5", "layer7"),
            large_lrs=(0.05, 0.1, 0.2),
        ),
        Workload(
            "resnet",
            "ResNet18 width 16, CIFAR-10",
            replace(cifar, lr=0.05, momentum=0.9, steps=200),
            "layer2_2",
            "layer2_1",
            ("layer1_2", "layer2_2", "layer3_2"),
            large=4,
            evaluations=25,
            batch_norm=True,
            large_lrs=(0.05, 0.1, 0.2),
        ),
        Workload(
            "gpt",
            "GPT 6 x 96, context 64, Shakespeare",
            # for everybody: the usual β1 of 0.9 has a memory of ten steps, in a run of 300 whose feedback is late
            replace(text, optimizer="adamw", lr=3e-3, momentum=0.8, steps=300, warmup=30),
            "block4",
            "block3.perceptron",
            ("block2", "block3", "block5"),
            cached=False,
            large_lrs=(3e-3, 6e-3, 1.2e-2),
        ),
    ]
    if quick:
        steps = {"mlp3": 200, "mlp8": 150, "resnet": 60, "gpt": 60}
        found = [
            replace(
                one,
                settings=replace(
                    one.settings,
                    steps=steps[one.name],
                    train_size=None if one.settings.train_size is None else 6400,
                ),
                evaluations=15,
                large_lrs=one.large_lrs[1:2],
            )
            for one in found
        ]
    return [replace(one, settings=one.settings.resolved()) for one in found]
