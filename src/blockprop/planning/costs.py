"""What every layer of a network costs: measured seconds of its passes, bytes of its output and of its weights.

Each *kind* of layer is measured once, however often it occurs, so that a network too deep for this machine can be
costed on it: layers are of one kind if they print alike, have weights of the same shapes, and take inputs of the same
shape. The network itself may be on the `meta` device, where it has shapes and no memory.
"""

import copy
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from blockprop.cost import timed
from blockprop.errors import first_line

__all__ = ["Layer", "Passes", "halved", "measure_layers", "representatives"]

COPIES = 3  # so many layers in a row of one kind are measured, one after the other, as in the real network


@dataclass(frozen=True)
class Passes:
    """Seconds of a layer's passes on a batch.

    Attributes:
        forward: the forward pass, with a graph.
        backward: one backward pass, for the gradients in the input and in the weights.
        input_gradient: a backward pass for the gradient in the input alone.
        weight_gradient: a backward pass for the gradients in the weights alone.
    """

    forward: float
    backward: float
    input_gradient: float
    weight_gradient: float


@dataclass(frozen=True)
class Layer:
    """What a layer costs.

    Attributes:
        name: of its first module.
        passes: by the number of examples, in seconds.
        update: a step of the optimizer, in seconds.
        output_bytes: of one example's output.
        weight_bytes: of its weights.
        taken: seconds that a further microbatch's gradients cost in new memory of the weights' size; default 0.
        copied: seconds of copying its weights, as stashing does; default 0.
    """

    name: str
    passes: Mapping[int, Passes]
    update: float
    output_bytes: float
    weight_bytes: float
    taken: float = 0.0
    copied: float = 0.0

    def at(self, examples: float) -> Passes:
        """The passes on so many examples: between two measured sizes on a straight line.

        Above the largest size in proportion to it. Below the smallest on the line through the two smallest, but not
        below the proportion.

        >>> layer = Layer("a", {2: Passes(2, 2, 1, 1), 4: Passes(3, 4, 2, 2)}, 0, 0, 0)
        >>> layer.at(3), layer.at(8).forward, layer.at(1).forward
        (Passes(forward=2.5, backward=3.0, input_gradient=1.5, weight_gradient=1.5), 6.0, 1.5)
        """
        sizes = sorted(self.passes)
        if examples >= sizes[-1] or len(sizes) == 1:
            return Passes(*(value * examples / sizes[-1] for value in astuple(self.passes[sizes[-1]])))
        upper = next((i for i, size in enumerate(sizes) if size > examples and i > 0), 1)
        low, high = sizes[upper - 1], sizes[upper]
        share = (examples - low) / (high - low)
        pairs = zip(astuple(self.passes[low]), astuple(self.passes[high]), strict=True)
        return Passes(*(max(a + share * (b - a), a * min(1.0, examples / low)) for a, b in pairs))


def halved(batch_size: int) -> list[int]:
    """A batch, half of it, a quarter, and so on to two examples: the sizes to measure at.

    >>> halved(128)
    [128, 64, 32, 16, 8, 4, 2]
    """
    sizes = [batch_size]
    while sizes[-1] > 3:
        sizes.append(sizes[-1] // 2)
    return sizes


def measure_layers(
    layers: Sequence[tuple[str, nn.Module]],
    inputs: Tensor,
    sizes: Sequence[int] | None = None,
    repeats: int = 5,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
) -> list[Layer]:
    """Measure what layers cost, each kind once. The layers themselves are left as they are.

    Seconds are the processor's, for the layers one after the other as in training: of `repeats` rounds through all
    sizes the lower quartile, since what other programs do to a measurement only adds to it. They are of use on the
    CPU, with one thread (set it beforehand), in a process that keeps what it frees
    ([`keep_freed_memory`][blockprop.planning.allocator.keep_freed_memory]; `blockprop plan` calls it).

    Args:
        layers: (name, module) pairs, evaluated one after the other, as [`layers_of`][blockprop.split.layers_of]
            gives them; on the CPU or on the `meta` device.
        inputs: a batch, shape [N, ...].
        sizes: numbers of examples to measure at, from 1 to N; default N, N/2, N/4, ..., 2.
        repeats: measurements of each, default 5.
        optimizer: makes one for a layer's weights; default plain SGD.

    Raises:
        ValueError: no layers, no examples, a size out of its range, or layers that do not fit each other.
    """
    sizes = halved(len(inputs)) if sizes is None else sizes
    if not layers:
        raise ValueError("there are no layers to measure; expected at least one")
    if not sizes or not all(1 <= size <= len(inputs) for size in sizes):
        raise ValueError(f"sizes are {list(sizes)}; expected numbers of examples from 1 to {len(inputs)}")
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}; expected a whole number of at least 1")
    kinds, outputs = _kinds(layers, inputs)
    chosen = representatives(kinds)
    chain = [_real(layers[index][1]) for index in chosen]
    with torch.random.fork_rng(devices=[]):
        _walk(chain, inputs)
        rounds = [{size: _walk(chain, inputs[:size]) for size in sizes} for _ in range(repeats)]
        on_weights = _on_weights(chain, repeats, optimizer or (lambda weights: torch.optim.SGD(weights, lr=1e-6)))
    found = {
        size: [
            Passes(*map(_low, zip(*(astuple(one[size][index]) for one in rounds), strict=True)))
            for index in range(len(chain))
        ]
        for size in sizes
    }

    def of_kind(kind: int) -> tuple[dict[int, Passes], list[float]]:
        at = [position for position, index in enumerate(chosen) if kinds[index] == kind]
        passes = {
            size: Passes(*map(statistics.fmean, zip(*(astuple(rows[i]) for i in at), strict=True)))
            for size, rows in found.items()
        }
        return passes, [statistics.fmean(one) for one in zip(*(on_weights[i] for i in at), strict=True)]

    costs = {kind: of_kind(kind) for kind in set(kinds)}
    made = []
    for (name, layer), kind, output in zip(layers, kinds, outputs, strict=True):
        passes, (update, taken, copied) = costs[kind]
        size = float(sum(_bytes(p) for p in layer.parameters()))
        made.append(Layer(name, passes, update, _bytes(output[:1]), size, taken, copied))
    return made


