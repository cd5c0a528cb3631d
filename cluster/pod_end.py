"""Has the workers of a pod drain before it ends: the chart's preStop hook, before `ray stop`.

    python -m cluster.pod_end SECONDS_MAX

`ray stop` alone would leave a worker a few seconds: a third of its own grace period. This sends
SIGTERM to each worker here, which drains then, and waits for them to end.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

from cluster.ray_calls import WORKER_ACTOR

WORKER_TITLE = "ray::" + WORKER_ACTOR.partition(":")[2]
"""What Ray calls the process of such an actor; after it may come the method that runs."""
POLL_S = 0.1


def processes_titled(title: str) -> set[int]:
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            # A process may end meanwhile. One that has ended has no title.
            with contextlib.suppress(OSError):
                shown = (entry / "cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
                if shown.partition(".")[0] == title:
                    found.add(int(entry.name))
    return found


def drain(title: str, within_s: float) -> None:
    deadline = time.monotonic() + within_s
    first = running = processes_titled(title)
    told: set[int] = set()
    while first & running and time.monotonic() < deadline:
        # Ray still has this node, so others may be started in the place of those that have ended.
        for pid in running - told:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        told |= running
        time.sleep(POLL_S)
        running = processes_titled(title)


if __name__ == "__main__":
    drain(WORKER_TITLE, float(sys.argv[1]))
