"""What lies at a process until it is taken."""

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


def test_of_many_lengths_the_first_alone_have_calls_ahead(monkeypatch):
    made = []

    class Counted(edges._Ahead):
        def __init__(self, *args, **more):
            super().__init__(*args, **more)
            if args[2] != edges._HEAD and more.get("count") != 1:
                made.append(args[3])

    monkeypatch.setattr(edges, "_Ahead", Counted)
    monkeypatch.setattr(edges, "LENGTHS", 2)
    sizes = [*range(1, 500, 90)] * 2

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
    assert len(made) == len(set(made)) == 2
