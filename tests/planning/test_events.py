"""The simulation, on cases that are counted by hand."""

import itertools

import pytest

from blockprop.planning.cluster import Cluster, Link
from blockprop.planning.events import Message, Ordered, Step, Task, simulate

FAST = Link(1e9)


def repeated(needs, task):
    return (Step(tuple((tag, n) for tag in needs), task(n)) for n in range(100))


def test_messages_share_a_link_and_travel_together():
    """1 Mbit each at 1 Mbit/s: a second on the link, one after the other, and half a second on the way."""

    def sender(n):
        return Task(0.1, (Message(1, ("a", n), 125_000), Message(1, ("b", n), 125_000)), True)

    first = Ordered(repeated((), sender))
    second = Ordered(repeated(("a", "b"), lambda n: Task(0.25, (), True)))
    run = simulate([first, second], Cluster((1.0, 1.0), Link(1, latency=500)), 4)
    assert run.ends[1] == pytest.approx([2.85, 4.85, 6.85, 8.85])
    assert run.rate() == pytest.approx(0.5)
    assert run.busy() == pytest.approx([0.05, 0.125])


def test_overhead_keeps_the_link_and_latency_does_not():
    link = Link(8, latency=10, overhead=5)
    assert link.occupied(1_000_000) == pytest.approx(1.005)
    assert link.seconds(1_000_000) == pytest.approx(1.015)


def test_a_message_that_meets_another_one_has_the_share_that_is_left():
    """1 MB, 1 s alone. One goes up at 4 s; at 4.5 s one goes down, and takes 2 s. Those that follow meet none."""
    link = Link(8, duplex=0.5)
    assert link.occupied(1_000_000, both=True) == 2 * link.occupied(1_000_000) == pytest.approx(2)

    def lower():
        for n in itertools.count():
            yield Step((), Task(4.0, (Message(1, ("up", n), 1e6),)))
            yield Step((("down", n),), Task(0.0, (), True))

    upper = repeated((), lambda n: Task(4.5 if n == 0 else 4.0, (Message(0, ("down", n), 1e6),), True))
    run = simulate([Ordered(lower()), Ordered(upper)], Cluster((1.0, 1.0), link), 4)
    assert run.ends[0] == pytest.approx([6.5, 10.5, 14.5, 18.5])


def test_a_message_takes_the_device_at_either_end_as_well():
    """2 MB, 100 ms and 10 ms for each: 1.12 s a batch of 1 s. Below it is in the task, above in the next one."""
    link = Link(1e9, handling=100, copying=10)
    for speed in (1.0, 0.5):
        first = Ordered(repeated((), lambda n: Task(1.0, (Message(1, ("a", n), 2e6), Message(0, "own", 1e9)), True)))
        second = Ordered(repeated(("a",), lambda n: Task(0.5, (), True)))
        run = simulate([first, second], Cluster((speed, 1.0), link), 4)
        lower = [n * 1.12 / speed for n in range(1, 5)]
        assert run.ends[0] == pytest.approx(lower)
        assert run.ends[1] == pytest.approx([end + 0.62 for end in lower], abs=1e-3)


def test_a_device_of_twice_the_speed_takes_half_the_time():
    programs = [Ordered(repeated((), lambda n: Task(3.0, (), True))) for _ in range(2)]
    run = simulate(programs, Cluster((1.0, 2.0), FAST), 4)
    assert run.ends[0] == [3.0, 6.0, 9.0, 12.0]
    assert run.ends[1] == [1.5, 3.0, 4.5, 6.0]


def test_contention_slows_what_begins_beside_another_device():
    programs = [Ordered(repeated((), lambda n: Task(1.0, (), True))) for _ in range(2)]
    run = simulate(programs, Cluster((1.0, 1.0), FAST, contention=1.5), 4)
    assert run.ends[1] == [1.5, 3.0, 4.5, 6.0]
    alone = simulate([Ordered(repeated((), lambda n: Task(1.0, (), True)))], Cluster((1.0,), FAST, 1.5), 4)
    assert alone.ends[0] == [1.0, 2.0, 3.0, 4.0]


def test_a_rate_needs_batches():
    with pytest.raises(ValueError, match="cannot take a rate from 3 batches; expected at least 4"):
        simulate([], Cluster((1.0,), FAST), 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Link(0), "bandwidth is 0; expected Mbit/s, a finite number above 0"),
        (lambda: Link(float("nan")), "bandwidth is nan"),
        (lambda: Link(1, latency=-1), "latency is -1; expected ms"),
        (lambda: Link(1, overhead=float("inf")), "overhead is inf; expected ms"),
        (lambda: Link(1, handling=-1), "handling is -1; expected ms"),
        (lambda: Link(1, copying=-1), "copying is -1; expected ms"),
        (lambda: Link(1, duplex=0), "duplex is 0; expected a share of the bandwidth, above 0 and at most 1"),
        (lambda: Link(1, duplex=1.5), "duplex is 1.5; expected a share"),
        (lambda: Cluster((), FAST), "there is no device"),
        (lambda: Cluster((1.0, 0.0), FAST), "speed is 0.0; expected a finite number above 0"),
        (lambda: Cluster((1.0,), FAST, 0.5), "contention is 0.5; expected a finite number of at least 1"),
    ],
)
def test_bad_clusters(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_what_is_asked_for_takes_the_way_of_the_question_as_well():
    """Ready at 1 s and asked for before: there at 1.5 s. Asked for at 4.5 s, when the one before is done: at 5.5 s."""

    def sends(n):
        return Task(1.0, (Message(1, ("a", n), 0.0, asked=True),), True)

    first = Ordered(repeated((), sends))
    second = Ordered(repeated(("a",), lambda n: Task(3.0, (), True)))
    run = simulate([first, second], Cluster((1.0, 1.0), Link(1, latency=500)), 4)
    assert run.ends[1] == pytest.approx([4.5, 8.5, 12.5, 16.5])


def test_a_question_waits_behind_messages_of_the_one_who_asks():
    """The second device sends 1 Mbit at 1 Mbit/s when it asks: the first one hears a second and a latency later."""

    def asks(n):
        return Task(1.0, (Message(0, ("b", n), 125_000),), True)

    first = Ordered(repeated((), lambda n: Task(0.0, (Message(1, ("a", n), 0.0, asked=True),), True)))
    second = Ordered(repeated(("a",), asks))
    run = simulate([first, second], Cluster((1.0, 1.0), Link(1, latency=500)), 4)
    # the first one is asked for at 0 s, on an idle link; the others a second later than their turn
    assert run.ends[1] == pytest.approx([2.0, 5.0, 8.0, 11.0])


def test_what_a_task_asks_for_when_it_begins_is_there_sooner():
    first = Ordered(repeated((), lambda n: Task(0.0, (Message(1, ("a", n), 0.0, asked=True),), True)))
    second = Ordered(repeated(("a",), lambda n: Task(3.0, (), True, asks=(("a", n + 1),))))
    run = simulate([first, second], Cluster((1.0, 1.0), Link(1, latency=500)), 4)
    assert run.ends[1] == pytest.approx([4.0, 7.0, 10.0, 13.0])
