"""A dataset: its three parts and what a network needs to know to fit it."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from blockprop.data.examples import Augment, Examples, Pairs, Split, Transform, unchanged
from blockprop.data.holdout import check_fraction, hold_out

Task = Literal["classification", "language", "regression"]

_PARTS = ("train", "validation", "test")


@dataclass(frozen=True, eq=False)
class Dataset:
    """Examples to train on, to choose by and to report on.

    Args:
        name: What the dataset is called in reports.
        train: The part that training reads.
        validation: The part held out of training to choose by; its length may be 0.
        test: The part to report on.
        classes: Number of outputs of a fitting network: classes, vocabulary size, or real values per example.
        input_shape: Shape of one input as the network reads it, without the batch dimension.
        task: "classification" (targets int64 [N]), "language" (int64 [N, T]) or "regression" (float [N, D]).
        vocabulary: For language, the characters in token order: token t reads ``vocabulary[t]``; else "".
    """

    name: str
    train: Split
    validation: Split
    test: Split
    classes: int
    input_shape: tuple[int, ...]
    task: Task
    vocabulary: str = ""

    @classmethod
    def from_tensors(
        cls,
        train: Pairs,
        test: Pairs,
        *,
        name: str = "custom",
        validation: float = 0.1,
        classes: int | None = None,
        transform: Transform = unchanged,
        augment: Augment | None = None,
    ) -> "Dataset":
        """Make a dataset of a user's own tensors or map-style torch Datasets.

        The targets tell the task: integers [N] are classes, integers [N, T] next tokens, and floats [N] or
        [N, D] real values (floats [N] become [N, 1], so that they line up with the network's output).

        Args:
            train: Training pairs, as `Examples.of` reads them.
            test: Test pairs of the same shapes and kinds.
            name: Name for reports.
            validation: Fraction of ``train`` to hold out, in [0, 1).
            classes: Number of classes; the largest target + 1 unless told. Not for regression.
            transform: Applied to each batch of inputs; the identity unless told.
            augment: Applied to each training batch before ``transform``; none unless told.

        Raises:
            ValueError: If the data break a rule of `Examples.of` (said with "train" or "test" before it), train
                and test differ in shape or kind, a target is negative or not below ``classes``, or
                ``validation`` is outside [0, 1).

        >>> pairs = torch.rand(20, 3), torch.arange(20) % 4
        >>> data = Dataset.from_tensors(pairs, pairs)
        >>> data.task, data.classes, data.input_shape, len(data.train), len(data.validation)
        ('classification', 4, (3,), 18, 2)
        """
        check_fraction(validation)
        fitted = _examples("train", train, transform, augment)
        tested = _examples("test", test, transform)
        for what, ours, theirs in (
            ("input", fitted.inputs, tested.inputs),
            ("target", fitted.targets, tested.targets),
        ):
            if (ours.shape[1:], ours.dtype) != (theirs.shape[1:], theirs.dtype):
                raise ValueError(
                    f"a training {what} is {ours.dtype} {list(ours.shape[1:])} but a test {what} is "
                    f"{theirs.dtype} {list(theirs.shape[1:])}; expected the same: prepare both alike"
                )
        kept, held = hold_out(fitted, validation)
        outputs, task = _outputs(fitted.targets, tested.targets, classes)
        input_shape = tuple(fitted.batch(torch.tensor([0]))[0].shape[1:])
        return cls(name, kept, held, tested, outputs, input_shape, task)

    def __repr__(self) -> str:
        parts = f"train {len(self.train)}, validation {len(self.validation)}, test {len(self.test)}"
        outputs = {"classification": "classes", "language": "tokens", "regression": "values"}[self.task]
        return f"Dataset({self.name!r}: {parts}; inputs {list(self.input_shape)}, {self.classes} {outputs})"

    def first(self, count: int) -> "Dataset":
        """The dataset with only the first `count` training examples; the other parts are whole.

        Raises:
            ValueError: there are fewer, or it is a text, whose examples overlap.

        >>> pairs = torch.rand(20, 3), torch.arange(20) % 4
        >>> len(Dataset.from_tensors(pairs, pairs).first(5).train)
        5
        """
        if not isinstance(self.train, Examples):
            raise ValueError(f"{self.name} is a text; expected images or vectors to take the first {count} of")
        if not 1 <= count <= len(self.train):
            raise ValueError(f"train size is {count}; expected a number from 1 to {len(self.train)}")
        return replace(self, train=self.train.select(torch.arange(count)))

    def only_inputs(self) -> "Dataset":
        """The dataset for whoever reads inputs alone, as the first block does: targets are dropped from every part.

        Their memory is free once nothing else holds the whole dataset. `only_inputs().only_targets()` drops both,
        for the blocks between; lengths, shape, classes and task stay.

        >>> pairs = torch.rand(20, 3), torch.arange(20) % 4
        >>> data = Dataset.from_tensors(pairs, pairs).only_inputs()
        >>> data.train.batch_inputs(torch.arange(2)).shape, data.classes
        (torch.Size([2, 3]), 4)
        """
        parts = {part: getattr(self, part).only_inputs() for part in _PARTS}
        return replace(self, **parts)

    def only_targets(self) -> "Dataset":
        """The dataset for whoever reads targets alone, as the loss does: inputs are dropped; see `only_inputs`."""
        parts = {part: getattr(self, part).only_targets() for part in _PARTS}
        return replace(self, **parts)

    @property
    def sample(self) -> Tensor:
        """Two training inputs [2, *input_shape] as the network reads them, to learn shapes or count FLOPs."""
        return self.train.batch_inputs(torch.arange(2) % len(self.train))


def _examples(part: str, pairs: Pairs, transform: Transform, augment: Augment | None = None) -> Examples:
    """A part, its targets as losses want them."""
    try:
        examples = Examples.of(pairs, transform=transform, augment=augment)
        targets = examples.targets
        if targets.ndim > 2:
            raise ValueError(f"targets have shape {list(targets.shape)}; expected [N] or [N, D]: flatten each target")
        if targets.is_complex():
            raise ValueError(f"targets are {targets.dtype}; expected integers or floats: take real values")
    except ValueError as error:
        raise ValueError(f"{part}: {error}") from error
    if targets.is_floating_point():
        return replace(examples, targets=targets.float().view(len(targets), -1))
    return replace(examples, targets=targets.long())


def _outputs(train: Tensor, test: Tensor, classes: int | None) -> tuple[int, Task]:
    if train.is_floating_point():
        if classes is not None:
            raise ValueError("classes is given but the targets are floats; for classes give integer targets")
        return train.shape[1], "regression"
    if classes is not None and (isinstance(classes, bool) or not isinstance(classes, int) or classes < 1):
        raise ValueError(f"classes is {classes!r}; expected a whole number of at least 1, or None to count them")
    low = int(min(train.min(), test.min()))
    high = int(max(train.max(), test.max()))
    if low < 0 or (classes is not None and high >= classes):
        raise ValueError(
            f"targets run from {low} to {high}; expected class numbers from 0 to "
            f"{'classes - 1' if classes is None else classes - 1}: renumber them or change classes"
        )
    return high + 1 if classes is None else classes, "classification" if train.ndim == 1 else "language"
