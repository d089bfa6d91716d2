"""The proximal W-step of linear layers: an implicit step instead of a gradient step, for the price of a small inverse.

A block's W-step may go further than one gradient step towards its target. For a linear layer z = Wa + b with targets z*
the proximal step, the minimum of

    (1/N) Σ_n ½ ‖W a_n - z*_n‖² + (μ/2) ‖W - W_t‖²

is W_t - G (C + μI)⁻¹, with the gradient G and the second moment C = (1/N) Σ a aᵀ of the layer's inputs. ProxProp
(Frerix et al., 2018) solves it anew for every batch, by conjugate gradients. C changes slowly: here a running mean is
inverted every few updates, and all that an update pays is one product with the inverse. It needs the block's own inputs
and gradients, and nothing from another block.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from blockprop.wstep import OptimizerFactory

__all__ = ["ProximalSGD", "proximal_sgd"]


class ProximalSGD(torch.optim.SGD):
    """SGD whose gradients for linear layers are first multiplied by (C + μI)⁻¹.

    C is over a layer's inputs with a 1 appended for the bias, so weight and bias are one matrix. Parameters of other
    modules take SGD's plain step.

    Args:
        parameters: of a block.
        layers: its linear layers.
        lr: step size.
        momentum: of SGD, default 0.
        weight_decay: of SGD, default 0.
        damping: μ, in units of the mean of C's diagonal; default 1.
        every: updates between inversions, default 10.
        decay: of the running mean of C, per inversion; default 0.95.

    Raises:
        ValueError: damping, every or decay out of range.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        layers: Iterable[nn.Linear],
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        *,
        damping: float = 1.0,
        every: int = 10,
        decay: float = 0.95,
    ) -> None:
        if not 0 < damping < float("inf"):
            raise ValueError(f"damping is {damping}; expected a positive finite number")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every is {every}; expected a whole number of at least 1")
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay}; expected a number in [0, 1)")
        super().__init__(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay)
        self.param_groups[0]["updates"] = 0
        self.layers = list(layers)
        self.damping, self.every, self.decay = damping, every, decay
        self._paused = False
        for layer in self.layers:
            layer.register_forward_pre_hook(self._see)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Take no note of inputs meanwhile: they are not what the layers learn from."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def _see(self, layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        """Note the inputs of the first forward pass before an update that inverts; checkpoints keep the note."""
        state = self.state[layer.weight]  # type: ignore[index]
        if (
            layer.training
            and not self._paused
            and "seen" not in state
            and self.param_groups[0]["updates"] % self.every == 0
        ):
            inputs = arguments[0].detach().flatten(0, -2).float()
            inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)
            state["seen"] = inputs.T @ inputs / len(inputs)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Precondition the gradients, then take SGD's step."""
        assert closure is None, "a W-step has its gradients already"
        for layer in self.layers:
            if layer.weight.grad is not None:
                self._precondition(layer)
        super().step()
        for layer in self.layers:
            self.state[layer.weight].pop("seen", None)
        self.param_groups[0]["updates"] += 1

    def _precondition(self, layer: nn.Linear) -> None:
        state = self.state[layer.weight]
        if "seen" in state:
            new = state["seen"]
            moment = state.get("moment")
            state["moment"] = new if moment is None else moment.mul_(self.decay).add_(new, alpha=1 - self.decay)
            diagonal = state["moment"].diagonal()
            damped = state["moment"] + torch.diag(torch.full_like(diagonal, self.damping * float(diagonal.mean())))
            state["inverse"] = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        assert layer.weight.grad is not None
        if layer.bias is None or layer.bias.grad is None:
            layer.weight.grad = layer.weight.grad @ state["inverse"][:-1, :-1]
            return
        both = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1) @ state["inverse"]
        layer.weight.grad, layer.bias.grad = both[:, :-1].contiguous(), both[:, -1].contiguous()


def proximal_sgd(
    block: nn.Module, lr: float, momentum: float = 0.0, weight_decay: float = 0.0, *, damping: float = 1.0
) -> OptimizerFactory:
    """A factory of `ProximalSGD` for a block's parameters, with all its linear layers.

    >>> block = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    >>> len(proximal_sgd(block, lr=0.1)(block.parameters()).layers)
    1
    """
    layers = [module for module in block.modules() if isinstance(module, nn.Linear)]

    def make(parameters: Iterable[nn.Parameter]) -> ProximalSGD:
        return ProximalSGD(parameters, layers, lr, momentum, weight_decay, damping=damping)

    return make
