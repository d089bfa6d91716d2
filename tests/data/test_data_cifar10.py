import os
import pickle

import numpy as np
import pytest
import torch

from blockprop.data import load

NAMES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]


def records(seed, n=4):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, 3072), dtype=np.uint8), (np.arange(n) + seed) % 10


def write_binary(data_dir):
    folder = data_dir / "cifar-10-batches-bin"
    folder.mkdir()
    for seed, name in enumerate(NAMES):
        pixels, labels = records(seed)
        (folder / f"{name}.bin").write_bytes(np.hstack([labels[:, None].astype(np.uint8), pixels]).tobytes())
    return folder


def write_python(data_dir):
    folder = data_dir / "cifar-10-batches-py"
    folder.mkdir()
    for seed, name in enumerate(NAMES):
        pixels, labels = records(seed)
        (folder / name).write_bytes(pickle.dumps({b"data": pixels, b"labels": labels.tolist()}, protocol=2))
    return folder


def python2_pickle(pixels, labels):
    """A batch as Python 2 and the NumPy of its day pickled it: strings without encoding, the old module name."""

    def string(content):
        return b"T" + len(content).to_bytes(4, "little") + content

    def whole(number):
        return b"J" + number.to_bytes(4, "little", signed=True)

    dtype = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
    state = b"(K\x01(" + whole(pixels.shape[0]) + whole(pixels.shape[1]) + b"t" + dtype + b"\x89"
    state += string(pixels.tobytes()) + b"tb"
    numbers = b"](" + b"".join(whole(int(label)) for label in labels) + b"e"
    return b"\x80\x02}(U\x04data" + array + state + b"U\x06labels" + numbers + b"u."


@pytest.mark.parametrize("write", [write_binary, write_python])
def test_both_published_layouts_are_read(tmp_path, write):
    write(tmp_path)
    data = load("cifar10", tmp_path, validation=0.25)
    assert (data.classes, data.input_shape, data.task) == (10, (3, 32, 32), "classification")
    assert (len(data.train), len(data.validation), len(data.test)) == (15, 5, 4)
    pixels, labels = records(5)
    inputs, targets = data.test.batch(torch.arange(4))
    mean, std = torch.tensor([[0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]]).view(2, 3, 1, 1)
    expected = (torch.from_numpy(pixels).view(4, 3, 32, 32).float() / 255 - mean) / std
    torch.testing.assert_close(inputs, expected)
    assert targets.tolist() == labels.tolist()
    assert data.test.inputs.dtype == torch.uint8


def test_a_batch_written_by_python_2_is_read(tmp_path):
    folder = write_python(tmp_path)
    pixels, labels = records(5)
    (folder / "test_batch").write_bytes(python2_pickle(pixels, labels))
    data = load("cifar10", tmp_path)
    assert torch.equal(data.test.inputs, torch.from_numpy(pixels).view(4, 3, 32, 32))
    assert data.test.targets.tolist() == labels.tolist()


def test_the_binary_folder_is_preferred(tmp_path):
    write_binary(tmp_path)
    (write_python(tmp_path) / "test_batch").write_bytes(b"never read")
    assert len(load("cifar10", tmp_path).test) == 4


def test_training_images_alone_are_augmented_and_only_when_asked(tmp_path):
    write_binary(tmp_path)
    data, plain = load("cifar10", tmp_path), load("cifar10", tmp_path, augment=False)
    ids = torch.arange(2)

    def changed(part):
        return not torch.equal(part.batch(ids)[0], part.batch(ids, torch.Generator().manual_seed(0))[0])

    assert changed(data.train)
    assert not any(changed(part) for part in (data.validation, data.test, plain.train))


class Attack:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path):
    (write_python(tmp_path) / "data_batch_1").write_bytes(pickle.dumps(Attack(str(tmp_path / "owned"))))
    with pytest.raises(ValueError, match=r"it names posix.mkdir|it names nt.mkdir"):
        load("cifar10", tmp_path)
    assert not (tmp_path / "owned").exists()


PIXELS, LABELS = records(0)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a pickle",
        pickle.dumps({b"data": PIXELS, b"labels": LABELS.tolist()}, protocol=2)[:-300],
        pickle.dumps([1, 2]),
        pickle.dumps({b"data": PIXELS}, protocol=2),
        pickle.dumps({b"data": PIXELS, b"labels": LABELS.tolist()[:-1]}, protocol=2),
        pickle.dumps({b"data": PIXELS.astype(np.float32), b"labels": LABELS.tolist()}, protocol=2),
        pickle.dumps({b"data": PIXELS[:, :5], b"labels": LABELS.tolist()}, protocol=2),
        pickle.dumps({b"data": PIXELS[:0], b"labels": []}, protocol=2),
        pickle.dumps({b"data": PIXELS, b"labels": ["a", "b", "c", "d"]}, protocol=2),
        pickle.dumps({b"data": PIXELS, b"labels": [2**80] * 4}, protocol=2),
        pickle.dumps(print),
    ],
)
def test_other_pickles_are_refused_in_one_line(tmp_path, content):
    (write_python(tmp_path) / "data_batch_2").write_bytes(content)
    with pytest.raises(ValueError, match="data_batch_2 is not a CIFAR-10 batch") as caught:
        load("cifar10", tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds 0 bytes, expected a positive multiple of 3073"),
        (bytes(3072), "holds 3072 bytes"),
        (bytes(3074), "holds 3074 bytes"),
        (b"\x0a" + bytes(3072), "holds the label 10, expected 0 to 9"),
    ],
)
def test_a_damaged_binary_file_is_refused(tmp_path, content, message):
    (write_binary(tmp_path) / "data_batch_3.bin").write_bytes(content)
    with pytest.raises(ValueError, match=f"data_batch_3.bin {message}"):
        load("cifar10", tmp_path)


def test_a_python_label_out_of_range_is_refused(tmp_path):
    batch = {b"data": PIXELS, b"labels": [0, 1, 2, 10]}
    (write_python(tmp_path) / "test_batch").write_bytes(pickle.dumps(batch, protocol=2))
    with pytest.raises(ValueError, match="holds the label 10, expected 0 to 9"):
        load("cifar10", tmp_path)


@pytest.mark.parametrize("write", [write_binary, write_python])
def test_a_missing_batch_is_named(tmp_path, write):
    next(write(tmp_path).glob("data_batch_4*")).unlink()
    with pytest.raises(ValueError, match=r"data_batch_4\S* does not exist"):
        load("cifar10", tmp_path)


def test_missing_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"neither .*cifar-10-batches-bin nor .*cifar-10-batches-py exists"):
        load("cifar10", tmp_path)
