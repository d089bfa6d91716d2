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


def algorithm_2_gradients(
    blocks: Sequence[nn.Module],
    x: Tensor,
    y: Tensor,
    loss_sum: Callable[[Tensor, Tensor], Tensor],
    lam: Sequence[float],
    gamma_h: Sequence[float],
    n_h: int,
    stored: Sequence[Tensor],
    known: Tensor,
    *,
    h_step: bool = True,
    sweep: bool = True,
) -> tuple[list[list[Tensor]], list[Tensor]]:
    """One iteration of Algorithm 2 on a batch: as Algorithm 1, but h_k starts from what was stored.

    `stored` holds h_2..h_K, `known` says for which examples; the others are filled in by the forward pass. Returns
    as `algorithm_1_gradients`. Without `sweep`, every L_k has the stored h_{k+1} in it.
    """
    K = len(blocks)
    h = [x]
    for block, old in zip(blocks[:-1], stored, strict=True):
        h.append(torch.where(known[:, None], old, block(h[-1]).detach()))
    anchors = [x, *(block(before).detach() for block, before in zip(blocks[:-1], h[:-1], strict=True))]
    before = list(h)
    for k in range(K - 1, 0, -1) if h_step else ():
        upper = h[k + 1] if sweep and k < K - 1 else before[k + 1] if k < K - 1 else y

        def above(output: Tensor, k: int = k, upper: Tensor = upper) -> Tensor:
            return loss_sum(output, y) if k == K - 1 else lam[k] * (upper - output).square().sum()

        for _ in range(n_h):
            variable = h[k].clone().requires_grad_()
            (gradient,) = torch.autograd.grad(L_k(variable, anchors[k], blocks[k], above, lam[k - 1]), variable)
            h[k] = h[k] - gamma_h[k - 1] * gradient
    gradients = []
    for k, block in enumerate(blocks):
        output = block(h[k])
        J = loss_sum(output, y) if k == K - 1 else lam[k] * (h[k + 1] - output).square().sum()
        gradients.append(list(torch.autograd.grad(J, list(block.parameters()))))
    return gradients, h[1:K]
