"""Errors of others, in a line."""

import torch
from torch import Tensor, nn

__all__ = ["IN_PLACE", "block_failed", "first_line", "remedy"]

IN_PLACE = "works in place on its input, which is not its own: begin it with inplace=False"


def first_line(error: BaseException) -> str:
    """What an error says, cut to its first line; its kind where it says nothing."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def block_failed(index: int, block: nn.Module, inputs: Tensor, error: BaseException) -> ValueError:
    """The error of a block that does not take its input, with what would mend it where that is known.

    Args:
        index: k, from 1.
        block: b_k.
        inputs: h_k, shape [N, ...].
        error: what the block raised.
    """
    if "leaf Variable that requires grad is being used in an in-place operation" in str(error):
        return ValueError(f"block {index} {IN_PLACE}")
    return ValueError(
        f"block {index} failed on an input of shape {list(inputs.shape)} and type {inputs.dtype}: "
        f"{first_line(error)}{remedy(block, inputs)}"
    )


def remedy(module: nn.Module, inputs: Tensor) -> str:
    """What to do about the type of a module's input, as the end of a message; "" where the type is right."""
    weighted = (part for part in module.modules() if next(part.parameters(recurse=False), None) is not None)
    first = next(weighted, None)
    if first is None:
        return ""
    if isinstance(first, nn.Embedding):
        right = inputs.dtype in (torch.int64, torch.int32)
        return "" if right else "; expected token numbers, give inputs.long()"
    dtype = next(first.parameters(recurse=False)).dtype
    return "" if inputs.dtype == dtype else f"; expected {dtype}, as its weights are, give inputs.to({dtype})"
