"""The output loss ℓ(y, b_K(h_K)): any torch loss, made independent of the batch size where it must be."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from blockprop.errors import first_line

__all__ = ["OutputLoss"]


class OutputLoss:
    """A torch loss as the two numbers that BlockProp needs of it: its mean, and its count of predictions.

    The gluing variables belong to single examples, so the h-step must see the *sum* over predictions: under a
    mean, every gluing gradient would shrink with the batch size and γ_h with it. The W-step minimises the
    *mean*, as any training loop does. The sum is mean x count.

    A prediction is an example; for losses over class indices (`CrossEntropyLoss`, `NLLLoss`) it is an entry
    of `targets`, so a token in a [N, T] batch, and the count is the loss's own normaliser: ignored targets do
    not count, and class weights weigh. Outputs [N, ..., C] with targets [N, ...] (a language model's) are
    accepted as well as torch's [N, C, ...].

    Args:
        loss: `loss(outputs, targets)`, a module or a function, with any reduction: "sum" and "none" are turned
            into the mean, so a step size that was tuned for a sum is to be multiplied by the count. A function
            without a `reduction` attribute is taken as a mean if it returns a scalar.
        class_dim: where the classes are in the outputs of a loss over class indices, 1 or -1; the default,
            None, reads it off the shapes, which fails only where both fit.

    Raises:
        ValueError: `loss` is not callable, or `class_dim` is none of these.

    >>> import torch
    >>> loss = OutputLoss(nn.CrossEntropyLoss())
    >>> mean, count = loss(torch.zeros(4, 10), torch.tensor([1, 2, 3, 4]))
    >>> round(mean.item(), 4), count
    (2.3026, 4.0)
    """

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor], class_dim: int | None = None) -> None:
        if not callable(loss):
            raise ValueError(f"loss is a {type(loss).__name__}; expected a torch loss such as nn.CrossEntropyLoss()")
        if isinstance(loss, type):
            raise ValueError(f"loss is the class {loss.__name__}; expected an instance: {loss.__name__}()")
        if class_dim not in (None, 1, -1):
            raise ValueError(f"class_dim is {class_dim}; expected 1 ([N, C, ...]) or -1 ([N, ..., C])")
        self.loss = loss
        self.class_dim = class_dim
        self.reduction: str | None = getattr(loss, "reduction", None)
        self.over_classes = isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss)

    def __call__(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, float]:
        """The mean loss and the number of predictions.

        Args:
            outputs: the network's outputs, shape [N, ...].
            targets: what the loss wants beside them, N rows.

        Returns:
            The mean over predictions, a differentiable scalar, and their count.

        Raises:
            ValueError: shapes that do not go together, or a label out of range.
        """
        if len(outputs) != len(targets):
            raise ValueError(f"outputs have {len(outputs)} rows and targets {len(targets)}; expected as many")
        indices = self.over_classes and not targets.is_floating_point()
        if indices:
            outputs = _classes_second(outputs, targets, self.class_dim)
        elif targets.is_floating_point() and targets.numel() == outputs.numel() and targets.shape != outputs.shape:
            raise ValueError(
                f"outputs {list(outputs.shape)} with targets {list(targets.shape)} would be paired all with all; give "
                f"targets of shape {list(outputs.shape)}"
            )
        try:
            count = self._count(outputs.shape[1], targets) if indices else float(len(targets))
            value = self.loss(outputs, targets)
        except (RuntimeError, IndexError) as error:
            raise ValueError(
                f"the loss does not take outputs {list(outputs.shape)} with targets {list(targets.shape)} "
                f"of {targets.dtype}: {first_line(error)}"
            ) from error
        if not isinstance(value, Tensor):
            raise ValueError(
                f"the loss returned a {type(value).__name__}; expected a tensor, as nn.CrossEntropyLoss() does"
            )
        if value.ndim > 0 or self.reduction == "sum":
            value = value.sum() / count
        return value, count

    def per_example(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of every example, its predictions summed: shape [N]; over the batch they sum to mean x count.

        Args:
            outputs: the network's outputs, shape [N, ...].
            targets: what the loss wants beside them, N rows.

        Raises:
            ValueError: as in a call.
        """
        if not self.over_classes or targets.is_floating_point():
            # a loss of unknown kind shows its examples only one by one
            pairs = [self(outputs[n : n + 1], targets[n : n + 1]) for n in range(len(outputs))]
            return torch.stack([mean * count for mean, count in pairs])
        self(outputs.detach(), targets)  # says what does not fit
        unreduced = copy.copy(self.loss)
        unreduced.reduction = "none"  # type: ignore[attr-defined]
        return unreduced(_classes_second(outputs, targets, self.class_dim), targets).reshape(len(outputs), -1).sum(1)

    def correct(self, outputs: Tensor, targets: Tensor) -> int | None:
        """How many predictions have their largest output at the target; None for losses not over classes."""
        if not self.over_classes or targets.is_floating_point():
            return None
        outputs = _classes_second(outputs, targets, self.class_dim)
        return int((outputs.argmax(1) == targets).sum())

    def counted(self, targets: Tensor) -> float:
        """How many predictions targets are for: the count of a call, without the outputs; 0 if all are ignored."""
        if not self.over_classes or targets.is_floating_point():
            return float(len(targets))
        real = targets != self.loss.ignore_index  # type: ignore[attr-defined]
        weight: Tensor | None = self.loss.weight  # type: ignore[attr-defined]
        if weight is None:
            return float(real.sum())
        # labels out of range are for the call to refuse
        return float((weight[targets.clamp(0, len(weight) - 1)] * real).sum())

    def _count(self, classes: int, targets: Tensor) -> float:
        """The loss's own normaliser: how many labels are not ignored, or their weights' sum."""
        ignored: int = self.loss.ignore_index  # type: ignore[attr-defined]
        low, high = (int(end) for end in targets.aminmax())
        if low <= ignored <= high:
            targets = targets[targets != ignored]
            if targets.numel() == 0:
                raise ValueError(
                    "every target of the batch is the loss's ignore_index; expected at least one real label"
                )
            low, high = (int(end) for end in targets.aminmax())
        if low < 0 or high >= classes:
            raise ValueError(
                f"labels run from {low} to {high} but the network has {classes} outputs; "
                f"expected labels from 0 to {classes - 1}"
            )
        weight: Tensor | None = self.loss.weight  # type: ignore[attr-defined]
        return float(targets.numel()) if weight is None else float(weight[targets].sum())


def _classes_second(outputs: Tensor, targets: Tensor, class_dim: int | None) -> Tensor:
    """Outputs as torch's losses want them, [N, C, ...], whether they came so or as [N, ..., C]."""
    torch_order = outputs.ndim >= 2 and outputs.shape[:1] + outputs.shape[2:] == targets.shape
    class_last = outputs.ndim >= 2 and outputs.shape[:-1] == targets.shape
    if torch_order and class_last and outputs.ndim > 2 and class_dim is None:
        raise ValueError(
            f"outputs of shape {list(outputs.shape)} may have their classes in dimension 1 or last; "
            "say which: loss=blockprop.OutputLoss(loss, class_dim=1) or class_dim=-1"
        )
    if torch_order and class_dim != -1:
        return outputs
    if class_last and class_dim != 1:
        return outputs.movedim(-1, 1)
    raise ValueError(
        f"outputs of shape {list(outputs.shape)} do not go with class labels of shape {list(targets.shape)}; "
        "expected outputs [N, classes] with labels [N], or [N, T, classes] with [N, T]"
    )
