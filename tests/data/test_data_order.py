import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockprop.data import batch_generator, batches


@settings(deadline=None, derandomize=True)
@given(n=st.integers(0, 200), batch_size=st.integers(1, 70), seed=st.integers(-5, 2**63), epoch=st.integers(0, 9))
def test_every_example_comes_once_in_full_batches_but_the_last(n, batch_size, seed, epoch):
    ids = list(batches(n, batch_size, seed=seed, epoch=epoch))
    assert sorted(int(i) for batch in ids for i in batch) == list(range(n))
    assert all(len(batch) == batch_size for batch in ids[:-1])
    assert len(ids) == -(-n // batch_size)


def test_the_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch, batch_size=10):
        torch.rand(1)  # the global generator plays no part
        return torch.cat(list(batches(50, batch_size, seed=seed, epoch=epoch)))

    assert torch.equal(order(1, 2), order(1, 2, batch_size=7))
    assert not torch.equal(order(1, 2), order(1, 3))
    assert not torch.equal(order(1, 2), order(2, 2))
    assert not torch.equal(order(1, 2), order(2, 1))


def test_batch_generators_differ_in_each_part_of_their_key():
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (11, 1, 0), (1, 11, 0)]
    draws = {tuple(torch.rand(3, generator=batch_generator(*key)).tolist()) for key in keys}
    assert len(draws) == len(keys)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_size_below_one_is_refused_at_once(batch_size):
    with pytest.raises(ValueError, match=f"batch_size is {batch_size}; it must be at least 1"):
        batches(5, batch_size, seed=0, epoch=0)


def test_a_negative_number_of_examples_is_refused():
    with pytest.raises(ValueError, match="must not be negative"):
        batches(-1, 2, seed=0, epoch=0)
