"""One block of a network, built without the memory of the others: the same bits as in the whole network."""

import contextlib
import copy
import tempfile
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from blockprop import partial, split
from blockprop.models import mlp
from blockprop.models.gpt import gpt
from blockprop.models.resnet import resnet18
from blockprop.partial import build_block, only, tensor_bytes

IMAGES = (2, 3, 8, 8)
ZOO = {
    "mlp": (lambda: mlp((3, 8, 8), 10, width=16, depth=6, norm="batch"), torch.rand(IMAGES)),
    "resnet18": (lambda: resnet18(width=4), torch.rand(IMAGES)),
    "preact-resnet18": (lambda: resnet18(width=4, preactivation=True), torch.rand(IMAGES)),
    "gpt": (lambda: gpt(20, context=8, width=16, depth=4, dropout=0.1), torch.zeros(2, 8, dtype=torch.long)),
}


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inner = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mask = torch.ones(3, 3).tril()  # no buffer

    def forward(self, x):
        return x + self.inner(x, x, x, attn_mask=self.mask)[0]


class Picky(nn.Module):
    """Initialisers that look at what they drew, or draw elsewhere than in place."""

    def __init__(self, width):
        super().__init__()
        for name, init in {
            "truncated": nn.init.trunc_normal_,
            "rare": lambda w: nn.init.trunc_normal_(w, 0.0, 1.0, 1.5, 2.5),
            "orthogonal": nn.init.orthogonal_,
            "sparse": lambda w: nn.init.sparse_(w, 0.3),
        }.items():
            setattr(self, name, nn.Parameter(init(torch.empty(width, width))))
        self.scaled = nn.Parameter(torch.randn(width, width) / width)
        self.register_buffer("order", torch.randperm(width))
        if torch.rand(()).item() < 0.5:  # a draw that decides on draws
            nn.init.uniform_(self.scaled)

    def forward(self, x):
        return x @ (self.truncated + self.rare + self.orthogonal + self.sparse + self.scaled)[:, self.order]


def defaults():
    return nn.Sequential(
        nn.Embedding(11, 8, padding_idx=0),
        Attention(8),
        nn.LayerNorm(8),
        nn.Linear(8, 8),
        nn.Unflatten(1, (1, 3)),
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 3 * 8, 5),
    )


def picky():
    return nn.Sequential(*(Picky(8) for _ in range(4)), nn.Linear(8, 3))


def copied():
    layer = nn.Sequential(Attention(8), nn.Flatten(), nn.Linear(24, 24), nn.BatchNorm1d(24), nn.Unflatten(1, (3, 8)))
    return nn.Sequential(*(copy.deepcopy(layer) for _ in range(4)), nn.Linear(8, 3))


def initialised_late():
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(5))).double()
    for weight in model.parameters():
        weight.data.normal_(0, 0.02)
    model[3].weight.data.copy_(model[1].weight)
    return model.to("cpu")


def parametrized():
    return nn.Sequential(*(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)) for _ in range(4)))


USERS = {
    "defaults": (defaults, torch.zeros(2, 3, dtype=torch.long)),
    "picky": (picky, torch.rand(2, 8)),
    "copied": (copied, torch.rand(2, 3, 8)),
    "initialised late": (initialised_late, torch.rand(2, 8, dtype=torch.float64)),
    "parametrized": (parametrized, torch.rand(2, 8)),
}
ALL = ZOO | USERS


def cut_in(blocks, sample, by="flops"):
    return lambda model: split(model, blocks, by=by, sample=sample.to("meta"))


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)


@pytest.mark.parametrize("memory", [0, 2**26])
@pytest.mark.parametrize("K", [2, 3, 4])
@pytest.mark.parametrize("name", ALL)
def test_a_block_built_alone_is_that_of_the_whole_network(name, K, memory):
    build, sample = ALL[name]
    torch.manual_seed(7)
    whole = split(build(), K, sample=sample)
    after = torch.get_rng_state()
    for k in range(1, K + 1):
        torch.manual_seed(7)
        blocks = build_block(build, cut_in(K, sample), k, memory=memory)
        assert torch.equal(torch.get_rng_state(), after)
        assert blocks.cut == whole.cut
        ours, theirs = blocks[k - 1].state_dict(), whole[k - 1].state_dict()
        assert ours.keys() == theirs.keys()
        assert all(same(ours[key], theirs[key]) for key in ours)
        assert blocks.model.state_dict().keys() == whole.model.state_dict().keys()
        for i, (block, other) in enumerate(zip(blocks, whole, strict=True), 1):
            tensors = [*block.parameters(), *block.buffers()]
            assert all(tensor.is_meta == (i != k) for tensor in tensors)
            assert [(t.shape, t.dtype, t.requires_grad) for t in tensors] == [
                (t.shape, t.dtype, t.requires_grad) for t in [*other.parameters(), *other.buffers()]
            ]


