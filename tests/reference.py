"""The paper's pseudo-code, line by line, on plain tensors: what every executor is held to.

Written from the paper and not from the library: no graph is reused, nothing is cached, every quantity is
computed from its definition by autograd. Slow, and right.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def L_k(h: Tensor, anchor: Tensor, block: nn.Module, above: Callable[[Tensor], Tensor], lam: float) -> Tensor:
    """Eq. (5): the term above block k at b_k(h), and λ_{k-1} ‖h - b_{k-1}(h_{k-1})‖²."""
    return above(block(h)) + lam * (h - anchor).square().sum()


def algorithm_1_gradients(
    blocks: Sequence[nn.Module],
    x: Tensor,
    y: Tensor,
    loss_sum: Callable[[Tensor, Tensor], Tensor],
    lam: Sequence[float],
    gamma_h: Sequence[float],
    n_h: int,
) -> tuple[list[list[Tensor]], list[Tensor]]:
    """One iteration of Algorithm 1 on a batch, up to the weights' update.

    Returns the gradient of J_k with respect to the parameters of every block (sum over examples), and the
    gluing variables h*_2..h*_K. `lam` and `gamma_h` are per link, bottom first.
    """
    K = len(blocks)
    # line 3: forward pass
    h = [x]
    for block in blocks:
        h.append(block(h[-1]).detach())
    # lines 4-6: h-step, top-down; h[k] is the input of blocks[k]
    anchors = list(h)
    for k in range(K - 1, 0, -1):

        def above(output: Tensor, k: int = k) -> Tensor:
            return loss_sum(output, y) if k == K - 1 else lam[k] * (h[k + 1] - output).square().sum()

        for _ in range(n_h):
            variable = h[k].clone().requires_grad_()
            objective = L_k(variable, anchors[k], blocks[k], above, lam[k - 1])
            (gradient,) = torch.autograd.grad(objective, variable)
            h[k] = h[k] - gamma_h[k - 1] * gradient
    # lines 7-9: W-step, Eqs. (6, 7), every block on its own
    gradients = []
    for k, block in enumerate(blocks):
        output = block(h[k])
        J = loss_sum(output, y) if k == K - 1 else lam[k] * (h[k + 1] - output).square().sum()
        gradients.append(list(torch.autograd.grad(J, list(block.parameters()))))
    return gradients, h[1:K]


def backprop_gradients(
    blocks: Sequence[nn.Module], x: Tensor, y: Tensor, loss_sum: Callable[[Tensor, Tensor], Tensor]
) -> list[list[Tensor]]:
    """The gradient of the loss's sum over examples, block by block."""
    h = x
    for block in blocks:
        h = block(h)
    gradients = iter(torch.autograd.grad(loss_sum(h, y), [p for block in blocks for p in block.parameters()]))
    return [[next(gradients) for _ in block.parameters()] for block in blocks]
