"""Names in /dev/shm that vLLM gives to what the processes of one engine share. Those of processes
that were killed stay there, hundreds of megabytes of them, until somebody removes them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

SHARED = Path("/dev/shm")
PREFIXES = ("psm_", "vllm_dist_")
"""Of Python's `SharedMemory`, and of what ranks on CPUs compute together in."""


def mapped_by(pids: Iterable[int], proc: Path = Path("/proc")) -> set[str]:
    """Those that these processes have mapped."""
    found = set()
    for pid in pids:
        # A process that has ended, or is another user's, cannot be read.
        with contextlib.suppress(OSError):
            for line in (proc / str(pid) / "maps").read_text().splitlines():
                _, _, name = line.partition(f" {SHARED}/")
                if name.startswith(PREFIXES) and not name.endswith(" (deleted)"):
                    found.add(name)
    return found


def noted_in(folder: Path, shared: Path = SHARED) -> set[str]:
    """Those of ranks that met by a file in this folder, alive or not."""
    meetings = [*folder.glob("vllm_dist_*"), *folder.glob("tmp/vllm_dist_*")]
    return {path.name for met in meetings for path in shared.glob(f"{met.name}-*")}


def remove(names: Iterable[str], shared: Path = SHARED) -> None:
    """Who has mapped it keeps it."""
    for name in names:
        (shared / name).unlink(missing_ok=True)
