"""What lies at a process until it is taken."""

import itertools
import threading
import time

import pytest
import torch
from meeting import together

from blockprop.runtime import LostError, Neighbours, Place
from blockprop.runtime import edge as edges
from blockprop.runtime.edge import Post
from blockprop.runtime.message import Message


def test_a_checkpoint_has_what_training_sent_and_nothing_else():
    post = Post()
    for kind in ("mark from below", "output", "share", "feedback", "evaluate"):
        post.put("edge", Message(kind, 3, [torch.ones(2)]))
    assert sorted(message.kind for message in post.left()) == ["feedback", "output"]
    assert post.take("output", 3).values[0].tolist() == [1, 1]


def test_the_post_holds_no_more_than_its_capacity():
    post = Post(capacity=2)
    put = []

    def deliver():
        for number in range(4):
            post.put("edge", Message("output", number))
            put.append(number)

    thread = threading.Thread(target=deliver)
    thread.start()
    for number in range(4):
        assert post.take("output", number).number == number
        assert len(put) <= number + 3
        assert len(post.left()) <= 2
    thread.join(10)
    assert put == [0, 1, 2, 3]


def test_what_had_come_before_a_neighbour_parted_is_taken_and_no_more_waited_for():
    post = Post()
    post.put("edge", Message("output", 0))
    post.part(["output"], "it has ended")
    post.wait("output", "feedback")
    post.take("output", 0)
    for wait in (lambda: post.take("output", 1), lambda: post.wait("output", "feedback")):
        with pytest.raises(LostError, match="it has ended"):
            wait()


@pytest.mark.parametrize("early", [0, 1])
def test_a_neighbour_that_ends_early_is_not_waited_for(early):
    def work(rank, rendezvous):
        neighbours = Neighbours(Place.of_rank(rank, 2), rendezvous)
        if rank != early:
            kind = "feedback" if rank == 0 else "output"
            with pytest.raises(LostError, match="the neighbour has ended; expected as many steps"):
                neighbours.post.take(kind, 0)
        neighbours.close()

    together(2, work)


def test_a_message_of_an_unknown_dtype_ends_the_run():
    def work(rank, rendezvous):
        neighbours = Neighbours(Place.of_rank(rank, 2), rendezvous)
        if rank == 0:
            neighbours.above.send(Message("output", 0, [torch.ones(2, dtype=torch.int16)]))
            with pytest.raises(LostError, match="a tensor of torch.int16"):
                neighbours.post.take("feedback", 0)

    together(2, work)


def test_what_is_left_is_sent_as_long_as_messages_go(monkeypatch):
    """Eight that take longer together than the patience with one."""
    pack = edges.pack

    def slowly(*args):
        time.sleep(0.15)
        return pack(*args)

    monkeypatch.setattr(edges, "pack", slowly)

    def work(rank, rendezvous):
        neighbours = Neighbours(Place.of_rank(rank, 2), rendezvous)
        if rank == 0:
            for number in range(8):
                neighbours.above.send(Message("output", number, [torch.ones(2)]))
            neighbours.above.close(timeout=0.4)
            return neighbours.above.sent_messages  # a process may end now, and with it whatever sends
        return sum(neighbours.post.take("output", number).number == number for number in range(8))

    assert together(2, work) == [8, 8]


@pytest.mark.parametrize("order", [1, -1])
def test_messages_of_many_lengths_are_waited_for_at_a_few(order, monkeypatch):
    """Those that creep up too: calls that wait keep their memory."""
    rooms = []

    class Counted(edges._Ahead):
        def __init__(self, group, peer, tag, room):
            super().__init__(group, peer, tag, room)
            rooms.append((tag, room))

    monkeypatch.setattr(edges, "_Ahead", Counted)
    sizes = [*range(1, 4000, 90)][::order]

    def work(rank, rendezvous):
        neighbours = Neighbours(Place.of_rank(rank, 2), rendezvous)
        if rank == 0:
            for number, size in enumerate(sizes):
                neighbours.above.send(Message("output", number, [torch.full((size, 3), float(number))]))
        else:
            for number, size in enumerate(sizes):
                [value] = neighbours.post.take("output", number).values
                assert torch.equal(value, torch.full((size, 3), float(number)))
        neighbours.close()

    together(2, work)
    down, *up = sorted(rooms)[0], *sorted(rooms)[1:]
    assert down == up[0] == (0, edges.ROOM)  # nothing long came down
    assert [tag for tag, _ in up] == list(range(len(up)))
    assert up[-1][1] < 1.5 * 12 * 4000
    if order == -1:
        assert len(up) == 2
    else:
        assert all(later >= 1.5 * earlier - 1 for (_, earlier), (_, later) in itertools.pairwise(up))


@pytest.mark.parametrize("room", [0, 1, 4097, 2**31 - 1, 2**31, 5 * 2**33 + 7])
def test_a_word_is_no_message(room):
    assert edges._worded(edges._word(room)) == room
    assert edges._worded(edges.pack(Message("output", 0))) is None
