"""The W-step of one block: gradients in, one optimizer step out (Algorithm 1, line 8)."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

__all__ = ["OptimizerFactory", "SchedulerFactory", "WStep"]

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]
SchedulerFactory = Callable[[Optimizer], Any]


class WStep:
    """A block's parameters, its optimizer, and what stands between its gradients and the optimizer.

    Args:
        parameters: the block's trainable parameters; may be empty, then every call is a no-op.
        optimizer: makes the optimizer from the parameters.
        scheduler: makes a learning-rate scheduler from the optimizer; it is stepped after every update.
        clip: largest gradient norm of the block, or None for no clipping. Per block, since a block knows no other.
        accumulate: update on every n-th call only, with the mean of the n gradients; default 1.

    Raises:
        ValueError: `clip` or `accumulate` out of range, `optimizer` does not make a torch optimizer, or `scheduler`
            makes one that asks for a metric at every step.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | None = None,
        clip: float | None = None,
        accumulate: int = 1,
    ) -> None:
        if clip is not None and not (isinstance(clip, int | float) and 0 < clip < float("inf")):
            raise ValueError(f"clip is {clip}; expected a positive finite gradient norm, or None")
        if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
            raise ValueError(f"accumulate is {accumulate}; expected a whole number of at least 1")
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.optimizer = optimizer(self.parameters) if self.parameters else None
        if self.parameters and not isinstance(self.optimizer, Optimizer):
            raise ValueError(
                f"optimizer made a {type(self.optimizer).__name__}; expected a function from parameters to a "
                "torch.optim optimizer, such as lambda params: torch.optim.SGD(params, lr=0.1)"
            )
        if self.optimizer is not None:
            ours = {id(parameter) for parameter in self.parameters}
            held = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
            if not held <= ours:
                raise ValueError(
                    "the optimizer holds parameters that are not the block's; expected a function that uses the "
                    "parameters it is given, such as lambda params: torch.optim.SGD(params, lr=0.1)"
                )
        if scheduler is not None and not callable(scheduler):
            raise ValueError(f"scheduler is a {type(scheduler).__name__}; expected a function from an optimizer to one")
        self.scheduler = scheduler(self.optimizer) if scheduler and self.optimizer else None
        if isinstance(self.scheduler, ReduceLROnPlateau):
            raise ValueError(
                "scheduler made a ReduceLROnPlateau, whose steps need a metric that a block does not have; expected "
                "one that counts steps, such as CosineAnnealingLR: or make and step it in a loop of your own, on the "
                "optimizer of each of algo.wsteps"
            )
        self.clip = clip
        self.accumulate = accumulate
        self.calls = 0
        self._sums: list[Tensor | None] = [None] * len(self.parameters)  # that nobody else holds
        self.average: Callable[[Sequence[nn.Parameter]], None] | None = None
        """Called before every update, to average the gradients with those of the block's replicas elsewhere.

        A parameter of which no replica has a gradient is left without one.
        """

    def add(self, gradients: Sequence[Tensor | None], divide_by: float = 1.0) -> None:
        """Take the gradients of one batch, one per parameter, each divided by `divide_by`, onto `.grad`."""
        divisor = divide_by * self.accumulate
        seen: set[int] = set()
        for index, (parameter, gradient) in enumerate(zip(self.parameters, gradients, strict=True)):
            if gradient is None:
                continue
            # autograd.grad may hand out one tensor twice, or one expanded from a scalar; clipping writes into them
            if gradient.data_ptr() in seen or not gradient.is_contiguous():
                gradient = gradient.clone(memory_format=torch.contiguous_format)  # noqa: PLW2901
            seen.add(gradient.data_ptr())
            if parameter.grad is None:
                parameter.grad = gradient if divisor == 1 else gradient / divisor
            elif parameter.grad is self._sums[index]:  # new memory of the weights' size is what a microbatch costs most
                parameter.grad.add_(gradient, alpha=1 / divisor)
            else:
                parameter.grad = torch.add(parameter.grad, gradient, alpha=1 / divisor)
            self._sums[index] = parameter.grad

    def hold(self) -> list[Tensor | None]:
        """The gradients taken so far, to be put back or subtracted later: `add` leaves these tensors as they are."""
        self._sums = [None] * len(self.parameters)
        return [parameter.grad for parameter in self.parameters]

    def scale(self, factor: float) -> None:
        """Multiply the gradients taken so far."""
        for index, parameter in enumerate(self.parameters):
            if parameter.grad is not None:
                parameter.grad = self._sums[index] = parameter.grad * factor

    def update(self, *, again: bool = False) -> None:
        """Clip, step the optimizer and the scheduler, forget the gradients; on every `accumulate`-th call.

        Args:
            again: whether it is on a batch that an update was made on before, which counts for no schedule.
        """
        self.calls += 1
        if self.optimizer is None or self.calls % self.accumulate:
            return
        if self.average is not None:
            self.average(self.parameters)
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        # feedback may all have been lost; torch warns if there was none before the first step of the scheduler
        learnt = any(parameter.grad is not None for parameter in self.parameters)
        if learnt:
            self.optimizer.step()
        if self.scheduler is not None and not again:
            with nullcontext() if learnt else warnings.catch_warnings(action="ignore"):
                self.scheduler.step()
        self.forget()

    def forget(self) -> None:
        """Drop the gradients taken so far; what a step that failed has left."""
        for parameter in self.parameters:
            parameter.grad = None
        self._sums = [None] * len(self.parameters)

    @property
    def lr(self) -> float:
        """The step size γ_{B_k} of the optimizer's first group; 0 for a block without parameters."""
        return float(self.optimizer.param_groups[0]["lr"]) if self.optimizer else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Optimizer, scheduler, and the gradients accumulated so far."""
        return {
            "calls": self.calls,
            "optimizer": self.optimizer.state_dict() if self.optimizer else None,
            "scheduler": self.scheduler.state_dict() if self.scheduler else None,
            "gradients": self.hold(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned.

        Raises:
            ValueError: the state belongs to a block with other parameters.
        """
        if len(state["gradients"]) != len(self.parameters):
            raise ValueError(
                f"the optimizer state is of {len(state['gradients'])} parameters, the block has "
                f"{len(self.parameters)}; expected the state of the same cut of the same model"
            )
        self.calls = state["calls"]
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        for parameter, gradient in zip(self.parameters, state["gradients"], strict=True):
            parameter.grad = None if gradient is None else gradient.to(parameter.device)
