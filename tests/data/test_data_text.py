import pytest
import torch

from blockprop.data import load
from blockprop.data.text import Windows, read

TEXT = "to be or not to be, that is the question:\n" * 50


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


def decoded(data, tokens):
    return "".join(data.vocabulary[token] for token in tokens)


def test_a_text_file_becomes_windows_and_their_next_characters(path):
    data = load(str(path), context=16)
    assert (data.task, data.classes, data.input_shape) == ("language", len(set(TEXT)), (16,))
    assert data.vocabulary == "".join(sorted(set(TEXT)))
    inputs, targets = data.train.batch(torch.arange(len(data.train)))
    assert inputs.dtype == targets.dtype == torch.int64
    assert decoded(data, inputs.flatten()) == TEXT[: inputs.numel()]
    assert decoded(data, targets.flatten()) == TEXT[1 : inputs.numel() + 1]
    assert data.sample.shape == (2, 16)


@pytest.mark.parametrize("validation", [0, 0.1, 0.5])
def test_the_parts_are_contiguous_and_the_test_part_is_the_last_twentieth(path, validation):
    data = load(str(path), context=16, validation=validation)
    whole, _ = read(path)
    parts = [data.train.tokens, data.validation.tokens, data.test.tokens]
    assert torch.equal(torch.cat(parts), whole)
    assert len(parts[2]) == round(0.05 * len(TEXT))
    assert len(parts[1]) == round(validation * (len(TEXT) - len(parts[2])))
    assert (len(data.validation) == 0) == (validation == 0)


def test_training_windows_are_shifted_within_the_stream():
    windows = Windows(torch.arange(100), context=8)
    ids = torch.arange(len(windows))
    shifts = []
    for seed in range(20):
        inputs, targets = windows.batch(ids, torch.Generator().manual_seed(seed))
        assert torch.equal(targets, inputs + 1)
        assert torch.equal(inputs - inputs[:, :1], torch.arange(8).expand(len(ids), 8))
        assert int(targets.max()) <= 99
        shifts.append(inputs[:, 0] - 8 * ids)
    assert set(torch.stack(shifts)[:, :-1].flatten().tolist()) == set(range(8))
    again, _ = windows.batch(ids, torch.Generator().manual_seed(19))
    assert torch.equal(again, inputs)


@pytest.mark.parametrize(("n", "count"), [(0, 0), (1, 0), (8, 0), (9, 1), (16, 1), (17, 2)])
def test_a_window_needs_one_token_more_than_its_context(n, count):
    windows = Windows(torch.arange(n), context=8)
    assert len(windows) == count
    if count:
        assert windows.batch(torch.tensor([count - 1]))[1][0, -1] == 8 * count


def test_more_than_256_characters_still_fit(tmp_path):
    text = "".join(chr(0x4E00 + i) for i in range(300)) + "😀é\r\n"
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode())
    tokens, vocabulary = read(path)
    assert tokens.dtype == torch.int32
    assert "".join(vocabulary[token] for token in tokens) == text


def test_shakespeare_is_read_from_its_published_place(tmp_path):
    (tmp_path / "tinyshakespeare").mkdir()
    (tmp_path / "tinyshakespeare" / "input.txt").write_text(TEXT)
    data = load("shakespeare", tmp_path)
    assert (data.name, data.input_shape) == ("shakespeare", (64,))


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"", {}, "is empty"),
        (b"abc \xff\xfe", {}, r"not UTF-8 \(byte 0xff at position 4\)"),
        (b"short", {}, "5 characters for its train part, expected at least 65"),
        (b"ab" * 1000, {"validation": 0.01}, "19 characters for its validation part, expected at least 65"),
        (b"ab" * 1000, {"context": 100}, "100 characters for its test part, expected at least 101"),
        (b"ab" * 1000, {"validation": 0.99}, "19 characters for its train part"),
        (b"ab" * 1000, {"context": 0}, "context is 0; it must be at least 1"),
        (b"ab" * 1000, {"validation": 1}, "validation is 1;"),
    ],
)
def test_bad_texts_are_refused_in_one_line(tmp_path, content, options, message):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load(str(path), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["missing.txt", "."])
def test_a_missing_text_is_named(tmp_path, name):
    with pytest.raises(ValueError, match="does not exist; expected a text file"):
        load(str(tmp_path / name))


def test_a_repr_is_short():
    assert repr(Windows(torch.arange(100_000), context=64)) == "Windows(1562 of 64 tokens)"


@pytest.mark.parametrize("seed", [None, 3])
def test_inputs_and_targets_alone_are_those_of_the_batch(path, seed):
    def generator():
        return None if seed is None else torch.Generator().manual_seed(seed)

    data, ids = load(str(path), context=16), torch.arange(5)
    inputs, targets = data.train.batch(ids, generator())
    assert torch.equal(data.only_inputs().train.batch_inputs(ids, generator()), inputs)
    assert torch.equal(data.only_targets().train.batch_targets(ids, generator()), targets)
    assert len(data.only_targets().test) == len(data.test)
