"""A gloo process group of a few ranks, on an address of one's choice.

It is made directly and not through `torch.distributed.init_process_group`: a run has many of them, and they come and go
on their own.
"""

from datetime import timedelta
from typing import Any

import torch.distributed as dist

from blockprop.errors import first_line
from blockprop.runtime.rendezvous import Rendezvous

__all__ = ["LostError", "gloo"]


class LostError(RuntimeError):
    """A neighbour is gone, or the run was stopped elsewhere: there is nothing wrong here."""


def gloo(rendezvous: Rendezvous, name: str, rank: int, size: int, *, listen: str, timeout: float) -> Any:
    """The group of that name; waits for the other ranks, as long as the rendezvous has patience.

    Args:
        rendezvous: where the ranks find each other.
        name: the same for all ranks.
        rank: of this process in the group.
        size: how many there are.
        listen: this process's address for connections.
        timeout: seconds that a call to the group may take.

    Raises:
        LostError: the others do not come, or the address cannot be used.
    """
    # said and waited for here, since the constructor waits where nothing can interrupt it
    rendezvous.write(f"here/{name}/{rank}", True)
    try:
        for other in range(size):
            rendezvous.wait(f"here/{name}/{other}")
    except ValueError as error:
        raise LostError(f"the other end of {name} did not come within {rendezvous.patience:g} seconds") from error
    try:
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=listen)]
        options._timeout = timedelta(seconds=timeout)
        store = dist.PrefixStore(name, rendezvous.store)  # type: ignore[attr-defined]
        return dist.ProcessGroupGloo(store, rank, size, options)
    except RuntimeError as error:
        raise LostError(f"{name} did not come up on {listen}: {first_line(error)}") from error
