"""The networks that are trained under delay, and the methods that are compared on them."""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from blockprop.experiments.settings import Settings

BACKPROP, WARM_BACKPROP = "backprop", "backprop, warm-up"
DELAYED, DEFAULT = "delayed gradient", "targets, microbatches, warm-up"
"""The baseline, with and without a warm-up; the naive pipeline; and the default of `--schedule pipelined`."""
ALIKE = "the default at backprop's step size"
TWICE = "the default, messages up to 4 x as late, 5 % lost, sent twice"
ONCE = "the default, messages up to 4 x as late, 5 % lost, sent once"
"""The default at backprop's step size; and there, where messages are late and lost: it then sends feedback twice; and
without that."""


@dataclass(frozen=True)
class Task:
    """A network with its data and its budget.

    Attributes:
        name: short, for folders and the command line.
        title: in the tables.
        settings: of backprop, with `steps` the budget: runs go on to twice that.
        lrs: step sizes to choose from, the same for all methods.
        nesterov: the optimizer with Nesterov's correction that stands beside the task's own; empty for none.
        chance: the loss of guessing.
        lighter: a smaller momentum, or β1, that stands beside the usual one; None where there is none.
        cuts: K of the final table.
        again: settings of the study of caches, in which the same examples come in several epochs; None where no two
            epochs show the same.
        trial: steps with each of ever larger step sizes; 0 for none, where so few steps tell nothing.
        long: steps of the longer row, with a warm-up and cosine decay; 0 for none.
        tuning: what is other in the runs that choose a step size, beside their length.
        brief: few methods and few evaluations.
    """

    name: str
    title: str
    settings: Settings
    lrs: tuple[float, ...]
    nesterov: dict[str, Any]
    chance: float
    lighter: float | None = None
    cuts: tuple[int, ...] = (2, 4, 8)
    trial: int = 0
    long: int = 0
    again: Settings | None = None
    tuning: dict[str, Any] = field(default_factory=dict)
    brief: bool = False

    @property
    def budget(self) -> int:
        """Steps."""
        assert self.settings.steps is not None
        return self.settings.steps

    def cut_into(self, blocks: int) -> Settings:
        """Backprop's settings where K blocks are compared: a language model of fewer layers than that gets deeper."""
        deeper = self.settings.model == "gpt" and (self.settings.depth or 0) < blocks
        return replace(self.settings, depth=blocks) if deeper else self.settings


def tasks(data_dir: Path | None, *, quick: bool) -> list[Task]:
    """The perceptron, the language model and the residual network."""
    base = Settings(data_dir=data_dir, threads=1, algorithm="backprop")
    mnist = replace(base, data="mnist", model="mlp", width=256, depth=8, batch_size=64, validation=0.05)
    text = replace(base, data="shakespeare", model="gpt", width=96, depth=6, batch_size=32, validation=0.02)
    cifar = replace(base, data="cifar10", model="resnet18", width=16, batch_size=64, validation=0.01)
    nesterov = {"optimizer": "nesterov", "momentum": 0.9}
    characters = math.log(65)
    found = [
        Task(
            "mlp",
            "MLP 8 x 256, MNIST, SGD",
            replace(mnist, steps=900),
            (0.05, 0.1, 0.2),
            nesterov,
            math.log(10),
            trial=450,
            # at a constant step size the last evaluation is a seed's chance, of a point or two
            again=replace(mnist, epochs=8, lr=0.1, lr_schedule="cosine"),
        ),
        Task(
            "gpt",
            "GPT 6 x 96, Shakespeare, AdamW",
            replace(text, steps=300),
            (1e-3, 3e-3, 6e-3),
            {"optimizer": "nadam"},
            characters,
            lighter=0.8,
            trial=150,
            long=3000,
        ),
        Task(
            "muon",
            "GPT 6 x 96, Shakespeare, Muon",
            replace(text, steps=300, optimizer="muon"),
            (0.01, 0.02, 0.04),
            {},
            characters,
            cuts=(4,),
            trial=150,
            tuning={"evaluate_every": 100},
        ),
        Task(
            "resnet",
            "ResNet18-w16, CIFAR-10, momentum",
            replace(cifar, steps=150),
            (0.02, 0.05, 0.1),
            nesterov,
            math.log(10),
            lighter=0.8,
            long=1500,
            again=replace(cifar, epochs=8, lr=0.05, lr_schedule="cosine", train_size=3200, augment=False),
            # only the last validation chooses, and fifty take as long as the training
            tuning={"evaluate_every": 50},
        ),
    ]
    if quick:
        steps = {"mlp": 200, "gpt": 25}
        found = [
            replace(
                one,
                settings=replace(one.settings, steps=steps[one.name], lr=one.lrs[1]),
                lrs=(),
                cuts=(2, 4),
                trial=0,
                long=0,
                again=None,
                brief=True,
            )
            for one in found
            if one.name in steps
        ]
    return found


