"""What the benchmarks share: workloads, interleaved timing, workers in processes of their own, result pages."""

import argparse
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import blockprop
from blockprop.models import mlp, resnet18

SEED = 0
_LOAD_BEFORE = os.getloadavg()
Step = Callable[[], object]


@dataclass(frozen=True)
class Workload:
    """A model and the shape of its inputs; the numbers in them are drawn at random.

    Attributes:
        title: as it is called in a table.
        model: makes the model.
        shape: of one input.
        batch: examples in a batch.
    """

    title: str
    model: Callable[[], nn.Sequential]
    shape: tuple[int, ...]
    batch: int

    def make(self, batch: int | None = None) -> tuple[nn.Sequential, Tensor, Tensor]:
        """The model, a batch of inputs and their labels: the same ones every time."""
        torch.manual_seed(SEED)
        model = self.model()
        count = batch or self.batch
        return model, torch.randn(count, *self.shape), torch.randint(0, 10, (count,))


MLP3 = Workload("MLP 784-1024x3-10, batch 128", lambda: mlp(784, 10, width=1024, depth=4), (784,), 128)
MLP8 = Workload("MLP 784-1024x8-10, batch 128", lambda: mlp(784, 10, width=1024, depth=9), (784,), 128)
RESNET = Workload("resnet18(width=16), 3x32x32, batch 128", lambda: resnet18(width=16), (3, 32, 32), 128)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """The optimizer of every benchmark."""
    return torch.optim.SGD(parameters, lr=0.01)


def cut(model: nn.Sequential, blocks: int, sample: Tensor) -> blockprop.Blocks:
    """K blocks, balanced by the flops counted on two examples."""
    return blockprop.split(model, blocks, sample=sample[:2])


def plain_step(model: nn.Module, inputs: Tensor, targets: Tensor, parts: Sequence[nn.Module] = ()) -> Step:
    """The loop that everybody writes by hand: one graph, and one optimizer, or one for each of these parts."""
    loss_function, optimizers = nn.CrossEntropyLoss(), [sgd(part.parameters()) for part in parts or [model]]

    def step() -> None:
        loss = loss_function(model(inputs), targets)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return step


def algorithm_step(
    kind: str, model: nn.Sequential, blocks: int, inputs: Tensor, targets: Tensor, **settings: Any
) -> Step:
    """A step of `blockprop.Backprop` or `blockprop.BlockProp` with these settings."""
    algorithm = {"backprop": blockprop.Backprop, "blockprop": blockprop.BlockProp}[kind]
    algo = algorithm(cut(copy.deepcopy(model), blocks, inputs), nn.CrossEntropyLoss(), sgd, **settings)
    return lambda: algo.step(inputs, targets)


def interleaved(steps: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every contender in every round; the order is turned by one from round to round."""
    names = list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(steps[name]())
    return seconds


def timed(step: Step, count: int = 1) -> float:
    """Seconds per step."""
    start = time.perf_counter()
    for _ in range(count):
        step()
    return (time.perf_counter() - start) / count


@dataclass(frozen=True)
class Spread:
    """A sample by its median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of at least two values."""
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(statistics.median(values), low, high)

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


def ratios(above: Sequence[float], below: Sequence[float]) -> Spread:
    """Of what was measured in the same rounds."""
    return Spread.of([a / b for a, b in zip(above, below, strict=True)])


class Worker:
    """A process of its own that takes steps when it is told to: `python -m MODULE --worker SETTINGS`.

    Args:
        module: the benchmark to run, which calls `serve` when it is given `--worker`.
        settings: for the worker, JSON-ready.
        env: variables added to its environment.
    """

    def __init__(self, module: str, settings: Mapping[str, Any], env: Mapping[str, str] | None = None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, "--worker", json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(env or {})},
        )

    def ask(self, request: Any) -> Any:
        """What the worker answers."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the worker ended with code {self._process.wait()}; its error is above")
        return json.loads(answer)

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def serve(answer: Callable[[Any], Any]) -> None:
    """The worker's side: answer requests until there are no more."""
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


def arguments(description: str | None, *, data: bool = False) -> argparse.Namespace:
    """The command line that every benchmark has; with `data`, for one that reads a dataset."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds: to see that it runs, not to quote")
    parser.add_argument("--out", type=Path, metavar="FILE", help="Markdown page to write, with a JSON beside it")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    if data:
        parser.add_argument("--data-dir", type=Path, metavar="DIR", help="folder of the data's published files")
    return parser.parse_args()


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def publish(module: str, given: argparse.Namespace, title: str, body: Sequence[str], data: Any) -> None:
    """Print the page, and write it with its JSON if `--out` says where.

    Args:
        module: the benchmark's name, as in `python -m benchmarks.overhead`.
        given: its command line.
        title: of the page.
        body: the page's paragraphs and tables.
        data: the same, JSON-ready; dataclasses become objects.
    """
    command = f"python -m benchmarks.{module}" + " --quick" * given.quick
    if given.out:
        command += f" --out {given.out.name if given.out.is_absolute() else given.out.as_posix()}"
    facts = {
        "command": command,
        "seed": SEED,
        "versions": f"blockprop {blockprop.__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        "processor": f"{_processor()}, {os.cpu_count()} cores",
        "load average (1 min)": f"{_LOAD_BEFORE[0]:.1f} before, {os.getloadavg()[0]:.1f} after (with these runs)",
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
    made = table(["", ""], [[key, f"`{value}`" if key == "command" else value] for key, value in facts.items()])
    page = "\n\n".join([f"# {title}", *body, "## How it was measured", made]) + "\n"
    print(page)
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(page)
        record = json.dumps({**facts, "results": data}, indent=1, default=asdict)
        given.out.with_suffix(".json").write_text(record + "\n")
