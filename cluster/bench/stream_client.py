"""The client of `baton bench router`: many streams, as little work for each token as can be.

    python -m cluster.bench.stream_client LOAD_JSON

Runs one load and prints what it saw as one line of JSON. It reads HTTP as vLLM's server writes it,
and counts the digits of the texts: the stub engines make one for each token.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import re
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import psutil
import uvloop

from cluster.bench.client import random_prompt
from cluster.bench.report import BenchFailed

DEADLINE_S = 60.0
TEXT = re.compile(rb'"text":"(\d*)"')
ID = re.compile(rb'"id":"([^"]+)"')
END_OF_BODY = b"\r\n0\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Load:
    port: int
    pid: int
    """Of the server."""
    control_port: int
    """Of the stub engines: see cluster/bench/stub_engine.py."""
    model: str
    vocabulary: int
    pace: dict[str, Any]
    streams: int
    """Always as many: one that ends is followed by another."""
    prompt_tokens: int
    output_tokens: int
    warm_s: float
    window_s: float
    """What is measured, after all streams have begun and `warm_s` more."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))


@dataclass(slots=True)
class Seen:
    """What came within the window. Times are of the machine's monotonic clock."""

    window_s: float = 0.0
    tokens: int = 0
    events: int = 0
    token_times_s: dict[str, list[float]] = field(default_factory=dict)
    """Of all tokens of each request, by its id, also of those before the window."""
    start_s: float = 0.0
    end_s: float = 0.0
    cpu_s: float = 0.0
    """Of the server's process."""


class Connection(asyncio.Protocol):
    """One request at a time."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._rest = b""
        self._done: asyncio.Future[None] | None = None
        self._times: list[float] = []
        self._named = False
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's is none of asyncio's classes.
        self._transport = cast(asyncio.Transport, transport)

    async def complete(self, prompt: list[int], output_tokens: int) -> None:
        body = json.dumps(
            {
                "model": self._run.load.model,
                "prompt": prompt,
                "max_tokens": output_tokens,
                "ignore_eos": True,
                "temperature": 0,
                "stream": True,
            }
        ).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: bench\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        self._done = asyncio.get_running_loop().create_future()
        self._times, self._named = [], False
        assert self._transport is not None
        self._transport.write(head.encode() + body)
        await self._done
        if len(self._times) != output_tokens:
            raise BenchFailed(f"{len(self._times)} of {output_tokens} tokens came")

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        data = self._rest + data
        whole = data.rfind(b"\n\n") + 2
        if whole == 1:
            self._rest = data
        else:
            self._rest = data[whole:]
            texts = TEXT.findall(data, 0, whole)
            tokens = sum(map(len, texts))
            self._run.count(tokens, len(texts))
            self._times += [now] * tokens
            if not self._named and (found := ID.search(data, 0, whole)):
                self._named = True
                self._run.times[found[1].decode()] = self._times
        if b'"error"' in data:
            self._finish(BenchFailed(f"the server answered: {data[:300]!r}"))
        elif self._rest.endswith(END_OF_BODY):
            self._finish(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._finish(BenchFailed(f"the server closed the connection ({exc})"))

    def close(self) -> None:
        assert self._transport is not None
        self._done = None
        self._transport.abort()

    def _finish(self, error: Exception | None) -> None:
        self._rest = b""
        if self._done is not None and not self._done.done():
            if error is None:
                self._done.set_result(None)
            else:
                self._done.set_exception(error)


class Control(asyncio.DatagramProtocol):
    def __init__(self) -> None:
        self._transport: asyncio.DatagramTransport | None = None
        self._answered = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's is none of asyncio's classes.
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self._answered.set()

    def tell(self, message: dict[str, Any]) -> None:
        assert self._transport is not None
        self._transport.sendto(json.dumps(message).encode())

    async def ask(self, message: dict[str, Any]) -> None:
        self._answered.clear()
        self.tell(message)
        try:
            await asyncio.wait_for(self._answered.wait(), DEADLINE_S)
        except TimeoutError as error:
            raise BenchFailed(f"the stub engines said nothing for {DEADLINE_S:g} s") from error


class Run:
    def __init__(self, load: Load, control: Control) -> None:
        self.load = load
        self.times: dict[str, list[float]] = {}
        self._control = control
        self._tokens = 0
        self._events = 0
        self._telling = False

    def count(self, tokens: int, events: int) -> None:
        self._tokens += tokens
        self._events += events
        # One datagram for all that is read at once.
        if not self._telling:
            self._telling = True
            asyncio.get_running_loop().call_soon(self._tell)

    def _tell(self) -> None:
        self._telling = False
        self._control.tell({"received": self._tokens})

    async def measure(self) -> Seen:
        load = self.load
        await self._control.ask(load.pace)
        loop = asyncio.get_running_loop()
        connections = [
            (await loop.create_connection(lambda: Connection(self), "127.0.0.1", load.port))[1]
            for _ in range(load.streams)
        ]
        tasks = [
            asyncio.create_task(self._keep_streaming(i, connection))
            for i, connection in enumerate(connections)
        ]
        measuring = asyncio.create_task(self._window())
        try:
            # The streams end only by failing.
            done, _ = await asyncio.wait(
                [measuring, *tasks], timeout=DEADLINE_S, return_when=asyncio.FIRST_COMPLETED
            )
            for task in done:
                task.result()
            if not done:
                raise BenchFailed(f"not measured within {DEADLINE_S:g} s")
            return measuring.result()
        finally:
            for task in (measuring, *tasks):
                task.cancel()
            await asyncio.gather(measuring, *tasks, return_exceptions=True)
            for connection in connections:
                connection.close()

    async def _keep_streaming(self, slot: int, connection: Connection) -> None:
        load = self.load
        # The first ones have lengths of all kinds: they must not end together.
        output_tokens = -(-load.output_tokens * (slot + 1) // load.streams)
        for i in itertools.count():
            prompt = random_prompt(f"{slot}/{i}", load.prompt_tokens, load.vocabulary)
            await connection.complete(prompt, output_tokens)
            output_tokens = load.output_tokens

    async def _window(self) -> Seen:
        while len(self.times) < self.load.streams:
            await asyncio.sleep(0.01)
        await asyncio.sleep(self.load.warm_s)
        cpu_s = cpu_s_of(self.load.pid)
        start_s, tokens, events = time.monotonic(), self._tokens, self._events
        await asyncio.sleep(self.load.window_s)
        end_s = time.monotonic()
        return Seen(
            end_s - start_s,
            self._tokens - tokens,
            self._events - events,
            self.times,
            start_s,
            end_s,
            cpu_s_of(self.load.pid) - cpu_s,
        )


def cpu_s_of(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


@contextlib.asynccontextmanager
async def control_of(port: int) -> AsyncIterator[Control]:
    transport, control = await asyncio.get_running_loop().create_datagram_endpoint(
        Control, remote_addr=("127.0.0.1", port)
    )
    try:
        yield control
    finally:
        transport.close()


async def ask_stub(port: int, message: dict[str, Any]) -> None:
    """Tell stub engines, and wait until it is done."""
    async with control_of(port) as control:
        await control.ask(message)


async def run(load: Load) -> Seen:
    async with control_of(load.control_port) as control:
        return await Run(load, control).measure()


def main() -> None:
    try:
        seen = uvloop.run(run(Load(**json.loads(sys.argv[1]))))
    except (BenchFailed, OSError) as error:
        sys.exit(f"the client failed: {error}")
    print(json.dumps(asdict(seen)))


if __name__ == "__main__":
    main()
