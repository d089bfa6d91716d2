"""Normalisation of images that are kept as bytes."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Normalise:
    """Turn a batch of uint8 images into float32: ``(images / maximum - mean) / std``, channel by channel.

    Args:
        mean: Mean of each channel, in units of ``maximum``.
        std: Standard deviation of each channel, in units of ``maximum``.
        maximum: The pixel value that counts as 1.

    >>> Normalise(mean=(0.5,), std=(0.5,))(torch.tensor([[[[0, 255]]]], dtype=torch.uint8))
    tensor([[[[-1.,  1.]]]])
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    maximum: float = 255.0

    def __call__(self, images: Tensor) -> Tensor:
        """Normalise images [N, C, H, W] of any dtype; the result is float32 of the same shape."""
        mean = torch.tensor(self.mean).view(-1, 1, 1)
        std = torch.tensor(self.std).view(-1, 1, 1)
        return (images / self.maximum).sub_(mean).div_(std)
