"""Random changes to training images that leave their class as it is."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class CropAndFlip:
    """Shift every image by up to ``padding`` pixels each way and mirror half of them, left to right.

    Equal to padding with zeros and cropping at random to the original size. Works on the whole batch at once.

    Args:
        padding: Pixels of zeros added on each of the four sides; 4 unless told.
    """

    padding: int = 4

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Augment images [N, C, H, W] of any dtype, drawing every random number from ``generator``."""
        n, channels, height, width = images.shape
        shifts = torch.randint(2 * self.padding + 1, (2, n, 1), generator=generator)
        mirrored = torch.rand(n, 1, generator=generator) < 0.5
        rows = shifts[0] + torch.arange(height)
        columns = shifts[1] + torch.where(mirrored, torch.arange(width).flip(0), torch.arange(width))
        padded = functional.pad(images, [self.padding] * 4)
        return padded[
            torch.arange(n)[:, None, None, None],
            torch.arange(channels)[None, :, None, None],
            rows[:, None, :, None],
            columns[:, None, None, :],
        ]
