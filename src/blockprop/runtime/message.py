"""What travels between two blocks, and how it becomes bytes.

Both directions may be sent coarser than float32. What comes down is the displacement of the gluing variable (Eq. 5),
never h* itself, which would drown in its own rounding; what goes up is the output. Under int8 every example has a scale
of its own, its largest magnitude / 127.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["Message", "Precision", "pack", "unpack"]

Precision = Literal["float32", "bfloat16", "int8"]

_ALIGNED = 16
_HEAD = 256  # heads are padded to multiples of it, so that like messages are of one length
_DTYPES = {str(dtype): dtype for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8)}
_DTYPES |= {str(dtype): dtype for dtype in (torch.int64, torch.int32, torch.bool, torch.uint8)}


@dataclass(frozen=True)
class Message:
    """What travels.

    Attributes:
        kind: what it is, such as "output" or "feedback".
        number: of the batch or microbatch that it is about.
        values: tensors, each with one row per example.
        more: numbers beside them, JSON-ready.
    """

    kind: str
    number: int
    values: Sequence[Tensor] = ()
    more: dict[str, Any] = field(default_factory=dict)

    def state(self) -> list[Any]:
        """As a list for a checkpoint, with tensors of their own; `Message(*state)` is the message."""
        return [self.kind, self.number, [value.clone() for value in self.values], dict(self.more)]


def _coarser(value: Tensor, precision: Precision) -> list[Tensor]:
    """The tensors that stand for one: itself, itself rounded, or whole numbers and a scale per example."""
    if precision == "float32" or not value.is_floating_point():
        return [value]
    if precision == "bfloat16":
        return [value.to(torch.bfloat16)]
    flat = value.float().reshape(len(value), -1)
    scale = flat.abs().amax(1) / 127 if flat.numel() else flat.new_zeros(len(flat))
    rounded = (flat / scale.where(scale > 0, 1).unsqueeze(1)).round_().to(torch.int8)
    return [rounded.view(value.shape), scale]


def pack(message: Message, precision: Precision = "float32") -> Tensor:
    """A message as bytes, uint8 [B].

    Args:
        message: what to send; its tensors may be on any device.
        precision: of its floating-point tensors; "float32" sends them as they are.

    Raises:
        ValueError: a tensor of another dtype than messages carry.
    """
    parts: list[Tensor] = []
    described = []
    for value in message.values:
        if str(value.dtype) not in _DTYPES:
            raise ValueError(f"a message holds a tensor of {value.dtype}; expected one of {', '.join(sorted(_DTYPES))}")
        pieces = [piece.detach().cpu().contiguous() for piece in _coarser(value, precision)]
        described.append([str(value.dtype), *([str(piece.dtype), list(piece.shape)] for piece in pieces)])
        parts += pieces
    head = json.dumps([message.kind, message.number, message.more, described]).encode()
    head += b" " * (-len(head) % _HEAD)
    start = 4 + len(head)
    offsets, end = [], start
    for part in parts:
        end = -(-end // _ALIGNED) * _ALIGNED
        offsets.append(end)
        end += part.numel() * part.itemsize
    body = torch.empty(end, dtype=torch.uint8)
    body[:start] = torch.frombuffer(bytearray(len(head).to_bytes(4, "little") + head), dtype=torch.uint8)
    for part, offset in zip(parts, offsets, strict=True):
        if part.numel():
            body[offset : offset + part.numel() * part.itemsize] = part.reshape(-1).view(torch.uint8)
    return body


def unpack(body: Tensor) -> Message:
    """The message in some bytes; its floating-point tensors are of the dtype that they had, on the CPU.

    Those that were sent as they are lie in the bytes themselves: nothing is copied.

    Raises:
        ValueError: the bytes are no message.
    """
    try:
        length = int.from_bytes(bytes(body[:4].tolist()), "little")
        kind, number, more, described = json.loads(body[4 : 4 + length].numpy().tobytes())
    except (ValueError, TypeError) as error:
        raise ValueError(f"{len(body)} bytes came in that are no message of blockprop's ({error})") from error
    values, end = [], 4 + length
    for dtype, *pieces in described:
        found = []
        for name, shape in pieces:
            end = -(-end // _ALIGNED) * _ALIGNED
            size = math.prod(shape) * _DTYPES[name].itemsize
            found.append(body[end : end + size].view(_DTYPES[name]).view(shape))
            end += size
        value = found[0]
        if len(found) > 1:
            value = value.float() * found[1].view(-1, *[1] * (value.ndim - 1))
        values.append(value.to(_DTYPES[dtype]))
    return Message(kind, number, values, more)
