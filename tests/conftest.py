"""What the tests share: small networks in float64, and their gradients."""

import socket
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import blockprop


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def free_port() -> int:
    """A port of this machine that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def sgd(lr: float = 0.1):
    return lambda params: torch.optim.SGD(params, lr=lr)


def mlp(depth: int = 4, width: int = 12, inputs: int = 6, classes: int = 5, **between: Callable[[], nn.Module]):
    """A tanh network of `depth` weight layers in float64; `between` adds modules after each hidden activation."""
    layers: list[nn.Module] = []
    for i in range(depth):
        layers.append(nn.Linear(inputs if i == 0 else width, classes if i == depth - 1 else width))
        if i < depth - 1:
            layers += [nn.Tanh(), *(make() for make in between.values())]
    return nn.Sequential(*layers).double()


def batch(n: int = 7, inputs: int = 6, classes: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(n, inputs, dtype=torch.float64), torch.randint(classes, (n,))


def gradients(algo) -> list[list[Tensor]]:
    """A copy of what lies on .grad, block by block; and clears it."""
    found = []
    for wstep in algo.wsteps:
        found.append([p.grad.clone() for p in wstep.parameters])
        wstep.forget()
    return found


def backprop_gradients(blocks, inputs, targets, loss=None) -> list[list[Tensor]]:
    algo = blockprop.Backprop(blocks, loss or nn.CrossEntropyLoss(), sgd())
    algo.gradient(inputs, targets)
    return gradients(algo)


def flat(tensors) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])
