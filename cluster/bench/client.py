"""The client of both sides: streams completions and notes when each token came."""

from __future__ import annotations

import itertools
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from cluster.bench.report import BenchFailed

REQUEST_DEADLINE_S = 600.0
SPECIAL_TOKENS = 2
"""The ids below are the bundled tokenizer's begin and end."""
EVENT = b"data: "


@dataclass(slots=True)
class Stream:
    """One streamed completion. Times are of the machine's monotonic clock, in seconds."""

    started_s: float = 0.0
    request_id: str = ""
    token_times_s: list[float] = field(default_factory=list)
    text: str = ""

    @property
    def first_token_s(self) -> float:
        """TTFT: from sending the request."""
        return self.token_times_s[0] - self.started_s

    @property
    def gaps_s(self) -> list[float]:
        """Between each token and the one before: the first is first to second token."""
        times = self.token_times_s
        return [later - earlier for earlier, later in itertools.pairwise(times)]

    def take(self, event: dict[str, Any], at_s: float) -> None:
        """Note an event's tokens.

        Raises:
            BenchFailed: the server reports an error.
        """
        if "error" in event:
            raise BenchFailed(f"the server answered: {event['error']}")
        self.request_id = event["id"]
        self.text += "".join(choice["text"] for choice in event["choices"])
        # A router between may leave the running count out: then each event is a token, and the last
        # one, with the final count, tells of those that came together.
        usage = event.get("usage")
        tokens = usage["completion_tokens"] if usage else len(self.token_times_s) + 1
        self.token_times_s += [at_s] * (tokens - len(self.token_times_s))


class Client:
    """Use as an async context manager."""

    def __init__(self, url: str, model: str) -> None:
        self._url = url
        self._model = model
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Client:
        timeout = aiohttp.ClientTimeout(total=REQUEST_DEADLINE_S)
        self._session = aiohttp.ClientSession(self._url, timeout=timeout)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.session.close()

    @property
    def session(self) -> aiohttp.ClientSession:
        assert self._session is not None, "not entered"
        return self._session

    async def complete(
        self, prompt: Sequence[int], output_tokens: int, into: Stream | None = None
    ) -> Stream:
        """Stream one completion of exactly `output_tokens`, into the stream given: who cancels this
        has there what came.

        Raises:
            BenchFailed, aiohttp.ClientError
        """
        body = json.dumps(
            {
                "model": self._model,
                "prompt": list(prompt),
                "max_tokens": output_tokens,
                "ignore_eos": True,
                "temperature": 0,
                "stream": True,
                # Says how many tokens each event brings.
                "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            }
        ).encode()
        headers = {"Content-Type": "application/json"}
        stream = into or Stream()
        stream.started_s = time.monotonic()
        async with self.session.post("/v1/completions", data=body, headers=headers) as response:
            if response.status != 200:
                raise BenchFailed(f"HTTP {response.status}: {(await response.text())[:200]}")
            async for line in response.content:
                at_s = time.monotonic()
                if line.startswith(EVENT) and not line.startswith(EVENT + b"[DONE]"):
                    stream.take(json.loads(line[len(EVENT) :]), at_s)
        if len(stream.token_times_s) != output_tokens:
            raise BenchFailed(f"{len(stream.token_times_s)} of {output_tokens} tokens came")
        return stream

    async def router_state(self) -> dict[str, Any]:
        """What Baton's router shows its operator."""
        async with self.session.get("/dashboard/state") as response:
            response.raise_for_status()
            state: dict[str, Any] = await response.json()
            return state


def random_prompt(seed: str, tokens: int, vocabulary: int) -> list[int]:
    """The same for the same seed. Two of different seeds share no prefix that a cache could use."""
    chosen = random.Random(seed)
    return [chosen.randrange(SPECIAL_TOKENS, vocabulary) for _ in range(tokens)]
