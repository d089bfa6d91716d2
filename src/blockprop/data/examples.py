"""A part of a dataset: numbered examples, handed out in batches."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import data as torch_data

Transform = Callable[[Tensor], Tensor]
Augment = Callable[[Tensor, torch.Generator], Tensor]
Pairs = tuple[Tensor, Tensor] | Sequence[tuple[Any, Any]] | torch_data.Dataset[Any]


class Split(Protocol):
    """What training and evaluation ask of the train, validation or test part of a dataset."""

    def __len__(self) -> int:
        """Number of examples; their ids are 0..len-1."""

    def batch(self, ids: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the examples ``ids`` [B], both with B rows.

        Args:
            ids: int64 [B], each in 0..len-1.
            generator: Given in training, where augmentation draws from it; None in evaluation.
        """

    def batch_inputs(self, ids: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The inputs of `batch` alone: the same under a generator in the same state."""

    def batch_targets(self, ids: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The targets of `batch` alone: the same under a generator in the same state."""

    def only_inputs(self) -> "Split":
        """This part without its targets, whose memory is freed once nothing else holds them."""

    def only_targets(self) -> "Split":
        """This part without its inputs, whose memory is freed once nothing else holds them."""


def unchanged(inputs: Tensor) -> Tensor:
    """Return the inputs as they are: the transform of data that need none."""
    return inputs


@dataclass(frozen=True, eq=False)
class Examples:
    """Examples held in memory as tensors; the id of an example is its row number.

    Args:
        inputs: [N, ...], in the form they are stored in (uint8 for images).
        targets: [N] class numbers, [N, T] tokens or [N, D] real values.
        transform: Turns a batch of stored inputs into what the network reads; the identity unless told.
        augment: Called before ``transform``, on stored inputs, and only in training; none unless told.

    Raises:
        ValueError: If inputs and targets differ in length, or hold NaN or infinite values, or ``transform`` or
            ``augment`` is not a function.

    >>> examples = Examples(torch.arange(6.0).view(3, 2), torch.tensor([0, 1, 0]))
    >>> examples.batch(torch.tensor([2, 0]))
    (tensor([[4., 5.],
            [0., 1.]]), tensor([0, 0]))
    """

    inputs: Tensor
    targets: Tensor
    transform: Transform = unchanged
    augment: Augment | None = None

    def __post_init__(self) -> None:
        for name, function in (("transform", self.transform), ("augment", self.augment)):
            if function is not None and not callable(function):
                raise ValueError(f"{name} is a {type(function).__name__}; expected a function of a batch of inputs")
        for name, values in (("inputs", self.inputs), ("targets", self.targets)):
            if values.ndim == 0:
                raise ValueError(f"{name} is a single number; expected one row per example: stack them first")
            if values.is_floating_point() and not values.is_meta and (bad := int((~values.isfinite()).sum())):
                raise ValueError(
                    f"{name} hold {bad} NaN or infinite values of {values.numel()}; "
                    f"expected finite numbers: clean or drop those examples"
                )
        if len(self.inputs) != len(self.targets):
            raise ValueError(
                f"there are {len(self.inputs)} inputs but {len(self.targets)} targets; "
                f"expected one target per input: pass tensors of equal length"
            )

    @classmethod
    def of(cls, pairs: Pairs, *, transform: Transform = unchanged, augment: Augment | None = None) -> "Examples":
        """Hold a user's own data in memory.

        Args:
            pairs: A tuple (inputs, targets) of tensors, or a map-style ``torch.utils.data.Dataset`` (anything
                with a length and an index) of (input, target) pairs, which is read once and stacked.
            transform: As in `Examples`.
            augment: As in `Examples`.

        Raises:
            ValueError: If there are no examples, they are not pairs of tensors or numbers, their shapes
                differ from one to the next, or they break a rule of `Examples`.

        >>> len(Examples.of([([0.0, 1.0], 0), ([1.0, 0.0], 1)]))
        2
        """
        match pairs:
            case (Tensor() as inputs, Tensor() as targets):
                examples = cls(inputs, targets, transform, augment)
            case _:
                examples = cls(*_stacked(pairs), transform, augment)
        if len(examples) == 0:
            raise ValueError("the data hold no examples; expected at least one: check how they were selected")
        return examples

    def __len__(self) -> int:
        return len(self.inputs)

    def __repr__(self) -> str:
        return f"Examples({len(self)} of {_form(self.inputs)}, targets {_form(self.targets)})"

    def batch(self, ids: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the examples ``ids`` [B]; see `Split.batch`."""
        return self.batch_inputs(ids, generator), self.batch_targets(ids)

    def batch_inputs(self, ids: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Inputs of the examples ``ids`` [B]; see `Split.batch`.

        Raises:
            ValueError: They were dropped by `only_targets`.
        """
        inputs = _held("inputs", self.inputs)[ids]
        if generator is not None and self.augment is not None:
            inputs = self.augment(inputs, generator)
        return self.transform(inputs)

    def batch_targets(self, ids: Tensor, generator: torch.Generator | None = None) -> Tensor:  # noqa: ARG002
        """Targets of the examples ``ids`` [B]; the generator is not drawn from.

        Raises:
            ValueError: They were dropped by `only_inputs`.
        """
        return _held("targets", self.targets)[ids]

    def only_inputs(self) -> "Examples":
        """These examples without their targets, which become a meta tensor: a shape without values or memory.

        >>> examples = Examples(torch.ones(3, 2), torch.tensor([0, 1, 0])).only_inputs()
        >>> len(examples), examples.batch_inputs(torch.tensor([1]))
        (3, tensor([[1., 1.]]))
        """
        return replace(self, targets=self.targets.to("meta"))

    def only_targets(self) -> "Examples":
        """These examples without their inputs, which become a meta tensor: a shape without values or memory."""
        return replace(self, inputs=self.inputs.to("meta"))

    def select(self, ids: Tensor) -> "Examples":
        """Copy the examples ``ids`` [M] into a part of their own, renumbered 0..M-1."""
        return replace(self, inputs=self.inputs[ids], targets=self.targets[ids])


def _held(name: str, values: Tensor) -> Tensor:
    if values.is_meta:
        raise ValueError(f"these examples were made without {name}; expected to be asked for the rest alone")
    return values


def _form(values: Tensor) -> str:
    """Type and shape of one row."""
    return " ".join([str(values.dtype).removeprefix("torch."), *([str(list(values.shape[1:]))] * (values.ndim > 1))])


def _kind(value: Any) -> str:
    """What something is, with its items where they are few."""
    few = isinstance(value, tuple | list) and 0 < len(value) <= 4
    name = type(value).__name__
    return f"{name} ({', '.join(type(item).__name__ for item in value)})" if few else name


def _stacked(pairs: Any) -> tuple[Tensor, Tensor]:
    arrays = isinstance(pairs, tuple | list) and pairs and all(getattr(item, "ndim", 0) for item in pairs)
    indexed = hasattr(pairs, "__len__") and hasattr(pairs, "__getitem__")
    if arrays or not indexed or isinstance(pairs, Tensor | str | Mapping):
        raise ValueError(
            f"the data are a {_kind(pairs)}; expected a tuple of two tensors, (inputs, targets), or a map-style torch "
            f"Dataset of such pairs: turn arrays and streams into tensors first"
        )
    inputs, targets = [], []
    for index in range(len(pairs)):
        pair = pairs[index]
        try:
            value, target = pair
            inputs.append(torch.as_tensor(value))
            targets.append(torch.as_tensor(target))
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(
                f"example {index} is a {_kind(pair)}, not a pair of tensors or numbers; "
                f"expected (input, target): convert it in the dataset's __getitem__"
            ) from None
        for name, rows in (("input", inputs), ("target", targets)):
            if rows[-1].shape != rows[0].shape:
                raise ValueError(
                    f"{name} {index} has shape {list(rows[-1].shape)} but {name} 0 {list(rows[0].shape)}; "
                    f"expected one shape for all: resize or pad them"
                )
    if not inputs:
        return torch.empty(0), torch.empty(0)
    return torch.stack(inputs), torch.stack(targets)