def representatives(kinds: Sequence[int]) -> list[int]:
    """The layers to measure: of those of one kind in a row the first few, which fit each other as they stand.

    >>> representatives([0, 1, 1, 1, 1, 1, 2])
    [0, 1, 2, 3, 6]
    """
    return [
        index
        for index, kind in enumerate(kinds)
        if set(kinds[max(0, index - COPIES) : index + 1]) != {kind} or index < COPIES
    ]


def _kinds(layers: Sequence[tuple[str, nn.Module]], inputs: Tensor) -> tuple[list[int], list[Tensor]]:
    """A number for the kind of each layer, and its output for two examples, on the meta device."""
    numbers: dict[Any, int] = {}
    kinds, outputs = [], []
    h = torch.empty(2, *inputs.shape[1:], dtype=inputs.dtype, device="meta")
    for name, layer in layers:
        shapes = tuple((tuple(p.shape), p.dtype) for p in layer.parameters())
        key = (repr(layer), shapes, tuple(h.shape), h.dtype)
        kinds.append(numbers.setdefault(key, len(numbers)))
        try:
            with torch.no_grad():
                h = _meta(layer)(h)
        except (RuntimeError, IndexError) as error:
            raise ValueError(
                f"layer {name!r} does not take an input of shape [N, {', '.join(map(str, h.shape[1:]))}]: "
                f"{first_line(error)}"
            ) from error
        outputs.append(h)
    return kinds, outputs


def _meta(layer: nn.Module) -> nn.Module:
    return layer if all(p.is_meta for p in layer.parameters()) else copy.deepcopy(layer).to("meta")


def _real(layer: nn.Module) -> nn.Module:
    """A copy to measure on; of a layer without memory, one with weights as it would begin with."""
    made = copy.deepcopy(layer)
    if any(p.is_meta for p in made.parameters()):
        made = made.to_empty(device="cpu")
        with torch.no_grad():
            for tensor in (*made.parameters(), *made.buffers()):
                tensor.zero_()
        for part in made.modules():
            reset = getattr(part, "reset_parameters", None)
            if callable(reset):
                reset()
    return made.train()


def _bytes(tensor: Tensor) -> float:
    return float(tensor.numel() * tensor.element_size())


def _low(seconds: Sequence[float]) -> float:
    return sorted(seconds)[len(seconds) // 4]


def _walk(chain: Sequence[nn.Module], inputs: Tensor) -> list[Passes]:
    """Once up and, for each of the three backward passes, once down."""
    leaves, outputs, forward = [], [], []
    h = inputs
    for layer in chain:
        leaf = h.detach().requires_grad_(h.is_floating_point())
        h, seconds = timed(layer, leaf)
        leaves.append(leaf)
        outputs.append(h)
        forward.append(seconds)
    slopes = [torch.full_like(h, 1.0 / h.numel())]  # of the outputs, top first
    for leaf, output in zip(leaves[:0:-1], outputs[:0:-1], strict=True):
        slopes.append(torch.autograd.grad(output, leaf, slopes[-1], retain_graph=True)[0])
    slopes.reverse()

    def down(*, of_input: bool, of_weights: bool) -> list[float]:
        found = []
        for layer, leaf, output, slope in reversed(list(zip(chain, leaves, outputs, slopes, strict=True))):
            wanted = [leaf] if of_input and leaf.requires_grad else []
            wanted += [p for p in layer.parameters() if p.requires_grad] if of_weights else []
            took = 0.0
            if wanted and output.requires_grad:
                _, took = timed(torch.autograd.grad, output, wanted, slope, retain_graph=True, allow_unused=True)
            found.append(took)
        return found[::-1]

    alone = down(of_input=True, of_weights=False), down(of_input=False, of_weights=True)
    both = down(of_input=True, of_weights=True)
    return [Passes(*four) for four in zip(forward, both, *alone, strict=True)]


def _on_weights(
    chain: Sequence[nn.Module], repeats: int, make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
) -> list[tuple[float, float, float]]:
    """Seconds of what is done with each layer's weights, all in turn.

    They are a step of the optimizer; a gradient's way into new memory, which a further microbatch's gradients take and
    a pass measured alone does not, as half of two such ways; and a copy.
    """
    weights = [list(layer.parameters()) for layer in chain]
    for parameter in (p for own in weights for p in own):
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizers = [make(own) if own else None for own in weights]

    def take(own: list[nn.Parameter]) -> None:
        for parameter in own:
            assert parameter.grad is not None
            parameter.grad = torch.add(parameter.grad / 2.0, parameter.grad, alpha=0.5)

    def copy(own: list[nn.Parameter]) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in own]

    rounds = []
    for _ in range(repeats + 1):
        steps = [timed(one.step)[1] if one else 0.0 for one in optimizers]
        taken = [timed(take, own)[1] / 2 for own in weights]
        copied = [timed(copy, own)[1] for own in weights]
        rounds.append(list(zip(steps, taken, copied, strict=True)))
    return [
        tuple(_low(seconds) for seconds in zip(*of_layer, strict=True))  # type: ignore[misc]
        for of_layer in zip(*rounds[1:], strict=True)
    ]
