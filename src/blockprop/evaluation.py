"""A block on one batch, as one fixed function of its input.

A step of BlockProp may evaluate a block several times: in the forward pass, in every gradient step on its
gluing variable, in the W-step. The differences between those evaluations *are* the learning signal, and it is
small. A fresh dropout mask, or statistics that moved in between, would swamp it. So all evaluations of a
block on a batch draw the same random numbers and start from the same buffers, and only the first one leaves
its mark on the buffers (running statistics move once a batch) and on the generator.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["Evaluation"]

# The generators are the process's own: two threads that replay random numbers at a time would mix them up.
_replaying = threading.Lock()


def _get_random_state(device: torch.device) -> Tensor:
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    if device.type == "mps":
        return torch.mps.get_rng_state()
    return torch.get_rng_state()


def _set_random_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    elif device.type == "mps":
        torch.mps.set_rng_state(state)
    else:
        torch.set_rng_state(state)


@contextmanager
def _replayed(device: torch.device, state: Tensor) -> Iterator[None]:
    with _replaying:
        present = _get_random_state(device)
        _set_random_state(device, state)
        try:
            yield
        finally:
            _set_random_state(device, present)


def autocast(device: torch.device, precision: torch.dtype | None) -> torch.autocast | nullcontext[None]:
    """Where blocks are evaluated in this precision; None leaves them in their own."""
    return nullcontext() if precision is None else torch.autocast(device.type, dtype=precision)


def kept(block: nn.Module, inputs: Tensor) -> Tensor:
    """The inputs, as a copy if the block's first layer works in place: they are the anchor, and others' as well."""
    first = next((module for module in block.modules() if not isinstance(module, nn.Sequential)), None)
    return inputs.clone() if getattr(first, "inplace", False) else inputs


@contextmanager
def microbatched(block: nn.Module, parts: int) -> Iterator[None]:
    """Let running statistics move as far in M microbatches with examples as they do in a whole batch.

    A BatchNorm's momentum m is then 1 - (1 - m)^(1/M). At m they would be of an M-th of the examples, and noisier.
    """
    found = [module for module in block.modules() if isinstance(module, _BatchNorm)] if parts > 1 else []
    moving = [(norm, norm.momentum) for norm in found if norm.momentum]
    for norm, momentum in moving:
        norm.momentum = 1 - (1 - momentum) ** (1 / parts)
    try:
        yield
    finally:
        for norm, momentum in moving:
            norm.momentum = momentum


class Evaluation:
    """Block b_k evaluated on a batch; call it to evaluate the same function again on another input.

    Args:
        block: b_k. In training mode its buffers are updated by this first evaluation, as in any forward pass.
        inputs: h_k, shape [N, ...]; cut from the graph that made it, which is what decouples the blocks.
        differentiable: whether the gradient with respect to h_k will be asked for.
        keep_graph: build the autograd graph now. Without it, only `input` and `output` are kept in memory.
        repeatable: remember random state and buffers, so that the evaluation can be repeated.
        precision: dtype for autocast, or None for none.
        weights: weights to evaluate at instead of the block's present ones, by name; each a leaf.

    Attributes:
        input: h_k, a leaf of the graph.
        output: b_k(h_k), attached to the graph if `keep_graph`.
    """

    def __init__(
        self,
        block: nn.Module,
        inputs: Tensor,
        *,
        differentiable: bool = True,
        keep_graph: bool = True,
        repeatable: bool = True,
        precision: torch.dtype | None = None,
        weights: dict[str, Tensor] | None = None,
    ) -> None:
        self.block = block
        self.weights = weights or {}
        self.device = inputs.device
        self.precision = precision
        self.repeatable = repeatable
        self.differentiable = differentiable
        self._buffers: dict[str, Tensor] = {}
        self._random_state: Tensor | None = None
        if repeatable and any(module.training for module in block.modules()):
            self._buffers = {name: buffer.clone() for name, buffer in block.named_buffers()}
            self._random_state = _get_random_state(self.device)
        self.input = inputs.detach().requires_grad_(differentiable)
        with torch.set_grad_enabled(keep_graph), self._autocast():
            own = kept(block, self.input)
            self.output: Tensor = functional_call(block, self.weights, (own,)) if weights else block(own)
        if self._random_state is not None and torch.equal(self._random_state, _get_random_state(self.device)):
            self._random_state = None  # nothing was drawn: repetitions need not take turns

    @property
    def coupled(self) -> bool:
        """Whether the examples of a batch influence each other's output: BatchNorm in training."""
        return any(isinstance(module, _BatchNorm) and module.training for module in self.block.modules())

    def _autocast(self) -> torch.autocast | nullcontext[None]:
        return autocast(self.device, self.precision)

    def __call__(self, inputs: Tensor) -> Tensor:
        """b_k(inputs) with the first evaluation's dropout masks and buffers; shape as `output`.

        Args:
            inputs: any value of h_k, shape [N, ...]; taken in the dtype of the first input.
        """
        assert self.repeatable, "this evaluation was made with repeatable=False"
        inputs = kept(self.block, inputs.to(self.input.dtype))
        replay = nullcontext() if self._random_state is None else _replayed(self.device, self._random_state)
        # the repetition writes its running statistics into copies, which are then dropped
        buffers = {name: buffer.clone() for name, buffer in self._buffers.items()}
        with replay, self._autocast():
            replaced = {**self.weights, **buffers}
            output: Tensor = functional_call(self.block, replaced, (inputs,)) if replaced else self.block(inputs)
        return output

    def at_present_weights(self) -> "Evaluation":
        """The same function at the block's present weights; `output` stays what it was."""
        self.weights = {}
        self.output = self.output.detach()
        return self

    @torch.no_grad()
    def moved(self) -> Tensor:
        """The same function of the same input at the block's present weights; this evaluation stays what it was."""
        weights, self.weights = self.weights, {}
        try:
            return self(self.input)
        finally:
            self.weights = weights

    def state(self) -> dict[str, Any]:
        """What `restored` needs, as a tree for a checkpoint: no graph."""
        return {
            "input": self.input.detach(),
            "output": self.output.detach(),
            "buffers": self._buffers,
            "random_state": self._random_state,
            "weights": {name: weight.detach() for name, weight in self.weights.items()},
        }

    @classmethod
    def restored(
        cls,
        block: nn.Module,
        state: dict[str, Any],
        device: torch.device,
        *,
        differentiable: bool,
        precision: torch.dtype | None = None,
    ) -> "Evaluation":
        """An evaluation of the past, to be repeated: neither its output nor a buffer is computed again."""
        evaluation = cls.__new__(cls)
        evaluation.block = block
        evaluation.device = device
        evaluation.precision = precision
        evaluation.repeatable = True
        evaluation.differentiable = differentiable
        evaluation._buffers = {name: buffer.to(device) for name, buffer in state["buffers"].items()}
        evaluation._random_state = state["random_state"]
        evaluation.input = state["input"].to(device).requires_grad_(differentiable)
        evaluation.output = state["output"].to(device)
        evaluation.weights = {name: weight.to(device).requires_grad_() for name, weight in state["weights"].items()}
        return evaluation

    def with_graph(self) -> "Evaluation":
        """Rebuild the graph that was not kept, at the same input; the block-by-block mode's second forward."""
        if not self.output.requires_grad:
            with torch.enable_grad():
                self.output = self(self.input)
        return self
