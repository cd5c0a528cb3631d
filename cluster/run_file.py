"""How `baton status` and `baton down` find a running `baton up`: a small file per cluster name."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

STARTED = "started"
STARTED_FIELD = 19
"""Of /proc/PID/stat, counted from behind the name."""


@dataclass(frozen=True, slots=True)
class RunFile:
    name: str
    pid: int
    url: str
    redis_url: str
    ray_address: str
    lease_s: float

    def write(self) -> None:
        content = {**dataclasses.asdict(self), STARTED: _started(self.pid)}
        path = run_file_path(self.name)
        # For this user only: a Redis URL may have a password, and the folder may be /tmp. mkstemp
        # makes it so, and replacing fails where another user's file is in the way.
        descriptor, new = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(descriptor, "w") as file:
            file.write(json.dumps(content))
        try:
            Path(new).replace(path)
        except OSError:
            Path(new).unlink()
            raise


def run_file_path(name: str) -> Path:
    # Not TMPDIR: `baton up` points that into its own folder.
    folder = Path(os.environ.get("XDG_RUNTIME_DIR") or "/tmp")
    return folder / f"baton-{os.getuid()}-{name}.json"


def running(name: str) -> RunFile | None:
    """The `baton up` of this name that runs now on this machine."""
    try:
        path = run_file_path(name)
        if path.stat().st_uid != os.getuid():
            return None
        content = json.loads(path.read_text())
        started = content.pop(STARTED)
        run = RunFile(**content)
        return run if _started(run.pid) == started else None
    except (OSError, ValueError, TypeError, AttributeError, LookupError):
        return None


def _started(pid: int) -> str:
    """When a process started, in the kernel's own count: another one may get its number later.

    Raises:
        OSError: it is gone.
    """
    # The name before it, in parentheses, may have spaces of its own.
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return after_name[STARTED_FIELD]
