"""Inference (Section 6): labels by the plain forward pass, or by the energy.

The energy of a label y is the minimum of the augmented loss (Eq. 4) over the gluing variables: the least price, in
moved activations and in what is left of the loss, at which the network says y. It is sought in the residuals
r_{k+1} = h_{k+1} - b_k(h_k), in which Eq. (4) reads

    Σ_{k<K} λ_k ‖r_{k+1}‖² + ℓ(y, f(x; r)),        f the network whose activations are moved by r,

which is an h-step's problem (Eq. 5) of one gluing variable, r scaled by √λ, with an anchor of 0. Its Gauss-Newton
matrix is 2 in all directions but the few that the outputs see, so that conjugate gradients need an iteration an output.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from blockprop.blocks import Blocks
from blockprop.errors import block_failed
from blockprop.evaluation import Evaluation
from blockprop.hsolvers import conjugate_gradients
from blockprop.losses import OutputLoss
from blockprop.modes import evaluating
from blockprop.objective import GluingProblem, LossTerm
from blockprop.penalties import Squared, per_link

__all__ = ["Energies", "PredictBy", "energies", "predict"]

PredictBy = Literal["forward", "energy"]
Loss = Callable[[Tensor, Tensor], Tensor] | OutputLoss

_DECREASE = 1e-4  # the share of the predicted decrease that a step must bring
_HALVINGS = 20
_ROUNDING = 1e-6  # a rise by that share is none
_RESIDUAL = 1e-2  # of the linear systems: the next step corrects what is left


@dataclass(frozen=True)
class Energies:
    """The energy of every label.

    Attributes:
        values: shape [N, C], in the loss's units; no greater than the loss at the forward pass.
        left: how much there was to gain for the worst of them before its last step, by the gradient there: ‖∇‖² / 4,
            the most that there is where the network is nearly linear. Too much where a ReLU's kink holds the minimum.
            All minima are local.
    """

    values: Tensor
    left: float

    @property
    def labels(self) -> Tensor:
        """The label of least energy, shape [N]."""
        return self.values.argmin(1)


def predict(
    network: nn.Module | Blocks,
    inputs: Tensor,
    *,
    by: PredictBy = "forward",
    loss: Loss | None = None,
    penalty: float | Sequence[float] = 1.0,
) -> Tensor:
    """One label an example, in evaluation mode: the largest output of the forward pass, or the least energy.

    Weights, buffers, gradients and the modules' modes are left as they are.

    Args:
        network: any classifier for "forward"; for "energy" what [`split`][blockprop.split.split] returned.
        inputs: x, shape [N, ...].
        by: "forward" (default) or "energy".
        loss: of "energy", as in [`energies`][blockprop.inference.energies].
        penalty: of "energy", as in `energies`.

    Returns:
        Labels, shape [N].

    Raises:
        ValueError: outputs that are not [N, C], inputs that a block does not take, or as in `energies`.

    >>> from blockprop.split import split
    >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    >>> with torch.no_grad():
    ...     for layer in model:
    ...         _ = layer.weight.copy_(torch.eye(2))
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> predict(model, x), predict(split(model, 2), x, by="energy")
    (tensor([0, 1]), tensor([0, 1]))
    """
    if by not in get_args(PredictBy):
        raise ValueError(f"unknown way to predict {by!r}; expected one of {', '.join(get_args(PredictBy))}")
    if by == "energy":
        return energies(network, inputs, loss=loss, penalty=penalty).labels
    with evaluating([network.model if isinstance(network, Blocks) else network]), torch.no_grad():
        outputs: Tensor = _forward(network, inputs)[-1] if isinstance(network, Blocks) else network(inputs)
        return _of_labels(outputs).argmax(1)


@torch.no_grad()
def energies(
    blocks: nn.Module | Blocks,
    inputs: Tensor,
    *,
    loss: Loss | None = None,
    penalty: float | Sequence[float] = 1.0,
    steps: int = 20,
    tolerance: float = 1e-3,
    batch_size: int = 128,
) -> Energies:
    """The minimum of Eq. (4) over h_2..h_K, for every example and every label that the network knows.

    Gauss-Newton steps from the forward pass, halved until the energy falls; all labels of a batch at once. Each costs
    about 2 C + 3 passes over C copies of every block above the first.

    Args:
        blocks: what [`split`][blockprop.split.split] returned, with outputs [N, C].
        inputs: x, shape [N, ...].
        loss: a loss over class labels, default `nn.CrossEntropyLoss()`.
        penalty: λ (default 1), of the squared penalty; one, or one per link, bottom first.
        steps: the most Gauss-Newton steps, default 20.
        tolerance: in the loss's units, default 1e-3: an energy is done when no more than this is left to gain, or
            a step has gained no more.
        batch_size: examples at a time, default 128.

    Raises:
        ValueError: an argument out of range, another penalty than the squared one, a loss that is not over labels,
            inputs that a block does not take, outputs that are not [N, C].
    """
    if not isinstance(blocks, Blocks):
        raise ValueError(f"energies of a {type(blocks).__name__}; expected Blocks: blocks = blockprop.split(model, 2)")
    output_loss = loss if isinstance(loss, OutputLoss) else OutputLoss(loss or nn.CrossEntropyLoss())
    if not output_loss.over_classes:
        raise ValueError(
            f"energies with a {type(output_loss.loss).__name__}; expected a loss over labels: nn.CrossEntropyLoss()"
        )
    weights = [_weight(link) for link in per_link(penalty, len(blocks) - 1)]
    for name, value in (("steps", steps), ("batch size", batch_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value}; expected a whole number of at least 1")
    if not 0 < tolerance < float("inf"):
        raise ValueError(f"tolerance is {tolerance}; expected a positive finite number")
    if len(inputs) == 0:
        raise ValueError("inputs have no rows; expected at least one example")
    values, left = [], 0.0
    with evaluating([blocks.model]):
        for some in torch.split(inputs, batch_size):
            found = _Minimum(blocks, some, output_loss, weights).seek(steps, tolerance)
            values.append(found.values)
            left = max(left, found.left)
    return Energies(torch.cat(values), left)


def _weight(penalty: object) -> float:
    if not isinstance(penalty, Squared):
        raise ValueError(f"energies are of the squared penalty, not {type(penalty).__name__}; expected λ")
    return penalty.weight


def _of_labels(outputs: Tensor) -> Tensor:
    if outputs.ndim != 2:
        raise ValueError(f"the network's outputs have shape {list(outputs.shape)}; expected [N, C], a label an example")
    return outputs


def _at(block: nn.Module, h: Tensor) -> Tensor:
    """The block's output, on the block's own device."""
    output: Tensor = block(h.to(next(block.parameters(), h).device))
    return output


def _forward(blocks: Blocks, inputs: Tensor) -> list[Tensor]:
    """The blocks' outputs, bottom first."""
    outputs: list[Tensor] = []
    for k, block in enumerate(blocks, 1):
        h = outputs[-1] if outputs else inputs
        try:
            # a block may begin in place
            outputs.append(_at(block, h.clone()))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, IndexError) as error:
            raise block_failed(k, block, h, error) from error
    return outputs


