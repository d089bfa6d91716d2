"""Bytes that are held beside weights, gradients and optimizer state."""

from blockprop.held import Held


def test_the_most_is_the_most_of_each():
    assert Held(1, 5, 0).most(Held(3, 2, 4)) == Held(3, 5, 4)
    assert Held(1, 5, 0) + Held(3, 2, 4) == Held(4, 7, 4)
