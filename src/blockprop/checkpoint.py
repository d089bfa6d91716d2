"""Checkpoints: the whole state of a run in one safetensors file, written atomically, checked when read.

A state is a tree of dicts, lists, tuples, numbers, strings and tensors. Its tensors become the file's tensors,
the rest is JSON in the file's metadata, beside a digest of both. Nothing is ever unpickled.
"""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from blockprop.errors import first_line

__all__ = ["Checkpoints", "load_state", "save_state", "write_atomically"]


def _encode(node: Any, tensors: dict[str, Tensor]) -> Any:
    match node:
        case None | bool() | int() | float() | str():
            return node
        case Tensor():
            name = str(len(tensors))
            tensors[name] = node.detach().cpu().contiguous().clone()
            return {"tensor": name}
        case dict():
            # pairs, since an optimizer's state has whole numbers for keys
            return {"dict": [[key, _encode(value, tensors)] for key, value in node.items()]}
        case list() | tuple():
            kind = "tuple" if isinstance(node, tuple) else "list"  # a torch.Size is a tuple
            return {kind: [_encode(value, tensors) for value in node]}
        case _:
            raise ValueError(
                f"cannot write a {type(node).__name__} into a checkpoint; expected tensors, numbers, strings, "
                "and lists or dicts of these"
            )


def _decode(node: Any, tensors: dict[str, Tensor]) -> Any:
    match node:
        case {"tensor": name}:
            return tensors[name]
        case {"dict": pairs}:
            return {key: _decode(value, tensors) for key, value in pairs}
        case {"list": values}:
            return [_decode(value, tensors) for value in values]
        case {"tuple": values}:
            return tuple(_decode(value, tensors) for value in values)
        case _:
            return node


def _digest(tree: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(tree.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all, whatever happens in between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a state to a file.

    Raises:
        ValueError: the state holds something that is neither a tensor nor JSON.
    """
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_encode(state, tensors))
    write_atomically(path, save(tensors, metadata={"state": tree, "sha256": _digest(tree, tensors)}))


def load_state(path: Path) -> dict[str, Any]:
    """Read a state back, on the CPU.

    Raises:
        ValueError: the file is missing, damaged, or not one of ours.
    """
    if not path.is_file():
        raise ValueError(f"there is no checkpoint {path}; expected a .safetensors file written by a run")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"checkpoint {path} is damaged ({first_line(error)}); remove it to resume from the one before"
        ) from error
    if not {"state", "sha256"} <= metadata.keys():
        raise ValueError(f"{path} is not a checkpoint of a run; expected one from a run's checkpoints folder")
    if _digest(metadata["state"], tensors) != metadata["sha256"]:
        raise ValueError(
            f"checkpoint {path} is damaged (its checksum does not match); remove it to resume from the one before"
        )
    state: dict[str, Any] = _decode(json.loads(metadata["state"]), tensors)
    return state


class Checkpoints:
    """The checkpoints of one run: a folder of `step-N.safetensors`. Other files in it are left alone.

    Args:
        folder: where they are; made when the first is written.
        keep: how many of the newest to keep, at least 1, default 2.

    Raises:
        ValueError: `keep` is not a whole number of at least 1.
    """

    def __init__(self, folder: Path | str, keep: int = 2) -> None:
        if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
            raise ValueError(f"keep is {keep!r}; expected a whole number of checkpoints, at least 1")
        self.folder = Path(folder)
        self.keep = keep

    def paths(self) -> list[Path]:
        """The checkpoints that are there, oldest first."""
        found = [path for path in self.folder.glob("step-*.safetensors") if re.fullmatch(r"step-[0-9]+", path.stem)]
        return sorted(found, key=lambda path: int(path.stem.removeprefix("step-")))

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write the checkpoint of a step, then drop the oldest beyond `keep`."""
        save_state(self.folder / f"step-{step:08d}.safetensors", state)
        for path in self.paths()[: -self.keep]:
            path.unlink()

    def newest(self) -> dict[str, Any]:
        """The state of the newest checkpoint.

        Raises:
            ValueError: there is none, or it is damaged.
        """
        paths = self.paths()
        if not paths:
            raise ValueError(f"{self.folder} holds no checkpoint to resume from; start the run anew")
        return load_state(paths[-1])
