import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockprop.data import Examples
from blockprop.data.holdout import hold_out


@settings(deadline=None, derandomize=True)
@given(n=st.integers(1, 100), validation=st.floats(0, 1, exclude_max=True))
def test_the_parts_are_disjoint_and_cover_all(n, validation):
    train, held = hold_out(Examples(torch.arange(n), torch.arange(n)), validation)
    assert sorted([*train.inputs.tolist(), *held.inputs.tolist()]) == list(range(n))
    assert len(held) == min(round(validation * n), n - 1)


def test_the_split_does_not_depend_on_the_global_seed():
    examples = Examples(torch.arange(100), torch.arange(100))
    torch.manual_seed(1)
    first = hold_out(examples, 0.2)
    torch.manual_seed(2)
    second = hold_out(examples, 0.2)
    assert torch.equal(first[1].inputs, second[1].inputs)


@pytest.mark.parametrize("validation", [-0.1, 1, 1.5, float("nan")])
def test_a_fraction_out_of_range_is_refused(validation):
    with pytest.raises(ValueError, match=r"in \[0, 1\)"):
        hold_out(Examples(torch.zeros(3), torch.zeros(3)), validation)