def methods(task: Task) -> dict[str, dict[str, Any]]:
    """What is compared: settings beside the task's, at any K."""
    pipelined = {"algorithm": "blockprop", "schedule": "pipelined", "microbatches": 1, "warmup": 0}
    gradient = pipelined | {"feedback": "gradient"}
    stashed = pipelined | {"feedback": "stashed"}
    apart = pipelined | {"directions": "both"}
    each = apart | {"per_example": True}
    # a tenth of a whole run, as is the default; in numbers, since the runs that choose a step size are shorter
    warm = {"warmup": 2 * task.budget // 10}
    quarter = task.budget // 4
    found = {
        BACKPROP: {},
        WARM_BACKPROP: warm,
        DELAYED: gradient,
        "delayed gradient, warm-up": gradient | warm,
        "delayed gradient, stashed weights": stashed,
        "delayed gradient, stashed weights, warm-up": stashed | warm,
        "targets, κ = 0.1": pipelined | {"curvature": 0.1},
        "targets, κ measured": pipelined,
        "targets, κ measured, warm-up": pipelined | warm,
        "targets along and across": apart,
        "targets along and across, warm-up": apart | warm,
        "targets along and across, per example, warm-up": each | warm,
        "delayed gradient, microbatches, warm-up": gradient | warm | {"microbatches": None},
        DEFAULT: pipelined | warm | {"microbatches": None},
        "targets without a limit, microbatches, warm-up": pipelined | warm | {"microbatches": None, "trust": "none"},
        "targets along and across, microbatches, warm-up": apart | warm | {"microbatches": None},
        "targets along and across, per example, microbatches, warm-up": each | warm | {"microbatches": None},
        "PipeMare: annealing and prediction": gradient | {"delay_annealing": quarter, "prediction": 1.0},
        "SpecTrain: weight prediction": gradient | {"prediction": 1.0},
        "DC-ASGD, λ = 0.1": stashed | {"compensation": 0.1},
    }
    if task.nesterov:
        found["Nesterov, delayed gradient, stashed weights"] = stashed | task.nesterov
        found["Nesterov, targets, microbatches, warm-up"] = found[DEFAULT] | task.nesterov
    if task.lighter is not None:
        lighter = {"momentum": task.lighter}
        found |= {
            f"{method}, momentum {task.lighter}": found[method] | lighter for method in (BACKPROP, DELAYED, DEFAULT)
        }
    if task.brief:
        few = (BACKPROP, DELAYED, "delayed gradient, warm-up", "targets, κ measured, warm-up", DEFAULT)
        return {method: found[method] for method in few}
    return found


def variants(task: Task) -> dict[str, dict[str, Any]]:
    """The default at another step size, and where every message takes one to four ticks and every twentieth is lost."""
    default = methods(task)[DEFAULT]
    twice = default | {"latency": 3, "lost": 0.05}
    return {ALIKE: default, TWICE: twice, ONCE: twice | {"copies": 1}}
