"""The guardian, over real processes: whatever ends its parent, what carries the mark goes."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster import guardian, vllm_names
from cluster.guardian import RUN_VARIABLE, end_processes, processes_of
from tests.unit.children import Child, children

DEADLINE_S = 15.0
SLEEP = "import time; print('up', flush=True); time.sleep(60)"
SHARING = (
    """
from multiprocessing import resource_tracker, shared_memory
memory = shared_memory.SharedMemory(create=True, size=8)
# As if it had been killed.
resource_tracker.unregister(memory._name, "shared_memory")
"""
    + SLEEP
)
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SLEEP
PARENT = """
import os, subprocess, sys, time
run_id, *paths = sys.argv[1:]
clean = {k: v for k, v in os.environ.items() if k != "BATON_RUN_ID"}
guardian = subprocess.Popen(
    [sys.executable, "-m", "cluster.guardian", run_id, *paths],
    stdin=subprocess.PIPE, env=clean, start_new_session=True,
)
child = subprocess.Popen(
    [sys.executable, "-c", "import time; time.sleep(60)"],
    env={**clean, "BATON_RUN_ID": run_id}, start_new_session=True,
)
print(guardian.pid, child.pid, flush=True)
time.sleep(60)
"""

Start = Callable[[str, str | None], Child]


@pytest.fixture
def run_id() -> str:
    return secrets.token_hex(8)


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts Python code with a run's mark, or none."""
    environment = {k: v for k, v in os.environ.items() if k != RUN_VARIABLE}
    with children() as start:

        def start_one(code: str, mark: str | None) -> Child:
            marks = {RUN_VARIABLE: mark} if mark else {}
            return start(code, environment={**environment, **marks})

        yield start_one


def gone(pid: int) -> bool:
    """Ended, whether or not its parent has asked how."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def guard(run_id: str, *paths: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "cluster.guardian", run_id, *map(str, paths)],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )


def test_finds_the_marked_only(run_id: str, start: Start) -> None:
    marked = {start(SLEEP, run_id).pid, start(SLEEP, run_id).pid}
    start(SLEEP, None)
    start(SLEEP, run_id + "0")
    assert set(processes_of(run_id)) == marked


def test_ends_the_marked_and_leaves_others(run_id: str, start: Start, tmp_path: Path) -> None:
    marked, unmarked, anothers = start(SLEEP, run_id), start(SLEEP, None), start(SLEEP, "another")
    folder, file = tmp_path / "run", tmp_path / "run.json"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "log").touch()
    file.touch()
    guarding = guard(run_id, folder, file, tmp_path / "never-made")
    assert guarding.stdin is not None
    # It lives on through what ends others, until its parent's end of the pipe is closed.
    until(lambda: b"cluster.guardian" in Path(f"/proc/{guarding.pid}/cmdline").read_bytes())
    time.sleep(0.5)
    guarding.send_signal(signal.SIGINT)
    guarding.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        guarding.wait(0.2)
    assert marked.poll() is None
    guarding.stdin.close()
    assert guarding.wait(DEADLINE_S) == 0
    assert marked.wait(1) == -signal.SIGTERM
    assert unmarked.poll() is None and anothers.poll() is None
    assert not folder.exists() and not file.exists() and tmp_path.exists()


def test_no_memory_keeps_a_name(run_id: str, start: Start, tmp_path: Path) -> None:
    """Neither what a process had mapped, nor what ranks had that met in the run's folder."""
    [mapped] = vllm_names.mapped_by([start(SHARING, run_id).pid])
    [others] = vllm_names.mapped_by([start(SHARING, None).pid])
    left = vllm_names.SHARED / f"vllm_dist_{run_id}-tp:0-[0-1]-cpushm_1"
    left.touch()
    (tmp_path / "run" / "tmp").mkdir(parents=True)
    (tmp_path / "run" / "tmp" / f"vllm_dist_{run_id}").touch()
    try:
        guarding = guard(run_id, tmp_path / "run")
        assert guarding.stdin is not None
        guarding.stdin.close()
        assert guarding.wait(DEADLINE_S) == 0
        assert not (vllm_names.SHARED / mapped).exists() and not left.exists()
        assert (vllm_names.SHARED / others).exists()
    finally:
        left.unlink(missing_ok=True)
        vllm_names.remove([mapped, others])


def test_acts_when_the_parent_is_killed(run_id: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, run_id, str(folder)], stdout=subprocess.PIPE
    )
    assert parent.stdout is not None
    guarding, child = map(int, parent.stdout.readline().split())
    try:
        until(lambda: processes_of(run_id) == [child])
        parent.kill()
        parent.wait()
        until(lambda: gone(child) and gone(guarding) and not folder.exists())
    finally:
        parent.stdout.close()
        for pid in (child, guarding):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_who_ignores_the_first_signal_gets_the_second(
    run_id: str, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guardian, "TERM_GRACE_S", 0.3)
    stubborn, willing = start(STUBBORN, run_id), start(SLEEP, run_id)
    end_processes(run_id)
    assert stubborn.wait(1) == -signal.SIGKILL
    assert willing.wait(1) == -signal.SIGTERM


def test_what_is_started_meanwhile_ends_too(
    run_id: str, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guardian, "KILL_GRACE_S", 0.0)
    late = (
        "import signal, subprocess, sys, time\n"
        "def on_term(*_):\n"
        "    time.sleep(0.2)\n"
        "    subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "    sys.exit()\n"
        "signal.signal(signal.SIGTERM, on_term)\n"
    ) + SLEEP
    start(late, run_id)
    # SIGTERM alone does: the newcomer is told as well.
    end_processes(run_id)
    assert processes_of(run_id) == []


def test_nothing_to_end_takes_no_time(run_id: str) -> None:
    started = time.monotonic()
    end_processes(run_id)
    assert time.monotonic() - started < 1
