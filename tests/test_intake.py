"""Batches on their way through a pipeline, as microbatches."""

import pytest
import torch

from blockprop.cache import GluingCache
from blockprop.executors.intake import Intake
from blockprop.schedules import Action


def batch(examples, first=0):
    ids = torch.arange(first, first + examples)
    return ids.float().unsqueeze(1), ids % 10, ids


def numbers(intake):
    return [None if intake.empty(number) else intake[number].ids.tolist() for number in intake]


def test_a_batch_is_cut_into_microbatches_that_know_their_share():
    intake = Intake(3)
    assert intake.feed(*batch(7), counted=len) == 7
    assert numbers(intake) == [[0, 1, 2], [3, 4], [5, 6]]
    assert [intake[number].share for number in intake] == [3 / 7, 2 / 7, 2 / 7]
    assert [intake[number].total for number in intake] == [7, 7, 7]
    torch.testing.assert_close(intake[1].inputs, torch.tensor([[3.0], [4.0]]))


def test_a_whole_batch_has_no_total():
    intake = Intake()
    intake.feed(*batch(4), counted=len)
    assert intake[0].share == 1
    assert intake[0].total is None


def test_a_short_last_batch_has_fewer_parts_of_the_same_size_and_all_their_numbers():
    intake = Intake(4)
    intake.feed(*batch(8), counted=len)
    intake.feed(*batch(4, first=8), counted=len)
    assert numbers(intake)[4:] == [[8, 9], [10, 11], None, None]
    assert list(intake) == list(range(8))


def test_a_batch_is_over_when_all_its_examples_have_ended_in_any_order():
    intake = Intake(4)
    intake.feed(*batch(8), counted=len)
    intake.feed(*batch(4, first=8), counted=len)
    assert intake.fed == 8
    assert intake.over(0, {0, 1, 2, 3})
    assert not intake.over(0, {0, 1, 2})
    for number, over in ((1, False), (0, False), (3, False), (2, True), (5, False), (4, True)):
        intake.end(number)
        assert intake.over(number) is over


@pytest.mark.parametrize(("n", "M"), [(36, 7), (100, 22), (250, 30)])
def test_a_full_batch_has_all_its_parts(n, M):
    """Sizes at which n / (n / M) is less than M in floating point."""
    intake = Intake(M)
    intake.feed(*batch(n), counted=len)
    intake.feed(*batch(n), counted=len)
    assert len(intake) == 2 * M
    assert not any(intake.empty(number) for number in intake)


@pytest.mark.parametrize(("inputs", "labels"), [(True, False), (False, True), (False, False)])
def test_a_process_has_what_its_blocks_need(inputs, labels):
    x, y, ids = batch(4)
    intake = Intake(2)
    assert intake.feed(x if inputs else None, y if labels else None, ids, counted=len) == 4
    has = [(part.inputs is not None, part.labels is not None) for part in (intake[0], intake[1])]
    assert has == [(inputs, labels)] * 2
    assert intake[0].total == (4 if labels else None)


def test_the_schedule_waits_where_a_tick_begins_with_a_batch_that_has_not_come():
    intake = Intake(2)
    tick = (Action(2, "forward", 1), Action(1, "forward", 2))
    assert intake.asks(tick)
    intake.feed(*batch(4), counted=len)
    assert not intake.asks(tick[:1])
    assert intake.asks(tick)
    intake.feed(*batch(4), counted=len)
    assert not intake.asks(tick)


def test_after_the_pipeline_ran_empty_numbers_go_on_where_the_schedule_is():
    intake = Intake(2)
    intake.feed(*batch(4), counted=len)
    for number in range(5):  # three of them while it ran empty
        intake.past((Action(1, "forward", number),))
        intake.end(number)
    assert not intake
    intake.feed(*batch(4), counted=len)
    assert list(intake) == [6, 7]


def test_the_first_block_is_the_last_to_see_a_batch_and_the_last_block_one_without_feedback():
    intake = Intake(1, GluingCache(4), refresh=2)
    intake.feed(*batch(4))
    intake.feed(*batch(4))
    assert [intake.quiet(number) for number in range(3)] == [False, True, False]
    last = {(k, number) for k in (1, 2, 3) for number in (0, 1) if intake.last(Action(k, "backward", number), 3)}
    assert last == {(1, 0), (3, 1)}
    assert intake.last(Action(1, "drop", 0), 3)
    assert not intake.last(Action(2, "drop", 0), 3)
    assert not intake.last(Action(1, "forward", 0), 3)
    intake.end(0)
    assert list(intake) == [1]
    assert 0 not in intake


@pytest.mark.parametrize("cached", [False, True])
def test_a_checkpoint_has_all_of_it(cached):
    def made():
        return Intake(2, GluingCache(8), 2) if cached else Intake(2)

    intake = made()
    intake.feed(*batch(6), counted=len)
    intake.feed(*batch(2), counted=len)
    other = made()
    other.load_state_dict(intake.state_dict(), len)
    assert numbers(other) == numbers(intake)
    for each in (intake, other):
        each.feed(*batch(5), counted=len)
    assert numbers(other) == numbers(intake)
    assert [other.quiet(number) for number in other] == [intake.quiet(number) for number in intake]
    assert [other[4].share, other[4].total] == [intake[4].share, intake[4].total]


def test_a_checkpoint_of_earlier_has_no_totals():
    intake = Intake(2)
    intake.feed(*batch(6), counted=len)
    state = intake.state_dict()
    state["parts"] = [part[:-1] for part in state["parts"]]
    other = Intake(2)
    other.load_state_dict(state, len)
    assert other[0].total == 6