@pytest.mark.parametrize("name", ALL)
def test_a_block_built_alone_computes_and_trains(name):
    build, sample = ALL[name]
    torch.manual_seed(7)
    whole = split(build(), 3, sample=sample)
    torch.manual_seed(7)
    block = build_block(build, cut_in(3, sample), 2, memory=0)[1]
    h = whole[0](sample).detach()
    outputs = []
    for each in (block, whole[1]):
        torch.manual_seed(1)
        output = each(h)
        output.square().mean().backward()
        outputs.append(output)
    assert torch.equal(*outputs)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(block.parameters(), whole[1].parameters(), strict=True))


@pytest.mark.parametrize("by", ["flops", "layers"])
@pytest.mark.parametrize("name", ZOO)
def test_a_cut_on_meta_tensors_is_the_cut(name, by):
    build, sample = ZOO[name]
    real = split(build(), 4, by=by, sample=sample)
    with torch.device("meta"):
        model = build()
    assert split(model, 4, by=by, sample=sample.to("meta")).cut == real.cut


def test_a_cut_at_names():
    build, _ = ZOO["gpt"]
    blocks = build_block(build, lambda model: split(model, at=["block2", "head"]), 2)
    assert [next(block.parameters()).is_meta for block in blocks] == [True, False, True]


class Alive(TorchDispatchMode):
    """How many real tensors were in memory after any operation, counted from below, and their bytes."""

    def __init__(self):
        super().__init__()
        self.seen = weakref.WeakKeyDictionary()
        self.most = self.peak = self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            # bytes are on their way to a file or back
            if isinstance(leaf, Tensor) and not leaf.is_meta and leaf.dtype != torch.uint8:
                self.seen[leaf.untyped_storage()] = None
        sizes = [storage.nbytes() for storage in self.seen if storage.nbytes()]
        self.most, self.peak = max(self.most, len(sizes)), max(self.peak, sum(sizes))
        self.largest = max([self.largest, *sizes])
        return result


def listened(build, sample, memory):
    listener, found = Alive(), []

    def heard():
        model = build()
        found.extend([listener.most, listener.peak, listener.largest])
        return model

    with listener:
        build_block(heard, cut_in(4, sample), 2, memory=memory)
    return found


@pytest.mark.parametrize("name", ZOO)
def test_one_tensor_at_a_time_is_in_memory(name):
    most, peak, largest = listened(*ZOO[name], memory=0)
    assert most == 1
    assert peak == largest


@pytest.mark.parametrize("name", ALL)
def test_memory_is_kept_to_what_was_asked(name):
    build, sample = ALL[name]
    total = sum(value.untyped_storage().nbytes() for value in build().state_dict().values())
    _, peak, largest = listened(build, sample, memory=total // 8)
    assert peak <= total // 8 + 5 * largest  # the tensors of an operation come on top


@pytest.mark.parametrize("name", ALL)
def test_no_more_than_the_block_comes_back_into_memory(name, monkeypatch):
    build, sample = ALL[name]
    built, back = [], []

    def heard():
        model = build()
        built.append(None)
        return model

    def entered(files, storage):
        enter(files, storage)
        if built:
            back.append(storage.nbytes())

    enter = partial._Filing._enter
    monkeypatch.setattr(partial._Filing, "_enter", entered)
    block = build_block(heard, cut_in(4, sample), 2, memory=0)[1]
    found = tensor_bytes(block)
    attributes = sum(v.nbytes for m in block.modules() for v in vars(m).values() if isinstance(v, Tensor))
    assert sum(back) <= found["weights"] + found["buffers"] + attributes


def test_tied_weights_and_what_two_blocks_read_stay_tied():
    def build():
        shared = nn.Linear(4, 4)
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), shared, shared)
        model[1].register_buffer("scale", torch.ones(4))
        model[2].register_buffer("scale", model[1].scale)
        return model

    blocks = build_block(build, lambda model: split(model, at=["1", "2"]), 3)
    assert blocks[2][0].weight is blocks[2][1].weight
    assert blocks[1][0].scale is blocks[2][0].scale
    assert torch.equal(blocks[2][0].scale, torch.ones(4))
    assert blocks[1][0].weight.is_meta


def test_a_generator_of_ones_own_moves_as_in_the_whole_build():
    def build():
        model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 5))
        for layer in model:
            nn.init.normal_(layer.weight, generator=generator)
        return model

    generator = torch.Generator().manual_seed(3)
    whole, after = build(), generator.get_state()
    generator.manual_seed(3)
    blocks = build_block(build, lambda model: split(model, 3), 2, memory=0)
    assert torch.equal(blocks[1][0].weight, whole[1].weight)
    assert torch.equal(generator.get_state(), after)


