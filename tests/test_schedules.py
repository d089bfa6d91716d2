"""Schedules are data: literal lists, and properties of every schedule."""

import itertools
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockprop.schedules import Action, Latency, delays, draw, parallel, pipelined, sequential


def first(ticks, count):
    return list(itertools.islice(ticks, count))


def words(tick):
    return " ".join(f"{kind[0]}{block}.{batch}" for block, kind, batch in tick)


def test_sequential_is_algorithm_1():
    assert first(sequential(3), 6) == [
        (Action(1, "forward", 0),),
        (Action(2, "forward", 0),),
        (Action(3, "forward", 0),),
        (Action(3, "backward", 0),),
        (Action(2, "backward", 0),),
        (
            Action(1, "backward", 0),
            Action(1, "update", 0),
            Action(2, "update", 0),
            Action(3, "update", 0),
        ),
    ]
    assert first(sequential(3), 7)[6] == (Action(1, "forward", 1),)


def test_parallel_is_algorithm_2():
    assert [words(tick) for tick in first(parallel(2), 2)] == [
        "f1.0 b1.0 u1.0 f2.0 b2.0 u2.0",
        "f1.1 b1.1 u1.1 f2.1 b2.1 u2.1",
    ]


def test_pipelined_tick_by_tick():
    assert [words(tick) for tick in first(pipelined(3), 6)] == [
        "f1.0",
        "f1.1 f2.0",
        "f1.2 f2.1 f3.0 b3.0 u3.0",
        "f1.3 b2.0 u2.0 f2.2 f3.1 b3.1 u3.1",
        "b1.0 u1.0 f1.4 b2.1 u2.1 f2.3 f3.2 b3.2 u3.2",
        "b1.1 u1.1 f1.5 b2.2 u2.2 f2.4 f3.3 b3.3 u3.3",
    ]


def test_pipelined_in_two_microbatches_updates_every_second_time():
    assert [words(tick) for tick in first(pipelined(2, microbatches=2), 5)] == [
        "f1.0",
        "f1.1 f2.0 b2.0",
        "f1.2 b1.0 f2.1 b2.1 u2.1",
        "b1.1 u1.1 f1.3 f2.2 b2.2",
        "f1.4 b1.2 f2.3 b2.3 u2.3",
    ]


def test_a_block_learns_from_what_is_quiet_before_it_forwards_the_next():
    schedule = pipelined(2, microbatches=2, quiet=lambda number: number in (2, 3))
    assert [words(tick) for tick in first(schedule, 6)] == [
        "f1.0",
        "f1.1 f2.0 b2.0",
        "f1.2 b1.0 f2.1 b2.1 u2.1",
        "b1.2 u1.2 f1.3 b1.1 f2.2 b2.2",
        "b1.3 u1.3 f1.4 f2.3 b2.3 u2.3",
        "f1.5 f2.4 b2.4",
    ]


def test_one_block_is_plain_training():
    assert [words(tick) for tick in first(pipelined(1), 2)] == ["f1.0 b1.0 u1.0", "f1.1 b1.1 u1.1"]


@pytest.mark.parametrize("blocks", [2, 3, 8])
def test_the_delay_is_a_function_of_k(blocks):
    found = delays(pipelined(blocks), blocks, 60)
    assert [delay[-1] for delay in found] == [max(0, 2 * (blocks - k) - 1) for k in range(1, blocks + 1)]


@pytest.mark.parametrize("make", [sequential, parallel])
def test_synchronous_schedules_have_no_delay(make):
    assert all(set(delay) == {0} for delay in delays(make(3), 3, 30))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    blocks=st.integers(1, 6),
    microbatches=st.integers(1, 4),
    longest=st.integers(0, 12),
    lost=st.sampled_from([0.0, 0.05, 0.5]),
    seed=st.integers(0, 9),
    copies=st.integers(1, 3),
)
def test_every_pipelined_schedule_is_consistent(blocks, microbatches, longest, lost, seed, copies):
    """Messages arrive after they were sent, nothing is done twice, and what is lost is dropped by all below."""
    latency = Latency(longest, lost, seed, copies)
    when = {}
    for now, tick in enumerate(first(pipelined(blocks, microbatches=microbatches, latency=latency), 150)):
        for action in tick:
            assert action not in when
            when[action] = now
        for k in range(1, blocks + 1):
            assert sum(a.block == k and a.kind == "forward" for a in tick) <= 1
            assert sum(a.block == k and a.kind == "backward" for a in tick) <= 1
            own = "".join(a.kind[0] for a in tick if a.block == k)
            assert "bf" not in own and (k == blocks or "fbu" not in own)  # last where an update is due, else first
    for (k, kind, batch), now in when.items():
        if kind == "forward" and k > 1:
            assert when[Action(k - 1, "forward", batch)] < now
        if kind == "backward":
            assert when[Action(k, "forward", batch)] <= now
            if k < blocks:
                assert when[Action(k + 1, "backward", batch)] < now
                assert Action(k, "drop", batch) not in when
        if kind == "drop" and k > 1:
            assert Action(k - 1, "drop", batch) in when
    if not longest and copies == 1:
        assert sum(kind == "forward" and k == 1 for k, kind, _ in when) == 150
    if not lost:
        assert not any(kind == "drop" for _, kind, _ in when)
    for k in range(1, blocks + 1):
        backwards = sum(a.block == k and a.kind == "backward" for a in when)
        drops = sum(a.block == k and a.kind == "drop" for a in when)
        updates = sum(a.block == k and a.kind == "update" for a in when)
        assert updates == (backwards + drops) // microbatches


