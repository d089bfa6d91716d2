import pytest

from blockprop.running import RunningMean


def test_the_first_values_weigh_alike_then_the_latest_most():
    mean = RunningMean(0.75)
    found = [mean.add(3, value) for value in (8.0, 0.0, 4.0, 4.0, 0.0)]
    assert found == pytest.approx([8, 4, 4, 4, 3])
    assert mean.at(3) == found[-1]
    assert mean.at(2) == 0


def test_a_mean_is_continued():
    mean, other = RunningMean(), RunningMean()
    for value in (1.0, 5.0, 2.0):
        mean.add(0, value)
    other.load_state_dict(mean.state_dict())
    assert mean.add(0, 7.0) == other.add(0, 7.0)
    other.load_state_dict({"values": {0: 1.0}})  # of a checkpoint without counts: long in use
    assert other.add(0, 2.0) == pytest.approx(0.9 * 1 + 0.1 * 2)


@pytest.mark.parametrize("memory", [-0.1, 1.0])
def test_a_memory_out_of_its_range_is_refused(memory):
    with pytest.raises(ValueError, match="memory is"):
        RunningMean(memory)
