"""Checkpoints: bit for bit, or a one-line ValueError."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from blockprop.checkpoint import Checkpoints, load_state, save_state, write_atomically

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


def equal(a, b):
    """Same types all the way down, same bits."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        bits = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)
    if isinstance(a, dict):
        return list(a) == list(b) and all(type(x) is type(y) for x, y in zip(a, b, strict=True)) and all(
            equal(a[key], b[key]) for key in a
        )  # fmt: skip
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def tensor(dtype, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 100, shape, generator=generator).to(dtype)


TENSORS = st.builds(
    tensor, st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3), st.integers(0, 9)
)  # includes 0-dim and empty
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5), TENSORS)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.one_of(st.integers(-5, 5), st.text(max_size=4)), inner, max_size=3),
    ),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(state=st.dictionaries(st.text(max_size=4), TREES, max_size=4))
def test_a_round_trip_is_bit_for_bit(tmp_path_factory, state):
    path = tmp_path_factory.mktemp("round") / "state.safetensors"
    save_state(path, state)
    assert equal(load_state(path), state)


def test_odd_values_survive(tmp_path):
    odd = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    state = {
        "odd": odd, "tensor": {"tensor": "0"}, "dict": {"dict": [], 3: (None, True)},
        "strided": torch.arange(6).view(2, 3).T, "same": odd, "again": odd, "0-dim": torch.tensor(1.5).bfloat16(),
        "numbers": [1e308, 5e-324, 2**70, 0.1 + 0.2],
    }  # fmt: skip
    save_state(tmp_path / "a", state)
    loaded = load_state(tmp_path / "a")
    assert equal(loaded, state)
    loaded["same"][0] = 0
    assert torch.isnan(loaded["again"][0])


def test_optimizer_state_survives(tmp_path):
    p = nn.Parameter(torch.randn(3))
    optimizer = torch.optim.AdamW([p], 1e-2)
    p.sum().backward()
    optimizer.step()
    save_state(tmp_path / "a", optimizer.state_dict())
    assert equal(load_state(tmp_path / "a"), optimizer.state_dict())


@pytest.mark.parametrize("value", [b"bytes", object(), {1, 2}, nn.Linear(1, 1)], ids=lambda v: type(v).__name__)
def test_what_cannot_be_written_is_refused_and_the_old_file_stays(tmp_path, value):
    save_state(tmp_path / "a", {"x": 1})
    with pytest.raises(ValueError, match=type(value).__name__):
        save_state(tmp_path / "a", {"x": [value]})
    assert load_state(tmp_path / "a") == {"x": 1}


def test_a_size_is_a_tuple(tmp_path):
    save_state(tmp_path / "a", {"shape": torch.zeros(2, 3).shape})
    assert load_state(tmp_path / "a") == {"shape": (2, 3)}


def refused(path):
    with pytest.raises(ValueError) as caught:
        load_state(path)
    assert type(caught.value) is ValueError
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "state.safetensors"
    save_state(path, {"w": torch.arange(12.0), "b": torch.ones(3).bfloat16(), "n": {1: (2, None)}})
    return path, path.read_bytes()


@pytest.mark.parametrize("mask", [0x01, 0x20, 0xFF], ids=hex)
def test_any_flipped_byte_is_found(written, mask):
    path, content = written
    header = 8 + int.from_bytes(content[:8], "little")
    assert header < len(content) - 50
    for position in range(len(content)):
        path.write_bytes(content[:position] + bytes([content[position] ^ mask]) + content[position + 1 :])
        refused(path)


def test_a_truncated_file_is_found(written):
    path, content = written
    for length in [0, 1, 7, 8, 9, 50, len(content) // 2, len(content) - 1]:
        path.write_bytes(content[:length])
        assert "damaged" in refused(path)
    path.write_bytes(content + b"\0")
    refused(path)


def test_other_files_are_not_taken_for_checkpoints(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "other")
    assert "is not a checkpoint" in refused(tmp_path / "other")
    save_file({"w": torch.ones(2)}, tmp_path / "meta", metadata={"format": "pt"})
    assert "is not a checkpoint" in refused(tmp_path / "meta")
    (tmp_path / "text").write_text("hello, this is no safetensors file at all\n" * 10)
    refused(tmp_path / "text")
    assert "there is no checkpoint" in refused(tmp_path / "missing")
    assert "there is no checkpoint" in refused(tmp_path)


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failure_while_writing_leaves_the_old_file(tmp_path, monkeypatch, failing):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"step": 1})

    def fail(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(*((os, "fsync") if failing == "fsync" else (type(tmp_path), "replace")), fail)
    for step in (1, 2):
        with pytest.raises(OSError, match="no space"):
            checkpoints.save(step, {"step": "new"})
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.safetensors"]
    assert checkpoints.newest() == {"step": 1}


def test_write_atomically_makes_folders_and_replaces(tmp_path):
    path = tmp_path / "a" / "b" / "file"
    write_atomically(path, b"one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(path.parent.iterdir()) == [path]


def test_the_two_newest_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "run")
    with pytest.raises(ValueError, match="no checkpoint"):
        checkpoints.newest()
    for step in (5, 10, 20, 99_999_999, 100_000_000):
        checkpoints.save(step, {"step": step})
        assert checkpoints.newest() == {"step": step}
    assert [path.name for path in checkpoints.paths()] == ["step-99999999.safetensors", "step-100000000.safetensors"]


def test_keep_is_a_choice(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step in range(3):
        checkpoints.save(step, {"step": step})
    assert len(checkpoints.paths()) == 1
    checkpoints.paths()[0].write_bytes(b"cut")
    with pytest.raises(ValueError, match="damaged"):
        checkpoints.newest()


@pytest.mark.parametrize("keep", [0, -1, 1.5, True, None, "2"])
def test_at_least_one_is_kept(tmp_path, keep):
    with pytest.raises(ValueError, match="keep is .*expected a whole number") as caught:
        Checkpoints(tmp_path, keep=keep)
    assert "\n" not in str(caught.value)


def test_stray_files_are_ignored_and_left_alone(tmp_path):
    strays = [
        "step-abc.safetensors",
        "step-.safetensors",
        "step-7-copy.safetensors",
        "step-9.txt",
        "step-²³.safetensors",
    ]
    for name in strays:
        (tmp_path / name).write_text("stray")
    checkpoints = Checkpoints(tmp_path, keep=1)
    with pytest.raises(ValueError, match="no checkpoint"):
        checkpoints.newest()
    for step in (5, 10):
        checkpoints.save(step, {"step": step})
    assert checkpoints.newest() == {"step": 10}
    assert {path.name for path in tmp_path.iterdir()} == {*strays, "step-00000010.safetensors"}
