"""What lies at a process until it is taken."""

import torch

from blockprop.runtime.edge import Post
from blockprop.runtime.message import Message


def test_a_checkpoint_has_what_training_sent_and_nothing_else():
    post = Post()
    for kind in ("mark from below", "output", "share", "feedback", "evaluate"):
        post.put("edge", Message(kind, 3, [torch.ones(2)]))
    assert sorted(message.kind for message in post.left()) == ["feedback", "output"]
    assert post.take("output", 3).values[0].tolist() == [1, 1]
