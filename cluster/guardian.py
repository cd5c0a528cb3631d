"""Ends what `baton up` started, however `baton up` itself ended.

    python -m cluster.guardian RUN_ID PATH...

Runs in a session of its own and waits for its standard input to close, which happens when its
parent exits or is killed. Then it ends every process that carries the run's id in its environment,
first asking, then not, and removes the given files and folders, and the memory that they shared.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path

from cluster import vllm_names

RUN_VARIABLE = "BATON_RUN_ID"
TERM_GRACE_S = 8.0
KILL_GRACE_S = 5.0
POLL_S = 0.05


def processes_of(run_id: str) -> list[int]:
    """Processes whose environment carries the run's id, but for this one."""
    mark = f"{RUN_VARIABLE}={run_id}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            # A process that ends meanwhile, or is another user's, cannot be read.
            with contextlib.suppress(OSError):
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


def end_processes(run_id: str) -> set[str]:
    """Returns the names of memory that they shared."""
    shared: set[str] = set()
    for signum, grace_s in ((signal.SIGTERM, TERM_GRACE_S), (signal.SIGKILL, KILL_GRACE_S)):
        told: set[int] = set()
        deadline = time.monotonic() + grace_s
        while time.monotonic() < deadline:
            found = set(processes_of(run_id))
            if not found:
                return shared
            # Once each: others may have been started since.
            shared |= vllm_names.mapped_by(found - told)
            for pid in found - told:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signum)
            told |= found
            time.sleep(POLL_S)
    return shared


def main() -> None:
    run_id, *paths = sys.argv[1:]
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    # Nothing is ever written: this returns when the parent's end of the pipe is closed.
    sys.stdin.buffer.read()
    shared = end_processes(run_id)
    for path in map(Path, paths):
        if path.is_dir():
            shared |= vllm_names.noted_in(path)
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    vllm_names.remove(shared)


if __name__ == "__main__":
    main()
