"""What ranks could not deliver, told to their worker's process, which tells routers."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable

from workers.kv.transfer import Sent

REASON_CHARACTERS_MAX = 300
"""With that, a line is shorter than select.PIPE_BUF, however it is escaped: a longer one could mix
with what other ranks write."""


class RanksUndelivered:
    """A pipe into which ranks write. It has no name in any file system."""

    def __init__(self, on_sent: Callable[[Sent], None]) -> None:
        """`on_sent` is called on a thread of its own."""
        self._on_sent = on_sent
        self._read, self._write = os.pipe()
        threading.Thread(target=self._run, name="ranks-undelivered", daemon=True).start()

    @property
    def path(self) -> str:
        """As long as it is not closed."""
        return f"/proc/{os.getpid()}/fd/{self._write}"

    def close(self) -> None:
        """The thread ends with the last rank."""
        os.close(self._write)

    def _run(self) -> None:
        with os.fdopen(self._read, "rb") as lines:
            for line in lines:
                transfer_id, reason = json.loads(line)
                self._on_sent(Sent(transfer_id, False, reason, 0))


class RankUndelivered:
    """One rank's end of it."""

    def __init__(self, path: str) -> None:
        """
        Raises:
            OSError: the worker is gone.
        """
        self._pipe: int | None = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        self._lock = threading.Lock()

    def tell(self, sent: Sent) -> None:
        if sent.delivered:
            return
        told = [sent.transfer_id, sent.reason[:REASON_CHARACTERS_MAX]]
        line = json.dumps(told).encode() + b"\n"
        with self._lock, contextlib.suppress(BrokenPipeError):  # the worker is gone
            if self._pipe is not None:
                os.write(self._pipe, line)

    def close(self) -> None:
        with self._lock:
            if self._pipe is not None:
                os.close(self._pipe)
            self._pipe = None
