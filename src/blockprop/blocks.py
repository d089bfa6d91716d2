"""The blocks b_1..b_K of a network (Definition 2.1): consecutive, disjoint, and together the whole of it."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, overload

import torch
from torch import Tensor, nn

from blockprop.errors import block_failed

__all__ = ["Blocks", "Cut"]


@dataclass(frozen=True)
class Cut:
    """Where a network was cut, as it is recorded with a run.

    Attributes:
        by: what the cut was balanced by: "flops", "weights", "time", "layers", or "names" if it was given.
        layers: the names of every block's layers, bottom block first.
        costs: every block's cost in the unit of `by`; empty for "names".
    """

    by: str
    layers: tuple[tuple[str, ...], ...]
    costs: tuple[float, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The cut as JSON-ready lists."""
        return {key: _listed(value) for key, value in asdict(self).items()}

    def __str__(self) -> str:
        return " | ".join(f"{block[0]}..{block[-1]}" if len(block) > 1 else block[0] for block in self.layers)


def _listed(value: Any) -> Any:
    return [_listed(item) for item in value] if isinstance(value, tuple) else value


class Blocks(Sequence[nn.Module]):
    """K consecutive blocks of a model. The blocks hold the model's own layers: training them trains the model.

    Made by [`split`][blockprop.split.split].

    Args:
        model: the network as the user has it; its `state_dict` is never touched by the cut.
        blocks: b_1..b_K, bottom first.
        cut: the record of where it was cut.

    Raises:
        ValueError: two blocks share a parameter.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], cut: Cut) -> None:
        owners: dict[int, int] = {}
        for k, block in enumerate(blocks, 1):
            for name, parameter in block.named_parameters():
                owner = owners.setdefault(id(parameter), k)
                if owner != k:
                    raise ValueError(
                        f"blocks {owner} and {k} share the parameter {name!r}; a tied weight must lie within one "
                        "block: cut elsewhere, or untie it"
                    )
        self.model = model
        self.cut = cut
        self._blocks = tuple(blocks)

    @overload
    def __getitem__(self, index: int) -> nn.Module: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[nn.Module]: ...
    def __getitem__(self, index: int | slice) -> nn.Module | Sequence[nn.Module]:
        return self._blocks[index]

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._blocks)

    def __call__(self, inputs: Tensor) -> Tensor:
        """The network's output, block after block, each on its own device; shape [N, ...].

        Raises:
            ValueError: a block does not take an input of this shape or type.
        """
        h = inputs
        for k, block in enumerate(self._blocks, 1):
            parameter = next(block.parameters(), None)
            h = h if parameter is None else h.to(parameter.device)
            try:
                h = block(h)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, IndexError) as error:
                raise block_failed(k, block, h, error) from error
        return h

    def __repr__(self) -> str:
        return f"Blocks({self.cut})"
