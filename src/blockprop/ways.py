"""Lengths and directions, of every example for itself."""

import torch
from torch import Tensor

__all__ = ["averaged", "norms", "projected"]


def averaged(values: float | Tensor) -> float:
    """The mean over examples, of a figure that may be the same for all."""
    return float(values.mean()) if isinstance(values, Tensor) else values


def norms(values: Tensor) -> Tensor:
    """Every example's norm, shape [N, 1, ...]."""
    norms: Tensor = torch.linalg.vector_norm(values, dim=tuple(range(1, values.ndim)), keepdim=True)
    return norms


def projected(moved: Tensor, slope: Tensor) -> Tensor:
    """The part of every example's way along its slope; all of shape [N, ...]. Zero where the slope is."""
    way, along = moved.flatten(1), slope.flatten(1).to(moved.dtype)
    square = (along * along).sum(1, keepdim=True)
    share = (way * along).sum(1, keepdim=True) / square.where(square > 0, 1)
    return (share * along).view_as(moved)
