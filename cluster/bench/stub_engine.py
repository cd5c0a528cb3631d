"""An engine core without a model, for `baton bench router`: each step gives every request a token.

It speaks vLLM's own structs, at the pace that the client of the benchmark sets by datagrams:
`{"interval_s": 0.02}` for a step every 20 ms, or `{"backlog_tokens": 128}` for steps as fast as the
client takes them: no more tokens are made than that many ahead of its `{"received": 4096}`. The
first two begin a run and are answered. `{"dump": PATH}` writes when each token was made.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from vllm.v1.engine import (
    EngineCoreEvent,
    EngineCoreEventType,
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    FinishReason,
)
from vllm.v1.metrics.stats import PrefillStats, SchedulerStats

TOKEN_ID = 17
"""A zero in the bundled model's vocabulary: the client counts digits."""
ANSWER = b"{}"


class Pace(asyncio.DatagramProtocol):
    """Lets engines of this process step, as the client says."""

    def __init__(self) -> None:
        self._interval_s: float | None = None
        self._backlog_tokens = 0
        self._made = 0
        self._received = 0
        self._due_s = 0.0
        self._changed = asyncio.Event()
        self._transport: asyncio.DatagramTransport | None = None
        self.engines: list[StubEngine] = []

    @classmethod
    async def listening(cls, port: int) -> Pace:
        loop = asyncio.get_running_loop()
        _, pace = await loop.create_datagram_endpoint(cls, local_addr=("127.0.0.1", port))
        return pace

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's is none of asyncio's classes.
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: Any) -> None:
        message: dict[str, Any] = json.loads(data)
        if "received" in message:
            self._received = message["received"]
        else:
            if "dump" in message:
                made_s = {k: v for engine in self.engines for k, v in engine.take_made_s().items()}
                Path(message["dump"]).write_text(json.dumps(made_s))
            else:
                self._interval_s = message.get("interval_s")
                self._backlog_tokens = message.get("backlog_tokens", 0)
                self._made = self._received = 0
            assert self._transport is not None
            self._transport.sendto(ANSWER, addr)
        self._changed.set()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def made(self, tokens: int) -> None:
        self._made += tokens

    async def turn(self, tokens: int) -> None:
        """Returns when a step of so many tokens may be made."""
        # Always let others run: a step's tokens are to be on their way before the next comes.
        await asyncio.sleep(0)
        if self._interval_s is not None:
            now = time.monotonic()
            self._due_s = max(self._due_s + self._interval_s, now)
            await asyncio.sleep(self._due_s - now)
            return
        while self._interval_s is None and (
            self._made - self._received + tokens > max(self._backlog_tokens, tokens)
        ):
            self._changed.clear()
            await self._changed.wait()


@dataclass(slots=True)
class _Running:
    client: int
    tokens_left: int
    first: list[EngineCoreEvent] | None
    """Of the first output."""
    prompt_tokens: int
    """Zero if they were computed elsewhere."""
    made_s: list[float] = field(default_factory=list)


class StubEngine:
    """`paced` steps wait for their turn; others are made at once."""

    def __init__(self, pace: Pace, paced: bool = True) -> None:
        self._pace = pace
        self._paced = paced
        self._running: dict[str, _Running] = {}
        self._made_s: dict[str, list[float]] = {}
        self._some = asyncio.Event()
        pace.engines.append(self)

    @property
    def running(self) -> int:
        return len(self._running)

    def add(self, client: int, request: EngineCoreRequest, resumed_tokens: int = 0) -> None:
        """Answer a request, or go on with one that has tokens from elsewhere."""
        assert request.sampling_params is not None and request.sampling_params.max_tokens
        now = time.monotonic()
        kinds = (EngineCoreEventType.QUEUED, EngineCoreEventType.SCHEDULED)
        running = self._running[request.request_id] = _Running(
            client,
            request.sampling_params.max_tokens - resumed_tokens,
            [EngineCoreEvent(kind, now) for kind in kinds],
            0 if resumed_tokens else len(request.prompt_token_ids or ()),
        )
        self._made_s[request.request_id] = running.made_s
        self._some.set()

    def abort(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self._running.pop(request_id, None)

    def take_made_s(self) -> dict[str, list[float]]:
        """When each request's tokens were made, by this machine's monotonic clock."""
        taken, self._made_s = self._made_s, {k: r.made_s for k, r in self._running.items()}
        return taken

    async def next_step(self) -> dict[int, EngineCoreOutputs]:
        """The outputs of the next step, by client."""
        while True:
            while not self._running:
                self._some.clear()
                await self._some.wait()
            if self._paced:
                await self._pace.turn(len(self._running))
            if self._running:
                return self._step()

    def _step(self) -> dict[int, EngineCoreOutputs]:
        now = time.monotonic()
        self._pace.made(len(self._running))
        outputs: dict[int, EngineCoreOutputs] = {}
        for request_id, running in list(self._running.items()):
            running.tokens_left -= 1
            running.made_s.append(now)
            output = EngineCoreOutput(request_id, [TOKEN_ID], events=running.first)
            if running.first is not None and running.prompt_tokens:
                output.prefill_stats = PrefillStats()
                output.prefill_stats.set(running.prompt_tokens, 0, 0)
            running.first = None
            if running.tokens_left <= 0:
                output.finish_reason = FinishReason.LENGTH
                del self._running[request_id]
            of_client = outputs.get(running.client)
            if of_client is None:
                of_client = outputs[running.client] = EngineCoreOutputs(outputs=[], timestamp=now)
            of_client.outputs.append(output)
        if outputs:
            stats = SchedulerStats(num_running_reqs=len(self._running))
            next(iter(outputs.values())).scheduler_stats = stats
        return outputs
