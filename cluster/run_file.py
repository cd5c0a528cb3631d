"""How `baton status` and `baton down` find a running `baton up`: a small file per cluster name."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class RunFile:
    name: str
    pid: int
    url: str
    redis_url: str
    ray_address: str
    lease_s: float

    def write(self) -> None:
        run_file_path(self.name).write_text(json.dumps(dataclasses.asdict(self)))


def run_file_path(name: str) -> Path:
    # Not TMPDIR: `baton up` points that into its own folder.
    folder = Path(os.environ.get("XDG_RUNTIME_DIR") or "/tmp")
    return folder / f"baton-{os.getuid()}-{name}.json"


def running(name: str) -> RunFile | None:
    """The `baton up` of this name that runs now on this machine."""
    try:
        run = RunFile(**json.loads(run_file_path(name).read_text()))
        os.kill(run.pid, 0)
    except (OSError, ValueError, TypeError):
        return None
    return run
