"""Messages as bytes, and back."""

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockprop.runtime.message import Message, pack, unpack

DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.bool,
    torch.uint8,
]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)), max_size=4))
def test_a_message_comes_back_as_it_was(kinds):
    torch.manual_seed(0)
    values = [(100 * torch.randn(shape)).to(dtype) for dtype, shape in kinds]
    sent = Message("output", 3, values, {"version": 7})
    found = unpack(pack(sent))
    assert (found.kind, found.number, found.more) == (sent.kind, sent.number, sent.more)
    assert [value.dtype for value in found.values] == [value.dtype for value in values]
    assert all(torch.equal(*pair) for pair in zip(found.values, values, strict=True))


@pytest.mark.parametrize(("precision", "error"), [("bfloat16", 2**-8), ("int8", 0.5 / 127)])
def test_coarser_numbers_have_the_dtype_that_they_had(precision, error):
    """An error of half a unit in the last place: of each number's, or of the largest one's in its example."""
    torch.manual_seed(0)
    value, ids = torch.randn(5, 4, 3), torch.arange(5)
    found, theirs = unpack(pack(Message("output", 0, [value, ids]), precision)).values
    assert (found.dtype, theirs.tolist()) == (torch.float32, ids.tolist())
    size = value.abs() if precision == "bfloat16" else value.abs().amax((1, 2), keepdim=True)
    assert bool(((found - value).abs() <= 1.01 * error * size).all())
    assert not torch.equal(found, value)


def test_a_checkpoint_has_tensors_of_their_own():
    """What has come in lies side by side in the message's bytes, which nobody else can save."""
    sent = Message("output", 3, [torch.randn(4, 2), torch.arange(4)], {"version": 7})
    file = io.BytesIO()
    torch.save(unpack(pack(sent)).state(), file)
    file.seek(0)
    found = Message(*torch.load(file, weights_only=True))
    assert (found.kind, found.number, found.more) == ("output", 3, {"version": 7})
    assert all(torch.equal(*pair) for pair in zip(found.values, sent.values, strict=True))


@pytest.mark.parametrize("body", [b"", b"abc", b"\x02\x00\x00\x00[]", b"\x09\x00\x00\x00not json!"])
def test_other_bytes_are_refused(body):
    with pytest.raises(ValueError, match="bytes came in that are no message of blockprop's"):
        unpack(torch.frombuffer(bytearray(body), dtype=torch.uint8) if body else torch.empty(0, dtype=torch.uint8))
