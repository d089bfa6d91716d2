"""Cuts: by hand, and against all cuts of small networks."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockprop.planning.partition import partition


def slowest(cut, below, top, speeds, spared, messages):
    ends = [*cut[1:], len(below)]
    times = [
        (sum((top if k == len(cut) - 1 else below)[a:b]) - spared[a]) / speeds[k]
        for k, (a, b) in enumerate(zip(cut, ends, strict=True))
    ]
    return max(times + [messages[end - 1] for end in ends[:-1]])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), layers=st.integers(1, 7))
def test_no_cut_is_faster(data, layers):
    numbers = st.lists(st.integers(0, 9), min_size=layers, max_size=layers)
    below, top, messages = data.draw(numbers), data.draw(numbers), data.draw(numbers)
    spared = [min(a, b) / 2 for a, b in zip(below, top, strict=True)]
    blocks = data.draw(st.integers(1, layers))
    speeds = data.draw(st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=blocks, max_size=blocks))
    found = partition(below, top, speeds, spared=spared, messages=messages)
    best = min(
        slowest((0, *cut), below, top, speeds, spared, messages)
        for cut in itertools.combinations(range(1, layers), blocks - 1)
    )
    assert slowest(found, below, top, speeds, spared, messages) <= best * (1 + 2e-5) + 1e-9


def test_a_block_that_recomputes_gets_less():
    assert partition([3] * 8, [3] * 8, [1, 1]) == [0, 4]
    assert partition([4] * 7, [3] * 7, [1, 1]) == [0, 3]


def test_more_devices_than_layers():
    with pytest.raises(ValueError, match="cannot cut 2 layers into 3 blocks; expected at most 2"):
        partition([1, 1], [1, 1], [1, 1, 1])


def test_a_thousand_blocks():
    assert partition([1.0] * 2048, [1.0] * 2048, [1.0] * 1024) == list(range(0, 2048, 2))
