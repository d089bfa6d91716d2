"""One block of a network, without the memory of the others.

The initial weights of a block depend on the blocks before it: they drew from the same random generator first, and some
of torch's initialisers draw until they like what they see. So nothing is skipped or guessed here. The whole network is
built, operation by operation, and its tensors wait in temporary files while they are not in use; when it is done, one
block comes back into memory and the others become *meta* tensors, which have a shape and no values.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, UntypedStorage, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from blockprop.blocks import Blocks

__all__ = ["build_block", "only", "tensor_bytes"]


def build_block(
    build: Callable[[], nn.Sequential], cut: Callable[[nn.Sequential], Blocks], k: int, *, memory: int = 2**26
) -> Blocks:
    """Build a network of which only block k is in memory, with the very weights that it has in the whole network.

    Under the same `torch.manual_seed` these weights, and the state of the generator afterwards, are those of a whole
    build, bit for bit. It takes about as long, and meanwhile as much space as the whole network in the folder for
    temporary files (see `tempfile.gettempdir`; one that is itself in memory saves nothing).

    Args:
        build: makes the network, on the CPU.
        cut: cuts it, by flops, layers or names. All weights are meta tensors then, so a sample must be one as well.
        k: the block to keep, from 1.
        memory: bytes of tensors that may stay in memory during the build, besides those of the operation at hand;
            64 MiB unless told. Less means more traffic with the files.

    Returns:
        The blocks. The parameters and buffers of all but `blocks[k - 1]`, and tensors that are plain attributes of
        their modules, are meta tensors.

    Raises:
        ValueError: there is no block k, the network is not an `nn.Sequential`, or it was cut by time, which meta
            tensors do not take.

    >>> from blockprop import split
    >>> sample = torch.zeros(1, 4, device="meta")
    >>> blocks = build_block(
    ...     lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)),
    ...     lambda model: split(model, 2, sample=sample),
    ...     2,
    ... )
    >>> blocks, [weight.is_meta for weight in blocks.model.parameters()]
    (Blocks(0..1 | 2), [True, True, False, False])
    """
    with _files(memory) as files:
        with files, _Pinning(files):
            model = build()
        if not isinstance(model, nn.Sequential):
            raise ValueError(f"build made a {type(model).__name__}; expected an nn.Sequential")
        places = list(_places(model))
        _set_meta(places)
        files.load_others([tensor for _, _, tensor in places])
        try:
            blocks = cut(model)
            if blocks.cut.by == "time":
                raise ValueError("a block built alone cannot be cut by time; cut by 'flops', 'layers' or at names")
            _set_back(places, _block(blocks, k))
        finally:
            places.clear()
    return blocks


def only(blocks: Blocks, k: int) -> None:
    """Turn the tensors of all blocks but k into meta tensors, in place, which frees their memory.

    These are parameters, buffers and plain attributes of modules; not those in a list, say. An optimizer that holds
    some of them keeps them: make it afterwards.

    Args:
        blocks: the whole network.
        k: the block to keep, from 1.

    Raises:
        ValueError: there is no block k.

    >>> from blockprop import split
    >>> blocks = split(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), 2)
    >>> only(blocks, 1)
    >>> [weight.is_meta for weight in blocks.model.parameters()]
    [False, False, True, True]
    """
    kept = {id(tensor) for _, _, tensor in _places(_block(blocks, k))}
    _set_meta([place for place in _places(blocks.model) if id(place[2]) not in kept])


def tensor_bytes(block: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, int]:
    """Bytes of memory of a block's tensors: its weights, buffers and gradients, and the state of its optimizer.

    Memory that several tensors share counts once; meta tensors have none.

    >>> block = nn.Linear(4, 3)
    >>> block(torch.ones(2, 4)).sum().backward()
    >>> tensor_bytes(block, torch.optim.SGD(block.parameters(), lr=0.1))
    {'weights': 60, 'buffers': 0, 'gradients': 60, 'optimizer': 0}
    """
    parameters = list(block.parameters())
    state = [] if optimizer is None else [leaf for each in optimizer.state.values() for leaf in tree_leaves(each)]
    return {
        "weights": _bytes(parameters),
        "buffers": _bytes(block.buffers()),
        "gradients": _bytes(parameter.grad for parameter in parameters),
        "optimizer": _bytes(state),
    }


def _bytes(values: Any) -> int:
    tensors = [value for value in values if isinstance(value, Tensor) and not value.is_meta]
    return sum(storage.nbytes() for storage in {tensor.untyped_storage() for tensor in tensors})


def _block(blocks: Blocks, k: int) -> nn.Module:
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= len(blocks):
        raise ValueError(f"there is no block {k!r}; expected a number from 1 to {len(blocks)}")
    return blocks[k - 1]


_Place = tuple[nn.Module, str, Tensor]


def _places(model: nn.Module) -> Iterator[_Place]:
    """Every tensor of a module with the module and the name it has there; a tied one comes more than once."""
    for module in model.modules():
        named = {**dict(module.named_parameters(recurse=False, remove_duplicate=False)), **vars(module)}
        named.update(module.named_buffers(recurse=False, remove_duplicate=False))
        for name, value in named.items():
            if isinstance(value, Tensor):
                yield module, name, value


def _set_meta(places: list[_Place]) -> None:
    """Put meta tensors in these places; what was tied stays tied."""
    made: dict[int, Tensor] = {}
    for module, name, tensor in places:
        if id(tensor) not in made:
            meta = torch.empty_like(tensor, device="meta", requires_grad=False)
            made[id(tensor)] = nn.Parameter(meta, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else meta
        setattr(module, name, made[id(tensor)])


def _set_back(places: list[_Place], block: nn.Module) -> None:
    """Put back what belongs to a block, also where others have it as well."""
    parts = set(block.modules())
    kept = {id(tensor) for module, _, tensor in places if module in parts}
    for module, name, tensor in places:
        if id(tensor) in kept:
            setattr(module, name, tensor)


@contextmanager
def _files(memory: int) -> Iterator["_Filing"]:
    """A folder for tensors that are not in use; all that are still alive are in memory afterwards."""
    with TemporaryDirectory(prefix="blockprop-") as folder:
        files = _Filing(Path(folder), memory)
        try:
            yield files
        finally:
            files.load(list(files.away))


class _Filing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps the tensors that are made under it in files, but for those used last.

    Args:
        folder: where the files go.
        memory: bytes that may be in memory besides the tensors of the present operation.
    """

    def __init__(self, folder: Path, memory: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.folder = folder
        self.memory = memory
        # both by the storages' identity, and forgotten with them
        self.present: WeakKeyDictionary[UntypedStorage, None] = WeakKeyDictionary()  # the latest used is last
        self.away: WeakKeyDictionary[UntypedStorage, tuple[Path, int]] = WeakKeyDictionary()  # its file, and bytes
        self.most = 0  # bytes of those present, or less where some were freed since it was counted
        self.written = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        used = _storages((args, kwargs))
        if self.most > self.memory:
            self._spill(used)
        self.load(used)
        for storage in used:
            if storage in self.present:
                self.present[storage] = self.present.pop(storage)
        result = function(*args, **(kwargs or {}))
        for storage in _storages(result):
            new = storage not in used or function is torch.ops.aten.lift_fresh.default  # the end of torch.tensor
            if new and storage.device.type == "cpu" and storage.resizable() and storage.nbytes():
                self._enter(storage)
        return result

    def load(self, storages: list[UntypedStorage]) -> None:
        """Bring what is away back into memory."""
        for storage in storages:
            if storage in self.away:
                path, size = self.away.pop(storage)
                storage.resize_(size)
                storage.copy_(UntypedStorage.from_file(str(path), True, size))
                path.unlink()
                self._enter(storage)

    def load_others(self, tensors: list[Tensor]) -> None:
        """Bring back all but these."""
        those = {tensor.untyped_storage() for tensor in tensors}
        self.load([storage for storage in self.away if storage not in those])

    def _enter(self, storage: UntypedStorage) -> None:
        self.present[storage] = None
        self.most += storage.nbytes()

    def _spill(self, used: list[UntypedStorage]) -> None:
        """Write to files what was used longest ago, until no more than `memory` is left besides what is `used`."""
        others = [storage for storage in self.present if storage not in used]
        left = sum(storage.nbytes() for storage in others)
        for storage in others:
            if left <= self.memory:
                break
            del self.present[storage]
            size = storage.nbytes()
            left -= size
            self.written += 1
            path = self.folder / str(self.written)
            UntypedStorage.from_file(str(path), True, size).copy_(storage)
            storage.resize_(0)
            self.away[storage] = path, size
        self.most = left + sum(storage.nbytes() for storage in used)


# What reads a tensor's memory itself, and not by an operation that `_Filing` sees.
_DIRECT = {
    Tensor.numpy,
    Tensor.tolist,
    Tensor.data_ptr,
    Tensor.__array__,
    Tensor.__dlpack__,
    Tensor.__repr__,
    Tensor.__deepcopy__,
    Tensor.__reduce_ex__,
}


class _Pinning(TorchFunctionMode):
    """Keeps in memory for good what is read directly: others may hold its address."""

    def __init__(self, files: _Filing) -> None:
        super().__init__()
        self.files = files

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _DIRECT:
            for storage in _storages(args[:1]):  # not the memo of a deep copy
                self.files.load([storage])
                self.files.present.pop(storage, None)  # what is not listed is not written
        return function(*args, **(kwargs or {}))


def _storages(tree: Any) -> list[UntypedStorage]:
    """The memory of the tensors in nested arguments or results, and memory itself."""
    leaves = tree_leaves(tree)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.layout == torch.strided]
    bare = [leaf for leaf in leaves if isinstance(leaf, UntypedStorage)]
    return [storage for storage in [*(t.untyped_storage() for t in tensors), *bare] if storage.device.type != "meta"]