def test_values_that_are_read_past_operations_are_right():
    def build():
        model = nn.Sequential(*(nn.Linear(5, 5) for _ in range(4)))
        arrays.append(model[0].weight.detach().numpy())
        lists.append(model[1].weight.tolist())
        for layer in model:
            nn.init.ones_(layer.bias)
        texts.append(str(model[2].weight))
        return model

    arrays, lists, texts = [], [], []
    torch.manual_seed(0)
    whole = build()
    torch.manual_seed(0)
    build_block(build, lambda model: split(model, 4), 4, memory=0)
    assert (arrays[0] == arrays[1]).all()
    assert lists[0] == lists[1] == whole[1].weight.tolist()
    assert texts[0] == texts[1]


def test_tensors_that_the_build_did_not_make_are_left_alone():
    given, kept = torch.arange(100.0), []

    def build():
        assert given.untyped_storage().nbytes() == 400
        kept.append([torch.ones(50), given[:50] + 1])
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        assert given.untyped_storage().nbytes() == 400
        return model

    build_block(build, lambda model: split(model, 2), 1, memory=0)
    assert torch.equal(given, torch.arange(100.0))
    # what the build left elsewhere is in memory again
    assert torch.equal(kept[0][0], torch.ones(50))
    assert torch.equal(kept[0][1], torch.arange(1.0, 51.0))


@pytest.mark.parametrize("fails", [False, True])
def test_no_file_is_left(tmp_path, monkeypatch, fails):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    seen, models = [], []

    def build():
        models.append(nn.Sequential(*(nn.Linear(9, 9) for _ in range(3))))
        seen.extend(path for path in tmp_path.rglob("*") if path.is_file())
        if fails:
            raise RuntimeError("my own")
        return models[0]

    with pytest.raises(RuntimeError, match="my own") if fails else contextlib.nullcontext():
        build_block(build, lambda model: split(model, 3), 1, memory=0)
    assert seen
    assert list(tmp_path.iterdir()) == []
    if fails:
        assert all(weight.untyped_storage().nbytes() for weight in models[0].parameters())


def test_by_time_is_refused_in_one_line():
    build, sample = ZOO["mlp"]
    with pytest.raises(ValueError, match="cannot be cut by time; cut by 'flops', 'layers' or at names") as caught:
        build_block(build, cut_in(2, sample, "time"), 1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("k", [0, 3, True, "1", None])
def test_a_block_that_is_not_there_is_refused(k):
    build, sample = ZOO["mlp"]
    with pytest.raises(ValueError, match=f"there is no block {k!r}; expected a number from 1 to 2"):
        build_block(build, cut_in(2, sample), k)
    with pytest.raises(ValueError, match="there is no block"):
        only(split(build(), 2, sample=sample), k)


def test_a_network_of_another_kind_is_refused():
    with pytest.raises(ValueError, match=r"build made a Linear; expected an nn\.Sequential"):
        build_block(lambda: nn.Linear(2, 2), lambda model: split(model, 1), 1)


@pytest.mark.parametrize("name", ALL)
def test_only_leaves_one_block(name):
    build, sample = ALL[name]
    blocks = split(build(), 3, sample=sample)
    before = {key: value.clone() for key, value in blocks[1].state_dict().items()}
    keys = list(blocks.model.state_dict())
    kept = list(blocks[1].parameters())
    foreign = weakref.WeakSet(p.untyped_storage() for i in (0, 2) for p in blocks[i].parameters())
    assert len(foreign) > 0
    only(blocks, 2)
    assert len(foreign) == 0  # freed
    assert all(a is b for a, b in zip(kept, blocks[1].parameters(), strict=True))
    assert all(same(before[key], value) for key, value in blocks[1].state_dict().items())
    assert list(blocks.model.state_dict()) == keys
    assert all(t.is_meta for i in (0, 2) for t in [*blocks[i].parameters(), *blocks[i].buffers()])
    assert [tensor_bytes(blocks[i])["weights"] for i in (0, 2)] == [0, 0]


def test_bytes_of_a_block():
    block = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    adam = torch.optim.Adam(block.parameters())
    weights = 4 * (4 * 3 + 3 + 3 + 3)
    assert tensor_bytes(block) == {"weights": weights, "buffers": 4 * 6 + 8, "gradients": 0, "optimizer": 0}
    block(torch.rand(5, 4)).sum().backward()
    adam.step()
    found = tensor_bytes(block, adam)
    assert (found["gradients"], found["optimizer"]) == (weights, 2 * weights + 4 * 4)  # two moments, a step each


def test_shared_memory_counts_once():
    shared = nn.Linear(4, 4)
    assert tensor_bytes(nn.Sequential(shared, shared))["weights"] == 4 * 20
