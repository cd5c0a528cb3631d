"""Processes of Python code that end with the test."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping

Child = subprocess.Popen[bytes]
StartChild = Callable[..., Child]


@contextlib.contextmanager
def children() -> Iterator[StartChild]:
    """Starts code, and waits for its first line."""
    started: list[Child] = []

    def start(
        code: str, title: str = sys.executable, environment: Mapping[str, str] | None = None
    ) -> Child:
        process = subprocess.Popen(
            [title, "-c", code],
            executable=sys.executable,
            env=environment,
            stdout=subprocess.PIPE,
        )
        started.append(process)
        assert process.stdout is not None and process.stdout.readline()
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
