"""Optimizers by name, as factories; those that torch does not have in one piece are composed here."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from blockprop.wstep import OptimizerFactory

__all__ = ["USUAL_MOMENTUM", "MuonAndAdamW", "OptimizerName", "optimizer_named"]

OptimizerName = Literal["sgd", "nesterov", "adam", "adamw", "nadam", "muon"]

USUAL_MOMENTUM: dict[str, float] = {"nesterov": 0.9, "adam": 0.9, "adamw": 0.9, "nadam": 0.9}
"""Momentum, or β1, where it is not 0."""


class MuonAndAdamW(Optimizer):
    """Muon for the matrices, AdamW for all other parameters, as Muon is meant to be used.

    Args:
        parameters: of the block.
        lr: Muon's step size; AdamW's is `share` times that.
        weight_decay: of both, default 0.
        share: default 0.15, which is AdamW's usual 0.003 beside Muon's usual 0.02.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0, share: float = 0.15):
        given = list(parameters)
        matrices = [p for p in given if p.ndim == 2]
        others = [p for p in given if p.ndim != 2]
        groups = [{"params": matrices, "lr": lr}] * bool(matrices) + [{"params": others, "lr": share * lr}] * bool(
            others
        )
        super().__init__(groups, {"lr": lr})
        self._parts: list[Optimizer] = []
        if matrices:
            self._parts.append(torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay))
        if others:
            self._parts.append(torch.optim.AdamW(others, lr=share * lr, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """A step of both, at the step sizes that stand in `param_groups`."""
        assert closure is None, "a W-step has its gradients already"
        for group, part in zip(self.param_groups, self._parts, strict=True):
            part.param_groups[0]["lr"] = group["lr"]
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """That of both, and the step sizes."""
        return {
            "parts": [part.state_dict() for part in self._parts],
            "groups": [{key: value for key, value in group.items() if key != "params"} for group in self.param_groups],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        for part, saved in zip(self._parts, state_dict["parts"], strict=True):
            part.load_state_dict(saved)
        for group, saved in zip(self.param_groups, state_dict["groups"], strict=True):
            group.update(saved)


def optimizer_named(
    name: OptimizerName, lr: float, momentum: float | None = None, weight_decay: float = 0.0
) -> OptimizerFactory:
    """A factory of optimizers.

    Args:
        name: "nesterov" is SGD with Nesterov's momentum, "muon" is `MuonAndAdamW`.
        lr: step size.
        momentum: of "sgd" and "nesterov", default 0; β1 of "adam", "adamw" and "nadam", default 0.9. Not of "muon".
        weight_decay: of all; decoupled in "adamw", "nadam" and "muon".
    """
    usual = USUAL_MOMENTUM.get(name, 0.0)
    first = usual if momentum is None else momentum
    betas = (first, 0.999)

    def make(parameters: Iterable[Tensor]) -> Optimizer:
        match name:
            case "sgd":
                return torch.optim.SGD(parameters, lr=lr, momentum=first, weight_decay=weight_decay)
            case "nesterov":
                return torch.optim.SGD(parameters, lr=lr, momentum=first, weight_decay=weight_decay, nesterov=True)
            case "adam":
                return torch.optim.Adam(parameters, lr=lr, betas=betas, weight_decay=weight_decay)
            case "adamw":
                return torch.optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=weight_decay)
            case "nadam":
                return torch.optim.NAdam(
                    parameters, lr=lr, betas=betas, weight_decay=weight_decay, decoupled_weight_decay=True
                )
            case "muon":
                return MuonAndAdamW(parameters, lr, weight_decay)  # type: ignore[arg-type]

    return make
