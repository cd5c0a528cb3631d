"""The benchmark's link carries TCP between two network namespaces, no faster than it is to be, and
leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from cluster.bench.link import End, check_link_possible
from cluster.bench.report import BenchFailed

NAME = "7e57ed"
RATE_BITS_S = 100e6
DELAY_S = 0.02
PAYLOAD_BYTES = 4_000_000
DEADLINE_S = 30.0

LISTEN = """
import socket
server = socket.create_server(("0.0.0.0", 7000))
print(flush=True)
connection, _ = server.accept()
while data := connection.recv(1 << 20):
    pass
connection.sendall(b"!")
"""
SEND = f"""
import socket, sys, time
started_s = time.monotonic()
connection = socket.create_connection((sys.argv[1], 7000))
connected_s = time.monotonic()
connection.sendall(bytes({PAYLOAD_BYTES}))
connection.shutdown(socket.SHUT_WR)
assert connection.recv(1) == b"!"
print(connected_s - started_s, time.monotonic() - connected_s)
"""


def namespaces() -> str:
    return subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout


@contextlib.contextmanager
def link() -> Iterator[tuple[subprocess.Popen[str], End, End]]:
    settings = {"name": NAME, "rate_bits_s": RATE_BITS_S, "delay_s": DELAY_S}
    command = [sys.executable, "-m", "cluster.bench.link", json.dumps(settings)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        a, b = json.loads(process.stdout.readline())
        yield process, End(**a), End(**b)
    finally:
        process.terminate()
        process.wait(DEADLINE_S)


@pytest.mark.netns
def test_bytes_cross_no_sooner_than_rate_and_delay_allow() -> None:
    try:
        check_link_possible()
    except BenchFailed as error:
        pytest.skip(str(error))
    with link() as (process, a, b):
        python = [sys.executable, "-c"]
        listener = subprocess.Popen(b.command([*python, LISTEN]), stdout=subprocess.PIPE)
        try:
            assert listener.stdout is not None
            listener.stdout.readline()
            sent = subprocess.run(
                a.command([*python, SEND, b.address]),
                capture_output=True,
                text=True,
                timeout=DEADLINE_S,
            )
        finally:
            listener.kill()
            listener.wait()
            listener.stdout.close()
        assert sent.returncode == 0, sent.stderr
        connect_s, send_s = map(float, sent.stdout.split())
        assert connect_s >= 2 * DELAY_S
        # A segment of 1,448 bytes is 1,538 on the wire; the answer takes the way back.
        assert send_s >= PAYLOAD_BYTES * 8 / RATE_BITS_S + 2 * DELAY_S
        assert NAME in namespaces()
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 0
    deadline = time.monotonic() + DEADLINE_S
    while NAME in namespaces():
        assert time.monotonic() < deadline, "the namespaces are still there"
        time.sleep(0.1)
