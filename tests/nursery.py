"""Workers and routers forked from a process that has imported vLLM already: that takes 10 s of CPU,
and tests would pay it for each process that they start.

    python -m tests.nursery FOLDER

takes a JSON line for each process to start, and answers with its id. All end with it.
"""

from __future__ import annotations

import ctypes
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.processes import Process, spawn

ENVIRONMENT = {
    # Threads are not forked, and these libraries start theirs when they are imported.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


TOLD_S = 10.0


class Forked:
    """What `Process` needs of a `Popen`, for a process that is another one's child."""

    def __init__(self, pid: int, args: list[str], status: Path) -> None:
        self.pid = pid
        self.args = args
        self.returncode: int | None = None
        self._status = status
        """Where its parent tells how it has ended."""
        self._file = os.pidfd_open(pid)

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._file], [], [], 0)[0]:
            self._ended()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._file], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self._ended()
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._file, signum)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _ended(self) -> None:
        # Its parent hears of it when we do.
        until_s = time.monotonic() + TOLD_S
        while not self._status.exists():
            assert time.monotonic() < until_s, f"nobody tells how {self.pid} has ended"
            time.sleep(0.001)
        self.returncode = int(self._status.read_text())
        os.close(self._file)


class Nursery:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._log = (folder / "nursery.log").open("wb")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.nursery", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, **ENVIRONMENT},
        )

    def spawn(
        self, name: str, command: list[str], folder: Path, environment: dict[str, str] | None = None
    ) -> Process:
        """As `processes.spawn`, for `python -m MODULE ...`, also in a network namespace."""
        if sys.executable not in command:
            return spawn(name, command, folder, environment)
        at = command.index(sys.executable)
        launcher, (minus_m, *argv) = command[:at], command[at + 1 :]
        assert minus_m == "-m", command
        log = folder / f"{name}.log"
        order = {
            "argv": argv,
            "log": str(log),
            "environment": environment or {},
            "namespace": launcher[-1] if launcher else "",
        }
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()
        pid = int(self._process.stdout.readline())
        return Process(name, Forked(pid, command, status_of(pid, self._folder)), log)  # type: ignore[arg-type]

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._log.close()


def status_of(pid: int, folder: Path) -> Path:
    return folder / f"{pid}.status"


def run(order: dict[str, Any]) -> int:
    """In the child."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    nothing = os.open(os.devnull, os.O_RDONLY)
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    if order["namespace"]:
        enter_namespace(order["namespace"])
    os.environ.update(order["environment"])
    # What was found when it was imported.
    tempfile.tempdir = None
    sys.argv = list(order["argv"])
    try:
        runpy.run_module(sys.argv[0], run_name="__main__")
    except SystemExit as ended:
        if ended.code is None or isinstance(ended.code, int):
            return ended.code or 0
        # As Python does it with a message.
        print(ended.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def enter_namespace(name: str) -> None:
    """A network namespace, by the name that `ip netns` has for it. Of this thread and those that it
    starts: there is no other one yet."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/run/netns", name).open() as namespace:
        if libc.setns(namespace.fileno(), 0) != 0:
            raise OSError(ctypes.get_errno(), f"setns {name}")


def main() -> None:
    # What workers and routers import: none of it starts a thread.
    import router.server  # noqa: F401
    import workers.worker  # noqa: F401

    folder = Path(sys.argv[1])

    def tell(signum: int, frame: object) -> None:
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                path = status_of(ended[0], folder)
                written = path.with_suffix(".written")
                written.write_text(str(os.waitstatus_to_exitcode(ended[1])))
                written.rename(path)

    signal.signal(signal.SIGCHLD, tell)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    children: list[int] = []
    for line in sys.stdin:
        # Not told of its end before it is known.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
        pid = os.fork()
        if pid == 0:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
            signal.signal(signal.SIGINT, signal.default_int_handler)
            status = run(json.loads(line))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        children.append(os.pidfd_open(pid))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
        print(pid, flush=True)
    for child in children:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(child, signal.SIGKILL)


if __name__ == "__main__":
    main()
