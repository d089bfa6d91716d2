"""What the steps of `blockprop gap beyond` cost: time per example of every row, over backprop's at batch 128.

The rows take steps in turn, in one process on one thread, each with a network of its own. A turn is ten updates, since
the proximal W-step makes its inverses anew in every tenth.
"""

import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from benchmarks.measure import SEED, arguments, interleaved, publish, ratios, table, timed
from blockprop.data import load
from blockprop.experiments.ingredients import cut_of, network_of, trainer_of
from blockprop.studies.beyond import beyond
from blockprop.studies.study import Row

BASE = "batch 128: backprop"
UPDATES = 10
WARM_UP = 2


def turn(row: Row, data: Any) -> Callable[[], float]:
    """Ten updates of a row; seconds per example."""
    settings = replace(row.settings, lr=row.lrs[0]).resolved()
    torch.manual_seed(SEED)
    blocks = cut_of(settings, network_of(settings, data), data.sample)
    algo = trainer_of(settings, blocks, data)
    size = settings.batch_size
    batches = [data.train.batch(torch.arange(i * size, (i + 1) * size)) for i in range(2)]
    taken = iter(range(10**9))

    def step() -> None:
        algo.step(*batches[next(taken) % 2])

    return lambda: timed(step, UPDATES) / size


def main() -> None:
    given = arguments(__doc__, data=True)
    torch.set_num_threads(1)
    study = beyond(data_dir=given.data_dir)
    data = load(study.rows[0].settings.data, given.data_dir, validation=study.rows[0].settings.validation)
    turns = {row.name: turn(row, data) for row in study.rows}
    interleaved(turns, WARM_UP)
    seconds = interleaved(turns, 5 if given.quick else 40)
    found = {name: ratios(values, seconds[BASE]) for name, values in seconds.items()}
    rows = [[name, f"{1e6 * statistics.median(seconds[name]):.0f}", spread] for name, spread in found.items()]
    body = [
        "Fashion-MNIST, 784-256-256-10, one layer a block, one thread. Time of training per example, evaluation not "
        "counted, as a ratio to backprop's with batches of 128: median of the ratios of turns in the same round (lower "
        "to upper quartile).",
        table(["", "µs an example", "x backprop, batch 128"], rows),
    ]
    publish("prices", given, "The price of a step past backprop", body, found)


if __name__ == "__main__":
    main()
