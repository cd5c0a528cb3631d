"""A worker's health is what it does: an engine that does nothing while requests wait is stuck.

Looked at from the event loop, for the engine's own thread is what hangs. A process that hangs as a
whole writes its lease no more.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from workers.engine import EngineHost
from workers.server import WorkerService

LOOK_EVERY_S = 0.5
FIRST_STEP_S = 300.0
"""Before it has run a model once, an engine may compile for that long."""


@dataclass(slots=True)
class Watchdog:
    stuck_after_s: float
    _turns: int = -1
    _looked_at_s: float = 0.0
    _stalled_s: float = 0.0

    def look(self, now_s: float, requests: int, turns: int, steps: int) -> str:
        """Returns why the engine is stuck; empty while it is not."""
        # Only what was looked at counts: a process that was frozen has lost time, no turns.
        passed_s = min(now_s - self._looked_at_s, 2 * LOOK_EVERY_S)
        self._looked_at_s = now_s
        if not requests or turns != self._turns:
            self._turns, self._stalled_s = turns, 0.0
            return ""
        self._stalled_s += passed_s
        limit_s = self.stuck_after_s if steps else max(self.stuck_after_s, FIRST_STEP_S)
        if self._stalled_s < limit_s:
            return ""
        return f"the engine is stuck: no step for {limit_s:g} s while {requests} requests wait"


async def until_stuck(service: WorkerService, engine: EngineHost, stuck_after_s: float) -> str:
    """Returns why, once the engine is stuck."""
    watchdog = Watchdog(stuck_after_s)
    while True:
        await asyncio.sleep(LOOK_EVERY_S)
        reason = watchdog.look(time.monotonic(), service.requests, engine.turns, engine.steps)
        if reason:
            return reason
