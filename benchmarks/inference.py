"""Prediction by the energy beside the forward pass: accuracy, agreement and price, on a perceptron trained on MNIST.

The exact form trains it, which is backpropagation at any K: the cuts that are compared are cuts of one network.
"""

import time
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import blockprop
from benchmarks.measure import SEED, Spread, arguments, interleaved, publish, table
from blockprop.data import Dataset, batches, load
from blockprop.inference import PredictBy
from blockprop.models import mlp

EPOCHS, BATCH, LR = 3, 64, 0.1
CUTS = (2, 4)
PENALTIES = (0.1, 1.0, 10.0)
NOISE = 1.0  # standard deviation, in units of the normalised images: inputs of another kind than those learnt
ROUNDS, TIMED = 5, 64


def train(data: Dataset, epochs: int) -> nn.Sequential:
    """784-256x3-10 after a few epochs of plain SGD."""
    torch.manual_seed(SEED)
    model = mlp(data.input_shape, data.classes, width=256, depth=4)
    blocks = blockprop.split(model, CUTS[-1])
    algo = blockprop.BlockProp(blocks, nn.CrossEntropyLoss(), lambda parameters: torch.optim.SGD(parameters, lr=LR))
    for epoch in range(epochs):
        for ids in batches(len(data.train), BATCH, seed=SEED, epoch=epoch):
            algo.step(*data.train.batch(ids))
    return model


def seconds(blocks: blockprop.Blocks, inputs: Tensor, by: PredictBy, penalty: float) -> float:
    """The processor's seconds per example."""
    start = time.process_time()
    blockprop.predict(blocks, inputs, by=by, penalty=penalty)
    return (time.process_time() - start) / len(inputs)


def compared(model: nn.Sequential, inputs: Tensor, noisy: Tensor, targets: Tensor, rounds: int) -> list[dict[str, Any]]:
    """Every cut and penalty beside the forward pass."""
    forward = {"clean": blockprop.predict(model, inputs), "noisy": blockprop.predict(model, noisy)}
    found = []
    for K in CUTS:
        blocks = blockprop.split(model, K)
        for penalty in PENALTIES:
            row: dict[str, Any] = {"K": K, "λ": penalty}
            for name, examples in (("clean", inputs), ("noisy", noisy)):
                energies = blockprop.energies(blocks, examples, penalty=penalty)
                apart = energies.labels != forward[name]
                row[name] = {
                    "forward, right": _share(forward[name] == targets),
                    "energy, right": _share(energies.labels == targets),
                    "agreement": 1 - _share(apart),
                    "apart": int(apart.sum()),
                    "apart, forward right": int((forward[name] == targets)[apart].sum()),
                    "apart, energy right": int((energies.labels == targets)[apart].sum()),
                    "left": energies.left,
                }
            clocks = {by: partial(seconds, blocks, inputs[:TIMED], by, penalty) for by in ("forward", "energy")}
            row["seconds an example"] = {by: Spread.of(times) for by, times in interleaved(clocks, rounds).items()}
            found.append(row)
    return found


def _share(flags: Tensor) -> float:
    return float(flags.double().mean())


def lines(found: list[dict[str, Any]], name: str) -> str:
    """The table of the clean or of the noisy examples."""
    rows = []
    for row in found:
        part, times = row[name], row["seconds an example"]
        energy, forward = times["energy"], times["forward"]
        price = [f"{1e3 * energy.median:.2f}", f"{energy.median / forward.median:.0f}"] if name == "clean" else []
        rows.append(
            [
                row["K"],
                f"{row['λ']:g}",
                f"{part['forward, right']:.2%}",
                f"{part['energy, right']:.2%}",
                f"{part['agreement']:.2%}",
                f"{part['apart']}: {part['apart, forward right']} and {part['apart, energy right']}",
                f"{part['left']:.1g}",
                *price,
            ]
        )
    head = ["K", "λ", "forward", "energy", "agreement", "apart: forward and energy right", "left"]
    return table(head + (["energy, ms an example", "times the forward pass"] if name == "clean" else []), rows)


def main() -> None:
    given = arguments(__doc__, data=True)
    torch.set_num_threads(1)
    data = load("mnist", given.data_dir)
    epochs, rounds, count = (1, 2, 300) if given.quick else (EPOCHS, ROUNDS, 1000)
    model = train(data, epochs)
    inputs, targets = data.test.batch(torch.arange(count))
    noisy = inputs + NOISE * torch.randn(inputs.shape, generator=torch.Generator().manual_seed(SEED))
    found = compared(model, inputs, noisy, targets, rounds)
    body = [
        f"A 784-256x3-10 perceptron after {epochs} epochs of SGD {LR} (batch {BATCH}) on MNIST; the first {count} test "
        "images. The same network for all rows: K is where it is cut for the energy, λ the penalty on every link. "
        '"left" is the worst of what the search may have left, in nats (see `Energies`).',
        lines(found, "clean"),
        f"The same images with normal noise of standard deviation {NOISE:g}, in units of the normalised images, which "
        "the network was not trained on:",
        lines(found, "noisy"),
        f"Milliseconds are the processor's on one thread, median of {rounds} rounds of {TIMED} images each, in turn.",
    ]
    publish("inference", given, "Prediction by energy", body, found)


if __name__ == "__main__":
    main()