def test_what_is_lost_counts_for_the_next_update():
    kinds = {1: [], 2: []}
    for tick in first(pipelined(2, microbatches=4, latency=Latency(0, 0.3, 1, copies=1)), 80):
        for k, kind, _ in tick:
            if kind != "forward":
                kinds[k].append(kind)
    due = updates = 0
    for before, kind in itertools.pairwise(kinds[1]):
        due += before != "update"
        if kind == "update":
            updates += 1
            assert due == 4 * updates
    assert "drop" in kinds[1]
    assert updates == 19 == kinds[2].count("update")


def test_feedback_that_is_sent_twice_is_lost_with_both_messages():
    """Of independent messages that is the square of the share; what comes with the second is a tick later."""
    ticks = 20_000
    shares, ages = [], []
    for copies in (1, 2):
        kinds, forwarded, late = [], {}, []
        for now, tick in enumerate(first(pipelined(2, latency=Latency(0, 0.2, 1, copies)), ticks)):
            for k, kind, batch in tick:
                if (k, kind) == (1, "forward"):
                    forwarded[batch] = now
                elif (k, kind) == (1, "backward"):
                    late.append(now - forwarded[batch])
                kinds.append((k, kind))
        shares.append(kinds.count((1, "drop")) / len(forwarded))
        ages.append((min(late), max(late)))
        assert kinds.count((1, "backward")) + kinds.count((1, "drop")) >= len(forwarded) - 4
    assert shares == pytest.approx([0.2, 0.04], abs=0.01)
    assert ages == [(2, 2), (2, 3)]


@pytest.mark.parametrize("longest", [1, 3, 6])
def test_the_first_block_holds_back_what_would_only_wait(longest):
    """No more is on its way than there are ticks until feedback, on average; so what is on its way is no older."""
    blocks, on_way, most, forwards, late = 4, {}, 0, 0, []
    for now, tick in enumerate(first(pipelined(blocks, latency=Latency(longest, seed=2)), 3000)):
        for k, kind, batch in tick:
            if (k, kind) == (1, "forward"):
                on_way[batch] = now
                most, forwards = max(most, len(on_way)), forwards + 1
            elif (k, kind) == (1, "backward"):
                late.append(now - on_way.pop(batch))
    round_trip = 2 * (blocks - 1) * (1 + longest / 2)
    assert most == round_trip
    assert sum(late) / len(late) == pytest.approx(round_trip * 3000 / forwards, rel=0.02)  # Little's law
    assert 0.75 < forwards / 3000 < 0.95


def test_the_same_seed_draws_the_same_schedule():
    def make(seed):
        return first(pipelined(4, latency=Latency(6, 0.1, seed)), 80)

    assert make(1) == make(1)
    assert make(1) != make(2)


def test_a_dropped_batch_may_still_wait_for_its_forward_below_nothing():
    """A batch is dropped only where it was forwarded: feedback comes after all forwards."""
    forwarded = set()
    for tick in first(pipelined(4, latency=Latency(5, 0.3, 3)), 200):
        for k, kind, batch in tick:
            if kind == "forward":
                forwarded.add((k, batch))
            if kind == "drop":
                assert (k, batch) in forwarded


def test_the_drawing_has_a_row_a_block():
    lines = draw(pipelined(4, latency=Latency(2, 0.2, 1)), 4, 12).splitlines()
    assert [line.split(" |")[0] for line in lines] == ["block 4", "block 3", "block 2", "block 1"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: next(pipelined(0)), "blocks is 0"),
        (lambda: next(sequential(True)), "blocks is True"),
        (lambda: next(parallel(-1)), "blocks is -1"),
        (lambda: next(pipelined(2, microbatches=0)), "microbatches is 0"),
        (lambda: Latency(-1), "longest delay is -1"),
        (lambda: Latency(2, chances=(1, 1)), "chances of the delays are 1, 1; expected 3 numbers"),
        (lambda: Latency(1, chances=(0, 0)), "not all of them 0"),
        (lambda: Latency(1, chances=(1, -1)), "of at least 0"),
        (lambda: Latency(lost=1.0), "share of lost messages is 1.0"),
        (lambda: Latency(lost=0.1, copies=0), "copies of the feedback are 0"),
    ],
)
def test_bad_arguments(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


def test_delays_that_are_certain_are_those_of_a_schedule_by_hand():
    """Every message takes two ticks: the second block is a tick later, the first has four on their way."""
    ticks = first(pipelined(2, latency=Latency(1, chances=(0, 1))), 6)
    assert ticks == [
        (Action(1, "forward", 0),),
        (Action(1, "forward", 1),),
        (Action(1, "forward", 2), Action(2, "forward", 0), Action(2, "backward", 0), Action(2, "update", 0)),
        (Action(1, "forward", 3), Action(2, "forward", 1), Action(2, "backward", 1), Action(2, "update", 1)),
        (
            Action(1, "backward", 0),
            Action(1, "update", 0),
            Action(1, "forward", 4),
            Action(2, "forward", 2),
            Action(2, "backward", 2),
            Action(2, "update", 2),
        ),
        (
            Action(1, "backward", 1),
            Action(1, "update", 1),
            Action(1, "forward", 5),
            Action(2, "forward", 3),
            Action(2, "backward", 3),
            Action(2, "update", 3),
        ),
    ]


def test_delays_are_drawn_by_their_chances():
    latency, source = Latency(4, chances=(6, 0, 1, 0, 3)), random.Random(0)
    drawn = Counter(latency.drawn(source) for _ in range(5000))
    assert set(drawn) == {0, 2, 4}
    assert [drawn[delay] / 5000 for delay in (0, 2, 4)] == pytest.approx([0.6, 0.1, 0.3], abs=0.02)
    assert latency.mean == pytest.approx(0.2 + 1.2)
    assert Latency(4).mean == 2
