"""What another machine's monotonic clock tells, by this one's."""

from __future__ import annotations

import math

DRIFT = 1e-4
"""More than two clocks go apart."""


class OtherClock:
    """A message that says when it was sent was under way at least as long as the fastest one: the
    others' delays are not the clocks' difference."""

    def __init__(self) -> None:
        self._shift_s = math.inf
        self._heard_at_s = 0.0
        self._latest_s = -math.inf

    def here_s(self, there_s: float, now_s: float) -> float:
        """When that was, by this machine's clock. Never before what was asked before."""
        faster_s = self._shift_s + DRIFT * (now_s - self._heard_at_s)
        self._shift_s, self._heard_at_s = min(faster_s, now_s - there_s), now_s
        self._latest_s = max(self._latest_s, there_s + self._shift_s)
        return self._latest_s
