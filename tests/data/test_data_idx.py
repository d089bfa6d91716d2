import gzip
import struct

import numpy as np
import pytest
import torch

from blockprop.data import load
from blockprop.data.idx import read

LABELS = "train-labels-idx1-ubyte"


def idx(values):
    return bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def images(n, side=28):
    return np.random.default_rng(n).integers(0, 256, (n, side, side), dtype=np.uint8)


def write_mnist(folder, *, zipped=True):
    folder.mkdir(parents=True)
    for part, n in (("train", 20), ("t10k", 6)):
        labels = (np.arange(n) % 10).astype(np.uint8)
        for kind, values in (("images-idx3", images(n)), ("labels-idx1", labels)):
            content = idx(values)
            suffix = ".gz" if zipped else ""
            (folder / f"{part}-{kind}-ubyte{suffix}").write_bytes(gzip.compress(content) if zipped else content)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
@pytest.mark.parametrize("zipped", [True, False])
def test_the_published_layout_is_read(tmp_path, name, zipped):
    write_mnist(tmp_path / name, zipped=zipped)
    data = load(name, tmp_path, validation=0.25)
    assert (data.name, data.task, data.classes, data.input_shape) == (name, "classification", 10, (1, 28, 28))
    assert (len(data.train), len(data.validation), len(data.test)) == (15, 5, 6)
    assert data.test.inputs.dtype == torch.uint8
    inputs, targets = data.test.batch(torch.arange(6))
    mean, std = {"mnist": (0.1307, 0.3081), "fashion-mnist": (0.2860, 0.3530)}[name]
    expected = (torch.from_numpy(images(6)).float()[:, None] / 255 - mean) / std
    torch.testing.assert_close(inputs, expected)
    assert targets.tolist() == [0, 1, 2, 3, 4, 5]
    assert targets.dtype == torch.int64
    assert data.sample.shape == (2, 1, 28, 28)


def test_the_test_set_does_not_depend_on_validation(tmp_path):
    write_mnist(tmp_path / "mnist")
    whole, part = load("mnist", tmp_path, validation=0), load("mnist", str(tmp_path), validation=0.5)
    assert len(whole.validation) == 0
    assert torch.equal(whole.test.inputs, part.test.inputs)


def test_a_missing_file_is_named_and_nothing_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr("blockprop.data.files.fetch", lambda path: pytest.fail("downloaded"))
    with pytest.raises(ValueError, match=r"mnist/train-images-idx3-ubyte\[.gz\] does not exist"):
        load("mnist", tmp_path)


GOOD = idx(np.arange(6, dtype=np.uint8).reshape(1, 2, 3))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "starts with nothing, expected 00 00 08 03"),
        (b"\0\0", "starts with 00 00, expected 00 00 08 03"),
        (b"\0\0\x0d\x03" + GOOD[4:], "starts with 00 00 0d 03"),
        (b"\0\0\x08\x01" + GOOD[4:], "starts with 00 00 08 01"),
        (GOOD[:9], "holds 9 bytes, expected at least 16"),
        (GOOD[:-1], "holds 21 bytes, expected 22"),
        (GOOD + b"\0", "holds 23 bytes, expected 22"),
        (idx(np.empty((0, 28, 28), np.uint8)), r"dimensions \[0, 28, 28\], expected none of 0"),
        (b"\0\0\x08\x03" + b"\xff" * 12, f"expected {16 + (2**32 - 1) ** 3}"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "images"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read(path, dimensions=3)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def flipped(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]


@pytest.mark.parametrize(
    "damage",
    [lambda content: content[:-5], lambda content: b"not gzip", lambda content: content + b"junk", flipped],
    ids=["truncated", "not gzip", "trailing", "flipped"],
)
def test_a_damaged_gzip_file_is_refused(tmp_path, damage):
    path = tmp_path / "images.gz"
    path.write_bytes(damage(gzip.compress(idx(images(3)))))
    with pytest.raises(ValueError, match="is not a whole gzip file") as caught:
        read(path, dimensions=3)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        (LABELS, np.full(20, 10, np.uint8), "holds the label 10, expected 0 to 9"),
        (LABELS, np.zeros(19, np.uint8), "holds 20 images but .* holds 19 labels"),
        ("t10k-images-idx3-ubyte", images(6, side=27), "images of 27 x 27 pixels, expected 28 x 28"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path, file, values, message):
    write_mnist(tmp_path / "mnist", zipped=False)
    (tmp_path / "mnist" / file).write_bytes(idx(values))
    with pytest.raises(ValueError, match=message):
        load("mnist", tmp_path)
