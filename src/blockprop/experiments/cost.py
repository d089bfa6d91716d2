"""Appendix A for a model of the zoo: what a step costs, counted and timed, in every form."""

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import nn

from blockprop.blocks import Blocks
from blockprop.data import Dataset
from blockprop.models import NAMES, build
from blockprop.split import split
from blockprop.stepcost import Costs, StepCost, step_costs

__all__ = ["cost", "one_thread", "random_data", "record", "table"]


def _check(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} is {count}; expected a whole number of at least 1")


def random_data(name: str, examples: int, context: int) -> Dataset:
    """Random examples of the kind that the model is for: MNIST's, CIFAR-10's, or Shakespeare's characters."""
    generator = torch.Generator().manual_seed(0)
    if name == "gpt":
        tokens = torch.randint(65, (examples, context), generator=generator)
        pairs = tokens, tokens
        return Dataset.from_tensors(pairs, pairs, classes=65, validation=0.0, name="text")
    shape = (1, 28, 28) if name == "mlp" else (3, 32, 32)
    pairs = torch.rand(examples, *shape, generator=generator), torch.arange(examples) % 10
    return Dataset.from_tensors(pairs, pairs, classes=10, validation=0.0, name="images")


def cost(
    model: str,
    *,
    width: int | None = None,
    depth: int | None = None,
    dropout: float = 0.0,
    norm: str | None = None,
    blocks: int = 2,
    h_steps: int = 1,
    batch_size: int = 64,
    context: int = 64,
    repeats: int = 7,
) -> tuple[Blocks, Costs, Costs]:
    """Build a model, cut it, and meter its steps on a random batch; seconds on one thread.

    Args:
        model: one of [`NAMES`][blockprop.models.catalogue.NAMES]; "mlp" for inputs of 28 x 28, the residual networks
            for 3 x 32 x 32, "gpt" for a vocabulary of 65.
        width: the model's; None for its default.
        depth: the model's; None for its default.
        dropout: the model's.
        norm: the model's.
        blocks: K, default 2; balanced by FLOPs.
        h_steps: N_h, default 1.
        batch_size: examples in the batch, default 64.
        context: tokens of an example of "gpt", default 64.
        repeats: rounds of timing, default 7.

    Returns:
        The blocks, the FLOPs, the seconds.

    Raises:
        ValueError: an unknown model, or a setting out of its range.
    """
    if model not in NAMES:
        raise ValueError(f"unknown model {model!r}; expected one of {', '.join(NAMES)}")
    _check(**{"h-steps": h_steps, "batch size": batch_size, "context": context, "repeats": repeats})
    data = random_data(model, max(2, batch_size), context)
    torch.manual_seed(0)
    made = split(build(model, data, width=width, depth=depth, dropout=dropout, norm=norm), blocks, sample=data.sample)
    inputs, targets = data.train.batch(torch.arange(batch_size))
    with one_thread():
        flops, seconds = (
            step_costs(made, nn.CrossEntropyLoss(), inputs, targets, h_steps=h_steps, repeats=rounds)
            for rounds in (0, repeats)
        )
    return made, flops, seconds


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread, and afterwards on as many as before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def table(flops: Costs, seconds: Costs, title: str) -> Table:
    """FLOPs and milliseconds of every case, beside the bounds."""
    made = Table(title=title, title_justify="left", caption_justify="left", box=SIMPLE_HEAD, collapse_padding=True)
    prefix, unit = next((prefix, unit) for prefix, unit in _PREFIXES if flops.backprop >= unit)
    made.add_column("", no_wrap=True)
    for name in (f"{prefix}FLOP", "ms"):
        for head in ("forward", "h-step", "W-step", "total"):
            made.add_column(f"{head}\n{name}", justify="right", no_wrap=True)
        made.add_column("ratio", justify="right", no_wrap=True)
    made.add_column("bounds", no_wrap=True)
    units = (flops, unit), (seconds, 1e-3)
    for name in ("forward", "backprop"):
        alone = [_total(getattr(costs, name), costs, unit) for costs, unit in units]
        made.add_row(name, "", "", "", *alone[0], "", "", "", *alone[1])
    made.add_section()
    for case in flops.cases:
        cells = [cell for costs, unit in units for cell in _parts(costs.cases[case], costs, unit)]
        made.add_row(str(case), *cells, "" if case.cached else flops.verdict(case))
    upper = flops.forward + (flops.h_steps + 1) * flops.backprop
    made.caption = (
        f"Ratios are to backprop. Bounds in {prefix}FLOP: C(backprop) + C(forward) = {_digits(flops.lower / unit)} < "
        f"C(total) < C(forward) + (N_h + 1) C(backprop) = {_digits(upper / unit)} at N_h = {flops.h_steps}. The exact "
        "form has N_h = 1."
    )
    return made


_PREFIXES = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0))


def _digits(number: float) -> str:
    return f"{number:.3g}" if number < 999.5 else f"{number:.0f}"


def _parts(cost: StepCost, costs: Costs, unit: float) -> list[str]:
    return [
        *(_digits(part / unit) for part in (cost.forward, cost.h_step, cost.w_step)),
        *_total(cost.total, costs, unit),
    ]


def _total(amount: float, costs: Costs, unit: float) -> list[str]:
    return [_digits(amount / unit), f"{amount / costs.backprop:.3f}"]


def record(blocks: Blocks, flops: Costs, seconds: Costs) -> dict[str, Any]:
    """The same, JSON-ready: FLOPs, seconds, bounds, the cut and the versions."""
    return {
        "cut": blocks.cut.as_dict(),
        "h_steps": flops.h_steps,
        "forward": {"flops": flops.forward, "seconds": seconds.forward},
        "backprop": {"flops": flops.backprop, "seconds": seconds.backprop},
        "cases": [
            {
                "form": case.form,
                "nothing_shared": not case.reuse,
                "cached": case.cached,
                "flops": {**asdict(found), "total": found.total},
                "seconds": {**asdict(seconds.cases[case]), "total": seconds.cases[case].total},
                "lower_bound": flops.lower,
                "upper_bound": flops.upper(case),
                "verdict": flops.verdict(case),
            }
            for case, found in flops.cases.items()
        ],
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }
