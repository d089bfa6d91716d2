"""Every block in a process of its own, over torch.distributed.

message      what travels: a kind, the number of a batch, tensors; packed into bytes, coarser if wanted
rendezvous   where the processes find each other, and say what went wrong
group        a process group of a few ranks
edge         two neighbours: a group of two ranks, a thread that sends and one that receives
mail         the messages of a schedule, carried over edges (lock-step)
neighbours   all edges of a process, and what the processes do together: evaluation, checkpoints
freerunning  no schedule: a block works with what is there
replicas     several processes for a block, their gradients averaged
"""

from blockprop.runtime.freerunning import FreeRunningExecutor
from blockprop.runtime.group import LostError
from blockprop.runtime.joined import processes
from blockprop.runtime.neighbours import Neighbours
from blockprop.runtime.rendezvous import Place, Rendezvous
from blockprop.runtime.replicas import Replicas

__all__ = ["FreeRunningExecutor", "LostError", "Neighbours", "Place", "Rendezvous", "Replicas", "processes"]
