"""Several processes for one block, each on its share of every batch: their gradients averaged before each update.

This is data parallelism within a block; the pipeline is across blocks. The two know nothing of each other.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from blockprop.errors import first_line
from blockprop.runtime.group import LostError, gloo
from blockprop.runtime.rendezvous import LOOPBACK, Place, Rendezvous

__all__ = ["Replicas"]


class Replicas:
    """The replicas of one block.

    Args:
        place: which block and replica this process is.
        rendezvous: where they find each other.
        listen: this process's address for connections; default this machine alone.
        timeout: seconds that a replica may be waited for, default a day; whether it is alive shows elsewhere.

    Raises:
        LostError: a replica does not come.
    """

    def __init__(
        self, place: Place, rendezvous: Rendezvous, *, listen: str = LOOPBACK, timeout: float = 86_400.0
    ) -> None:
        self.count = place.replicas
        self.bytes = 0
        name = f"replicas of block {place.block}"
        self._group = gloo(rendezvous, name, place.replica, place.replicas, listen=listen, timeout=timeout)

    def average(self, parameters: Sequence[nn.Parameter]) -> None:
        """Put the mean of all replicas' gradients on `.grad`; all replicas call it in the same order.

        What no replica has a gradient of is left without one: feedback may have been lost.

        Raises:
            LostError: a replica is gone.
        """
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):
            some = [index for index, gradient in enumerate(gradients) if gradient.dtype == dtype]
            here = torch.tensor([parameters[index].grad is not None for index in some], dtype=dtype)
            flat = torch.cat([here, *(gradients[index].flatten().cpu() for index in some)])
            self._sum(flat)
            having, *parts = torch.split(flat, [len(some), *(gradients[index].numel() for index in some)])
            for index, count, part in zip(some, having.tolist(), parts, strict=True):
                if count:
                    mean = (part / self.count).view(gradients[index].shape)
                    parameters[index].grad = mean.to(gradients[index].device)

    def _sum(self, flat: Tensor) -> None:
        try:
            self._group.allreduce([flat]).wait()
        except RuntimeError as error:
            raise LostError(f"a replica of the block is gone: {first_line(error)}") from error
        # a ring sends 2 (R - 1) / R times the gradients
        self.bytes += 2 * (self.count - 1) * flat.numel() * flat.itemsize // self.count
