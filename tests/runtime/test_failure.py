"""Signs of life, on a store that a test can hold up."""

import math
import threading
import time

import pytest
from meeting import together

from blockprop.runtime import Neighbours, Place, failure


class Store:
    """A rendezvous in memory.

    Args:
        neighbour: what the next process says, one after the other; the last again and again.
        hiccups: calls that fail.
        frozen: whether no call returns.
    """

    def __init__(self, neighbour=(None,), hiccups=0, silence=math.inf, frozen=False):
        self.said, self.hiccups, self.silence, self.frozen = list(neighbour), hiccups, silence, frozen
        self.written, self.failed = [], {}

    def read(self, key):
        assert key == "alive/block-2"
        if self.frozen:
            time.sleep(60)
        if self.hiccups:
            self.hiccups -= 1
            raise RuntimeError("timed out")
        return self.said.pop(0) if len(self.said) > 1 else self.said[0]

    def write(self, key, value):
        assert key == "alive/block-1"
        self.written.append(value)

    def fail(self, where, why):
        self.failed = self.failed or {"where": where, "why": why}

    know = fail

    def failure(self):
        return self.failed or None

    def again(self):
        return self


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    monkeypatch.setattr(failure, "BEAT", 0.01)
    monkeypatch.setattr(failure, "SILENCE", 0.1)


def watched(store, seconds=0.6):
    """What `watch` returned, and whether what waits was told; training takes so many seconds."""
    finished, lost = threading.Event(), []
    timer = threading.Timer(seconds, finished.set)
    timer.start()
    found = failure.watch(store, Place(1, 2), finished, lost.append)
    timer.cancel()
    finished.set()
    return found, bool(lost)


def test_a_neighbour_that_says_the_same_for_ever_is_lost():
    found, told = watched(Store([None, 0, 1, 2, 2]))
    assert found == {
        "where": "block-2",
        "why": "it has given no sign of life for 0.1 seconds: frozen, or its machine is gone",
    }
    assert told


@pytest.mark.parametrize("said", [[None], ["done"], [*range(10**5)]], ids=["not yet", "no more", "alive"])
def test_a_neighbour_that_has_not_begun_or_has_ended_is_not(said):
    store = Store(said)
    assert watched(store) == (None, False)
    assert store.written[-1] == "done"


@pytest.mark.parametrize("deaf", [True, False])
def test_a_process_that_does_not_hear_of_a_failure_is_ended(deaf):
    store, finished, lost, ended = Store(), threading.Event(), threading.Event(), []

    def lose(_why):
        lost.set()
        if not deaf:
            finished.set()

    guarding = failure.guard(store, Place(1, 2), finished, lose, patience=0.1, end=ended.append)
    assert not lost.wait(0.1)  # all is well
    store.fail("block-2", "no memory")
    guarding.join(10)
    assert lost.is_set()
    assert ended == (["stopped, since block-2 failed: no memory"] if deaf else [])


def test_a_store_that_does_not_answer_is_lost():
    found, told = watched(Store(frozen=True, silence=0.2))
    assert found["where"] == "store"
    assert told
    assert watched(Store(frozen=True)) == (None, False)  # where it is known otherwise


def test_a_store_that_fails_now_and_then_is_not():
    store = Store([*range(10**5)], hiccups=3, silence=0.2)
    assert watched(store) == (None, False)
    assert store.written[-2] > 10


def test_who_has_parted_is_not_waited_for():
    parted = [threading.Event(), threading.Event()]

    def work(rank, rendezvous):
        Neighbours(Place.of_rank(rank, 2), rendezvous, parted=parted[rank]).close()
        return parted[rank].is_set()

    assert together(2, work) == [True, True]
