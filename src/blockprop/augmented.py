"""The augmented loss (Eq. 4) as a whole: a function of all gluing variables at once.

Training never forms it, since every block sees its own terms only (Eqs. 5 and 7, `objective.py`). It is what those
terms are the partial gradients of, and the energy of [`inference`][blockprop.inference].
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from blockprop.gluing import Gluing
from blockprop.losses import OutputLoss
from blockprop.penalties import PenaltyLike, per_link

__all__ = ["augmented_loss"]


def augmented_loss(
    blocks: Sequence[nn.Module],
    inputs: Tensor,
    gluing: Sequence[Tensor],
    targets: Tensor,
    *,
    loss: Callable[[Tensor, Tensor], Tensor] | OutputLoss,
    penalty: PenaltyLike | Sequence[PenaltyLike] = 1.0,
    nudge: float = 1.0,
) -> Tensor:
    """Eq. (4) for every example: Σ_{k<K} λ_k ‖h_{k+1} - b_k(h_k)‖² + β ℓ(y, b_K(h_K)), with h_1 = x.

    Differentiable in the gluing variables and in the weights. With β it is the energy of Equilibrium Propagation,
    nudged at its output; where every h_k is the forward pass's it is β times the loss.

    Args:
        blocks: b_1..b_K, such as [`Blocks`][blockprop.blocks.Blocks].
        inputs: x, shape [N, ...].
        gluing: h_2..h_K, each shape [N, ...].
        targets: y, N rows.
        loss: a torch loss; summed over an example's predictions.
        penalty: λ (default 1), a penalty, or a callable l(h, output) -> [N]; one, or one per link, bottom first.
        nudge: β, default 1.

    Returns:
        Tensor of shape [N]. The h-step's L_k and the loss that training reports are its terms, summed over the
        batch and averaged over predictions.

    Raises:
        ValueError: another number of gluing variables than K - 1, or one of another shape than its block's output.

    >>> blocks = [nn.Linear(2, 3), nn.Linear(3, 2)]
    >>> x, y = torch.zeros(1, 2), torch.tensor([1])
    >>> forward = blocks[0](x)
    >>> energy = augmented_loss(blocks, x, [forward + 1], y, loss=nn.CrossEntropyLoss(), penalty=2.0, nudge=0.0)
    >>> round(energy.item(), 4)
    6.0
    """
    if len(gluing) != len(blocks) - 1:
        raise ValueError(f"{len(gluing)} gluing variables for {len(blocks)} blocks; expected one per link: h_2..h_K")
    output_loss = loss if isinstance(loss, OutputLoss) else OutputLoss(loss)
    h, total = inputs, torch.zeros(())
    for k, (block, glued, link) in enumerate(zip(blocks, gluing, per_link(penalty, len(gluing)), strict=False), 1):
        output = block(h)
        if glued.shape != output.shape:
            raise ValueError(
                f"h_{k + 1} has shape {list(glued.shape)}; expected that of block {k}'s output, {list(output.shape)}"
            )
        total = total + link(Gluing(glued, torch.zeros_like(glued), len(glued)), output)
        h = glued
    return total + nudge * output_loss.per_example(blocks[-1](h), targets)
