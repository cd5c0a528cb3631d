"""Numbers on a stream's messages. gRPC promises that none is lost, repeated or overtaken while a
stream lasts; with numbers, whoever relies on that finds out where it is broken."""

from __future__ import annotations

from dataclasses import dataclass


class MessageLost(Exception):
    """A message came before one that was sent before it: the stream is to be given up."""


@dataclass(slots=True)
class Arrivals:
    """The receiving end of one direction of a stream, whose messages are numbered from 1."""

    last: int = 0

    def is_new(self, number: int) -> bool:
        """False for a message that has come already.

        Raises:
            MessageLost
        """
        if number > self.last + 1 or number < 1:
            raise MessageLost(f"message {number} came after message {self.last}")
        if number <= self.last:
            return False
        self.last = number
        return True
