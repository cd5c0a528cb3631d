"""Numbered messages: twins are ignored, gaps are found."""

from __future__ import annotations

import pytest

from cluster.arrivals import Arrivals, MessageLost


def test_messages_in_order_are_new() -> None:
    arrivals = Arrivals()
    assert all(arrivals.is_new(number) for number in range(1, 5))


@pytest.mark.parametrize("twin", [1, 2, 3])
def test_a_message_that_came_already_is_not_new(twin: int) -> None:
    arrivals = Arrivals(last=3)
    assert not arrivals.is_new(twin)
    assert arrivals.is_new(4)


@pytest.mark.parametrize("number", [5, 0])
def test_a_gap_ends_the_stream(number: int) -> None:
    with pytest.raises(MessageLost, match=f"message {number} came after message 3"):
        Arrivals(last=3).is_new(number)
