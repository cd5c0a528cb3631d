"""How soon a lost worker is taken out, and how long a stream stands still for it.

    python -m tests.integration.detection [TIMES]

with real workers and the default lease, sixteen streams running. Needs root, for the network.
"""

from __future__ import annotations

import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.integration.conftest import model_args
from tests.integration.faults import (
    EARLY,
    STREAMS,
    Faults,
    expect_undisturbed,
    running_faults,
)
from tests.integration.staged_worker import SENDING

FAR = "decode-far"
WITHIN_S = 0.8
"""A third of the lease: how long ago a worker wrote its own is a matter of chance."""


def strike(
    faults: Faults, victim: str, hurt: Callable[[str], None], half_sent: bool
) -> tuple[float, float]:
    """Seconds until the worker is taken out, and the longest that a stream said nothing."""
    faults.all_there()
    streams = faults.start_streams(faults.url, EARLY, slowly=True)
    faults.until_all_run(streams)
    if half_sent:
        faults.arm(SENDING)
    streams += faults.start_streams(faults.url, range(len(EARLY), STREAMS))
    if half_sent:
        victim = faults.stopped_at(SENDING, streams)[victim]
    else:
        faults.until_all_run(streams)
        victim = next(name for name in faults.workers if name.startswith(victim))
    time.sleep(random.uniform(0.0, WITHIN_S))
    lost = faults.workers[victim]
    times_out = faults.times_out(lost)
    struck_s = time.monotonic()
    hurt(victim)
    faults.until_taken_out(lost, times_out)
    taken_out_s = time.monotonic() - struck_s
    faults.go_on()
    expect_undisturbed(streams, faults.undisturbed)
    if lost.popen.poll() is None:
        lost.popen.send_signal(signal.SIGCONT)
    else:
        faults.replace(victim)
    return taken_out_s, max(stream.longest_wait_s for stream in streams)


def main() -> None:
    times = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with running_faults(folder, model_args(folder / "model")) as faults:

            def kill(victim: str) -> None:
                faults.workers[victim].popen.kill()

            def freeze(victim: str) -> None:
                faults.workers[victim].popen.send_signal(signal.SIGSTOP)

            def measure(what: str, victim: str, hurt: Callable[[str], None], **how: bool) -> None:
                figures = []
                for _ in range(times):
                    figures.append(strike(faults, victim, hurt, how.get("half_sent", False)))
                    if faults.end is not None:
                        faults.cut_off(False)
                for kind, values in zip(
                    ("taken out", "pause"), zip(*figures, strict=True), strict=True
                ):
                    median_s, most_s = statistics.median(values), max(values)
                    print(f"{what:32} {kind:9} {median_s:5.2f} s, at most {most_s:5.2f} s")

            measure("decode worker killed", "decode", kill)
            measure("decode worker frozen", "decode", freeze)
            measure("prefill worker frozen, half sent", "prefill", freeze, half_sent=True)
            if faults.end is not None:
                faults.start_in_namespace(FAR, "decode")
                measure("decode worker cut off", FAR, lambda _: faults.cut_off(True))


if __name__ == "__main__":
    main()
