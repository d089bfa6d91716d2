"""Cut a network into K consecutive blocks: balanced by cost, evenly by layers, or at names."""

import math
import warnings
from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from blockprop.blocks import Blocks, Cut
from blockprop.cost import count_flops, count_weights, measure_seconds

__all__ = ["SplitBy", "layers_of", "split"]

SplitBy = Literal["flops", "time", "layers"]


def split(
    model: nn.Sequential | Sequence[nn.Module],
    blocks: int | None = None,
    *,
    at: Sequence[str] | None = None,
    by: SplitBy = "flops",
    sample: Tensor | None = None,
    passes: Sequence[float] | None = None,
) -> Blocks:
    """Cut a model into K consecutive blocks.

    Nested `nn.Sequential`s are opened, any other module stays whole. A *layer* is a module with a weight matrix
    together with what follows it up to the next one (its norm, activation, dropout); cuts fall between layers.
    The model itself is left as it is: same parameters, same `state_dict` keys.

    Args:
        model: an `nn.Sequential`, or a list of modules that are applied in turn.
        blocks: K, the number of blocks.
        at: instead of `blocks`, the names (as in `model.named_modules()`) at which a new block begins.
        by: what is balanced: "flops" (default; counted on `sample`, so the cut is the same every time), "time"
            (measured on `sample`, forward and backward), or "layers" (their number). The largest block is made
            as cheap as possible, then the blocks as even as possible.
        passes: how many passes over a batch each block makes, K numbers: in a pipeline with a process for every block
            those below the last may evaluate a batch again when its feedback comes. Default None, all alike.
        sample: an input batch, shape [N, ...]. Without one, "flops" counts weights instead, which is the same
            for fully connected layers; for anything else a warning asks for one.

    Returns:
        The blocks, bottom first, with the record of the cut.

    Raises:
        ValueError: a model of another kind, K below 1 or above the number of layers, a name that does not exist,
            layers that do not fit each other, a weight shared by two blocks.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 10))
    >>> split(model, 2)
    Blocks(0..2 | 3)
    >>> split(model, at=["2"])
    Blocks(0..1 | 2..3)
    """
    if not isinstance(model, nn.Sequential):
        model = _sequential(model)
    if not _plain(model):
        raise ValueError(
            f"the model, a {type(model).__name__}, has a forward of its own or a hook, which a cut would lose; "
            "expected a plain nn.Sequential (put it into one to keep it whole)"
        )
    layers = _flatten(model)
    if not layers:
        raise ValueError("the model is empty; expected an nn.Sequential with at least one module")
    if (blocks is None) == (at is None):
        raise ValueError("give either the number of blocks, split(model, 4), or names, split(model, at=['layer3'])")
    if at is not None:
        if isinstance(at, str):
            at = [at]
        if not isinstance(at, Sequence) or not all(isinstance(name, str) for name in at):
            raise ValueError(
                f"at is {at!r}; expected names as in model.named_modules(), also where they look like numbers, such as "
                f"at=[{layers[-1][0]!r}]; the model has {', '.join(name for name, _ in layers)}"
            )
        starts = _named_starts(layers, at)
        return _cut(model, layers, starts, "names", None)
    assert blocks is not None
    if isinstance(blocks, bool) or not isinstance(blocks, int) or blocks < 1:
        raise ValueError(f"number of blocks is {blocks!r}; expected a whole number of at least 1")
    units = _units(layers)
    if blocks > len(units):
        raise ValueError(
            f"cannot cut {len(units)} layer{'s' * (len(units) != 1)} into {blocks} blocks; "
            f"expected at most {len(units)}"
        )
    unit, costs = _costs(layers, units, by, sample)
    if unit == "weights" and 1 < blocks < len(units):
        other = next((name for name, layer in layers if not _fully_connected(layer)), None)
        if other is not None:
            warnings.warn(
                f"the cut is balanced by weights, which say little of the cost of layer {other!r}; give an input to "
                "count FLOPs on, split(model, K, sample=x), or choose by='layers'",
                stacklevel=2,
            )
    ends = [*units[1:], len(layers)]
    per_unit = [sum(costs[start:end]) for start, end in zip(units, ends, strict=True)]
    if unit == "layers":
        per_unit = [1.0] * len(units)
    firsts = balanced(per_unit, _passes(passes, blocks))
    block_costs = [sum(per_unit[start:end]) for start, end in zip(firsts, [*firsts[1:], len(units)], strict=True)]
    return _cut(model, layers, [units[first] for first in firsts], unit, block_costs)


def _passes(given: Sequence[float] | None, blocks: int) -> Sequence[float]:
    found = [1.0] * blocks if given is None else given
    if len(found) != blocks or not all(0 < each < math.inf for each in found):
        raise ValueError(f"passes is {list(found)} for {blocks} blocks; expected as many positive numbers")
    return found


def layers_of(model: nn.Sequential) -> list[tuple[str, nn.Module]]:
    """The layers between which `split` can cut, each as one module, with the name of its first part.

    Args:
        model: an `nn.Sequential`, nested or not, with at least one module.

    >>> [name for name, _ in layers_of(nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))]
    ['0', '3']
    """
    layers = _flatten(model)
    starts = _units(layers)
    groups = [layers[start:end] for start, end in zip(starts, [*starts[1:], len(layers)], strict=True)]
    return [(group[0][0], nn.Sequential(*(layer for _, layer in group))) for group in groups]