class _Displaced(nn.Module):
    """The blocks above the first as a function of √λ_k r_{k+1}, all links' side by side: [N, D] -> outputs [N, C]."""

    def __init__(
        self, blocks: Sequence[nn.Module], bottom: Tensor, shapes: Sequence[torch.Size], weights: Sequence[float]
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.bottom = bottom
        self.shapes = shapes
        self.weights = weights

    def forward(self, scaled: Tensor) -> Tensor:
        h = self.bottom
        parts = torch.split(scaled, [math.prod(shape) for shape in self.shapes], 1)
        for block, part, shape, weight in zip(self.blocks, parts, self.shapes, self.weights, strict=True):
            h = _at(block, h + (part.view(-1, *shape) / math.sqrt(weight)).to(h.device))
        return h


class _Minimum:
    """The search for the energies of a batch: a row for every example and label, each a problem of its own."""

    def __init__(self, blocks: Blocks, inputs: Tensor, loss: OutputLoss, weights: Sequence[float]) -> None:
        self.blocks, self.loss, self.weights = blocks[1:], loss, weights
        outputs = _forward(blocks, inputs)
        self.bottom = outputs[0]
        self.shapes = [output.shape[1:] for output in outputs[:-1]]
        logits = _of_labels(outputs[-1])
        self.classes = logits.shape[1]
        self.labels = torch.arange(self.classes, device=logits.device).repeat(len(logits))
        self.values = loss.per_example(logits.repeat_interleave(self.classes, 0), self.labels)
        self.point = self.bottom.new_zeros(len(self.values), sum(math.prod(shape) for shape in self.shapes))
        self.left = torch.zeros_like(self.values)

    def seek(self, steps: int, tolerance: float) -> Energies:
        rows = torch.arange(len(self.values), device=self.values.device)
        for _ in range(steps if self.blocks else 0):
            gained = self._step(rows)
            rows = rows[(gained > tolerance) & (self.left[rows] > tolerance)]
            if len(rows) == 0:
                break
        return Energies(self.values.view(-1, self.classes), float(self.left.max()))

    def _step(self, rows: Tensor) -> Tensor:
        """One Gauss-Newton step of some rows, and what each gained; `left` is measured where it starts."""
        network = _Displaced(self.blocks, self.bottom[rows // self.classes], self.shapes, self.weights)
        point, labels, value = self.point[rows], self.labels[rows], self.values[rows]
        evaluation = Evaluation(network, torch.zeros_like(point), keep_graph=False)
        problem = GluingProblem(evaluation, LossTerm(self.loss, labels), Squared())
        _, slope = problem.gradient(point)
        self.left[rows] = slope.square().sum(1) / 4
        matrix = problem.curvature_product(point)
        move, _ = conjugate_gradients(matrix, -slope, iterations=self.classes, tolerance=_RESIDUAL)
        predicted, size, slack = (slope * move).sum(1), torch.ones_like(value), _ROUNDING * value
        for _ in range(_HALVINGS):
            trial = point + size[:, None] * move
            found = trial.square().sum(1) + self.loss.per_example(evaluation(trial), labels)
            falls = found <= value + slack + _DECREASE * size * predicted
            if falls.all():
                break
            size = torch.where(falls, size, size / 2)
        self.point[rows] = torch.where(falls[:, None], trial, point)
        self.values[rows] = torch.where(falls, found, value)
        return value - self.values[rows]
