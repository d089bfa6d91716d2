"""What the two algorithms have in common: blocks that learn, each by a W-step of its own, and the loss above them."""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from blockprop.blocks import Blocks
from blockprop.errors import first_line
from blockprop.executors.mail import Remote
from blockprop.losses import OutputLoss
from blockprop.modes import evaluating
from blockprop.partial import only
from blockprop.wstep import OptimizerFactory, SchedulerFactory, WStep

__all__ = ["Learner", "Loss", "check_batch"]

Loss = Callable[[Tensor, Tensor], Tensor] | OutputLoss
T = TypeVar("T")


def check_batch(inputs: Tensor | None, targets: Tensor | None) -> None:
    """Refuse a batch that cannot be learnt from.

    Args:
        inputs: x, shape [N, ...]; None where the first block lives elsewhere.
        targets: y, N rows; None where the last block lives elsewhere.

    Raises:
        ValueError: no tensors, no examples, numbers that are not finite, or not as many inputs as targets.
    """
    for name, value in (("inputs", inputs), ("targets", targets)):
        if value is None:  # of a block that lives in another process
            continue
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} is a {type(value).__name__}; expected a tensor with one row per example")
        if value.ndim == 0 or len(value) == 0:
            raise ValueError(f"{name} has no rows; expected at least one example")
        # one sum is cheap; only where it is not finite is every number looked at
        if value.is_floating_point() and not math.isfinite(value.sum().item()) and not value.isfinite().all():
            raise ValueError(f"{name} hold NaN or infinity; expected finite numbers: check the data")
    if inputs is not None and targets is not None and len(inputs) != len(targets):
        raise ValueError(f"{len(inputs)} inputs with {len(targets)} targets; expected as many of both")


class Learner:
    """Blocks, their W-steps, and the loss.

    Args:
        blocks: what [`split`][blockprop.split.split] returned.
        loss: a torch loss, such as `nn.CrossEntropyLoss()`; see [`OutputLoss`][blockprop.losses.OutputLoss].
        optimizer: from a block's parameters to its optimizer; one function, or one per block.
        scheduler: from a block's optimizer to its learning-rate scheduler, stepped with every update; one
            function, or one per block.
        clip: largest gradient norm of a block; default None, no clipping.
        accumulate: update on every n-th step only, with the mean of n gradients; default 1.
        precision: `torch.bfloat16` to evaluate blocks under autocast; default None, as the model is.
        devices: where the blocks live, such as ["cuda:0", "cuda:1"]; one per block, or fewer, each for as many
            consecutive blocks. Default: where they are.

    Raises:
        ValueError: settings that do not go together; see each.
    """

    def __init__(
        self,
        blocks: Blocks,
        loss: Loss,
        optimizer: OptimizerFactory | Sequence[OptimizerFactory],
        *,
        scheduler: SchedulerFactory | Sequence[SchedulerFactory] | None = None,
        clip: float | None = None,
        accumulate: int = 1,
        precision: torch.dtype | None = None,
        devices: Sequence[str | torch.device] | None = None,
    ) -> None:
        _place(blocks, devices)
        self.blocks = _checked(blocks)
        if self.remote is not None:
            _keep_one(blocks, self.remote)  # before an optimizer holds the others
        self.wsteps = _w_steps(blocks, optimizer, scheduler, clip, accumulate)
        if self.remote is not None:
            self.wsteps[self.remote.block - 1].average = self.remote.average
        self.loss = loss if isinstance(loss, OutputLoss) else OutputLoss(loss)
        if precision is not None and not (isinstance(precision, torch.dtype) and precision.is_floating_point):
            raise ValueError(f"precision is {precision!r}; expected a floating-point dtype such as torch.bfloat16")
        self.precision = precision

    @property
    def remote(self) -> Remote | None:
        """The other processes, where every block has one of its own; None where all blocks live here."""
        return None

    @torch.no_grad()
    def predict(self, inputs: Tensor | None) -> Tensor | None:
        """The network's outputs in evaluation mode, by the plain forward pass; shape [N, ...]."""
        assert inputs is not None
        with evaluating([self.blocks.model]):
            return self.blocks(inputs)

    def state_dict(self) -> dict[str, Any]:
        """Optimizers, schedulers and accumulated gradients, block by block. The weights are the model's."""
        return {"blocks": [wstep.state_dict() for wstep in self.wsteps]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned.

        Raises:
            ValueError: the state is of another number of blocks, or of blocks with other parameters.
        """
        if len(state["blocks"]) != len(self.wsteps):
            raise ValueError(
                f"the state is of {len(state['blocks'])} blocks, this network is cut into {len(self.wsteps)}; "
                "expected the state of the same cut"
            )
        for wstep, saved in zip(self.wsteps, state["blocks"], strict=True):
            wstep.load_state_dict(saved)


def _per_block(name: str, given: T | Sequence[T] | None, blocks: int) -> list[Any]:
    if isinstance(given, Sequence):
        if len(given) != blocks:
            raise ValueError(f"{name} lists {len(given)} values for {blocks} blocks; give one, or one per block")
        return list(given)
    return [given] * blocks


def _checked(blocks: Blocks) -> Blocks:
    if not isinstance(blocks, Blocks):
        raise ValueError(f"blocks is a {type(blocks).__name__}; expected Blocks: blocks = blockprop.split(model, 4)")
    return blocks


def _w_steps(
    blocks: Blocks,
    optimizer: OptimizerFactory | Sequence[OptimizerFactory],
    scheduler: SchedulerFactory | Sequence[SchedulerFactory] | None,
    clip: float | None,
    accumulate: int,
) -> list[WStep]:
    optimizers = _per_block("optimizer", optimizer, len(blocks))
    if not all(callable(make) for make in optimizers):
        raise ValueError(
            "optimizer is not a function; expected one from parameters to an optimizer, such as "
            "lambda params: torch.optim.SGD(params, lr=0.1)"
        )
    schedulers = _per_block("scheduler", scheduler, len(blocks))
    return [
        WStep(block.parameters(), make, schedule, clip, accumulate)
        for block, make, schedule in zip(blocks, optimizers, schedulers, strict=True)
    ]


def _place(blocks: Blocks, devices: Sequence[str | torch.device] | None) -> None:
    """Move block k to device k; fewer devices than blocks hold consecutive blocks each."""
    if devices is None:
        return
    if isinstance(devices, str) or not isinstance(devices, Sequence):
        raise ValueError(f"devices is {devices!r}; expected a list, such as ['cuda:0', 'cuda:1']")
    if not isinstance(blocks, Blocks) or not devices or len(devices) > len(blocks):
        raise ValueError(f"devices lists {len(devices)} devices; expected at least 1 and at most one per block")
    for k, block in enumerate(blocks):
        name = devices[k * len(devices) // len(blocks)]
        try:
            block.to(torch.device(name))
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device {str(name)!r} cannot be used: {first_line(error)}") from error


def _keep_one(blocks: Blocks, remote: Remote) -> None:
    """The other blocks live in other processes: free their memory here."""
    if len(blocks) != remote.blocks:
        raise ValueError(
            f"the network is cut into {len(blocks)} blocks for {remote.blocks} processes"
            + (f" with {remote.replicas} replicas each" if remote.replicas > 1 else "")
            + "; expected as many of both"
        )
    only(blocks, remote.block)