def _sequential(model: object) -> nn.Sequential:
    is_list = isinstance(model, Sequence | nn.ModuleList) and not isinstance(model, str)
    if not is_list or not all(isinstance(item, nn.Module) for item in model):  # type: ignore[attr-defined]
        raise ValueError(
            f"the model is a {type(model).__name__}; expected an nn.Sequential (nested ones too) or a list of modules"
        )
    return nn.Sequential(*model)  # type: ignore[misc]


def _flatten(model: nn.Sequential, prefix: str = "") -> list[tuple[str, nn.Module]]:
    """The modules that are applied in turn, by their names in the model."""
    layers: list[tuple[str, nn.Module]] = []
    # not named_children(), which leaves out the second occurrence of a module
    for name, child in model._modules.items():
        if child is None:
            raise ValueError(f"module {prefix + name!r} of the model is None; expected a module")
        if isinstance(child, nn.Sequential) and _plain(child):
            layers += _flatten(child, f"{prefix}{name}.")
        else:
            layers.append((prefix + name, child))
    return layers


def _plain(model: nn.Sequential) -> bool:
    """Whether it is its children in turn and nothing more: no forward of its own, no hooks."""
    return type(model).forward is nn.Sequential.forward and not (model._forward_hooks or model._forward_pre_hooks)


def _units(layers: Sequence[tuple[str, nn.Module]]) -> list[int]:
    """Where a layer in the sense of `split` begins: at modules with a weight matrix, and at the very first."""
    starts = [
        index for index, (_, layer) in enumerate(layers) if any(parameter.ndim >= 2 for parameter in layer.parameters())
    ]
    return [0, *starts[1:]]


def _named_starts(layers: Sequence[tuple[str, nn.Module]], at: Sequence[str]) -> list[int]:
    names = [name for name, _ in layers]
    starts = [0]
    for wanted in at:
        found = next((i for i, name in enumerate(names) if name == wanted or name.startswith(f"{wanted}.")), None)
        if found is None:
            raise ValueError(f"the model has no module {wanted!r} to cut at; it has {', '.join(names)}")
        if found <= starts[-1]:
            raise ValueError(
                f"cannot begin a block at {wanted!r}: expected names in the model's order, each after the first "
                "module and each once"
            )
        starts.append(found)
    return starts


def _costs(
    layers: Sequence[tuple[str, nn.Module]], units: Sequence[int], by: str, sample: Tensor | None
) -> tuple[str, list[float]]:
    """The unit of the costs, and the cost of every module."""
    if by == "layers":
        return by, [float(index in units) for index in range(len(layers))]
    if by == "flops":
        return ("weights", count_weights(layers)) if sample is None else (by, count_flops(layers, sample))
    if by == "time":
        if sample is None:
            raise ValueError("a split by time is measured on an input; give one: split(model, K, by='time', sample=x)")
        return by, measure_seconds(layers, sample)
    raise ValueError(f"unknown split by {by!r}; expected 'flops', 'time' or 'layers'")


def _fully_connected(layer: nn.Module) -> bool:
    """Whether its weight matrices are all applied once to an example, so that they count its FLOPs."""
    weighted = [module for module in layer.modules() if any(p.ndim >= 2 for p in module.parameters(recurse=False))]
    return all(isinstance(module, nn.Linear) for module in weighted)


def balanced(costs: Sequence[float], passes: Sequence[float]) -> list[int]:
    """Where each of K consecutive groups begins so that the dearest is as cheap as can be.

    Among such cuts the one with the least sum of squares is taken, that is the most even one; among equals, the
    one with the earliest cuts. Exact, by dynamic programming.

    Args:
        costs: a non-negative cost per layer.
        passes: for each of K groups, K from 1 to the number of layers, by what its layers' costs are multiplied.

    >>> balanced([4, 1, 1, 1, 1], [1, 1])
    [0, 1]
    >>> balanced([1, 1, 1, 1], [1, 1])
    [0, 2]
    >>> balanced([1] * 7, [4, 3])
    [0, 3]
    """
    blocks = len(passes)
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    # first the dearest group alone: the most even beginning need not be the beginning of the most even cut
    dearest: dict[int, float] = {0: 0.0}
    for k in range(1, blocks + 1):
        dearest = {
            end: min(
                max(value, passes[k - 1] * (sums[end] - sums[start])) for start, value in dearest.items() if start < end
            )
            for end in range(k, len(costs) - blocks + k + 1)
        }
    limit = dearest[len(costs)]
    # best[j]: the best cut of the first j layers into the groups so far, none above it, as (squares, beginnings)
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for k in range(1, blocks + 1):
        cuts = {
            end: [
                (squares + (passes[k - 1] * (sums[end] - sums[start])) ** 2, [*begins, start])
                for start, (squares, begins) in best.items()
                if start < end and passes[k - 1] * (sums[end] - sums[start]) <= limit
            ]
            for end in range(k, len(costs) - blocks + k + 1)
        }
        best = {end: min(found) for end, found in cuts.items() if found}
    return best[len(costs)][1]


def _cut(
    model: nn.Sequential,
    layers: Sequence[tuple[str, nn.Module]],
    starts: Sequence[int],
    by: str,
    costs: Sequence[float] | None,
) -> Blocks:
    groups = [layers[start:end] for start, end in zip(starts, [*starts[1:], len(layers)], strict=True)]
    cut = Cut(by, tuple(tuple(name for name, _ in group) for group in groups), tuple(costs or ()))
    return Blocks(model, [nn.Sequential(*(layer for _, layer in group)) for group in groups], cut)
