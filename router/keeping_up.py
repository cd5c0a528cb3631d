"""Whether this process passes on what workers send as fast as it comes.

vLLM's front end turns all of a request's tokens that are there into one event for its client. So a
router that is behind wants several steps at a time, and tells each worker when it has passed on
what that one sent last (cluster/outgoing.py). One that keeps up says nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

BEHIND_S = 0.002
"""Takes the loop longer than that to pass outputs on, it is behind."""
TURNS = 5
"""Of the loop, until clients have been sent what the front end was given."""


class KeepingUp:
    """With one worker. `tell` is called on the event loop with the number of the last batch that
    was passed on, and with whether more are to be gathered."""

    def __init__(
        self, tell: Callable[[int, bool], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._tell = tell
        self._clock = clock
        self._behind = False

    def on_batch(self, number: int) -> None:
        """The front end has been given what is in it."""
        self._turn(number, self._clock(), TURNS)

    def _turn(self, number: int, since_s: float, turns: int) -> None:
        if turns:
            asyncio.get_running_loop().call_soon(self._turn, number, since_s, turns - 1)
            return
        was_behind, self._behind = self._behind, self._clock() - since_s > BEHIND_S
        if was_behind or self._behind:
            self._tell(number, self._behind)
