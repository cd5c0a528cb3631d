"""The end of a pod: its workers drain before Ray is stopped. Over real processes."""

from __future__ import annotations

import os
import secrets
import signal
import time
from collections.abc import Callable, Iterator

import pytest

from cluster.pod_end import POLL_S, WORKER_TITLE, drain, processes_titled
from tests.unit.children import Child, children
from tests.unit.ends import wait_until
from workers.actor import WorkerActor

DRAINING = """
import signal, sys, time
def on_term(*_):
    time.sleep(0.5)
    print("drained", flush=True)
    sys.exit()
signal.signal(signal.SIGTERM, on_term)
"""
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
REPLACED = """
import os, signal
def on_term(*_):
    if os.fork():
        os._exit(0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
signal.signal(signal.SIGTERM, on_term)
"""
"""As by the controller, while Ray still has the node."""
FOREVER_S = 60.0

UNTIL_KILLED = "print('up', flush=True); import time; time.sleep(300)"

Start = Callable[[str, str], Child]


@pytest.fixture
def title() -> str:
    """Of this test's processes only: the machine may have workers of others."""
    return f"ray::Test{secrets.token_hex(8)}"


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a process that shows a title, and does this when it gets SIGTERM."""
    with children() as start:
        yield lambda title, code: start(f"{code}\n{UNTIL_KILLED}", title)


def test_the_title_is_the_actors() -> None:
    """As Ray makes it; tests/e2e/test_up.py has it from Ray."""
    assert f"ray::{WorkerActor.__name__}" == WORKER_TITLE


def test_finds_a_worker_whatever_it_runs(title: str, start: Start) -> None:
    workers = {start(title, "").pid, start(f"{title}.run", "").pid}
    for other in (f"{title}2", f"{title}2.run", f"x{title}"):
        start(other, "")
    assert processes_titled(title) == workers


def test_waits_until_all_have_drained(title: str, start: Start) -> None:
    workers = [start(title, DRAINING), start(f"{title}.run", DRAINING)]
    other = start(f"{title}2", "")
    drain(title, FOREVER_S)
    for worker in workers:
        assert worker.stdout is not None and worker.stdout.readline() == b"drained\n"
        assert worker.wait(POLL_S * 50) == 0
    assert other.poll() is None


def test_does_not_wait_for_ever(title: str, start: Start) -> None:
    deaf = start(title, DEAF)
    drain(title, 3 * POLL_S)
    assert deaf.poll() is None


def test_who_is_started_while_others_drain_is_told_too(title: str, start: Start) -> None:
    """It would take requests, and be stopped in the midst of them."""
    draining, old = start(title, DRAINING), start(title, REPLACED)
    drain(title, FOREVER_S)
    assert draining.wait(POLL_S * 50) == old.wait(POLL_S * 50) == 0
    wait_until("the new one has ended", lambda: not processes_titled(title))


def test_who_is_started_at_the_end_is_not_waited_for(title: str, start: Start) -> None:
    old = start(title, REPLACED)
    drain(title, FOREVER_S)
    assert old.wait(POLL_S * 50) == 0
    (new,) = processes_titled(title)
    os.kill(new, signal.SIGKILL)


def test_none_to_end_takes_no_time(title: str) -> None:
    started = time.monotonic()
    drain(title, FOREVER_S)
    assert time.monotonic() - started < FOREVER_S / 2
