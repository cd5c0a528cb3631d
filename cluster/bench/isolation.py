"""`baton bench isolation`: what disaggregating is for.

Streams decode while long prompts arrive in bursts: at two plain vLLM servers, requests taking turns
between them, and then at Baton with a prefill and a decode worker. One core a server or worker; the
same streams, and the same long prompts at the same moments, however slowly they are answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cluster.bench.client import Client, Stream, random_prompt
from cluster.bench.report import Goal, median, percentile, ratio
from cluster.bench.servers import MODEL_NAME, Servers, server_args

INTER_TOKEN_P99_RATIO_MIN = 3.0
TOKENS_PER_S_RATIO_MIN = 0.95
LENGTH_STEP = 512
POLL_S = 0.05

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class IsolationSettings:
    window_s: float = 60.0
    """How long is measured, in each round."""
    streams: int = 8
    """That decode all the time: one that ends is followed by another."""
    stream_prompt_tokens: int = 64
    stream_output_tokens: int = 384
    burst_every_s: float = 6.0
    burst_prompts: int = 4
    burst_spread_s: float = 1.5
    """A burst's prompts come at random moments within it."""
    long_tokens_min: int = 512
    long_tokens_max: int = 1024
    long_output_tokens: int = 16
    rounds: int = 1
    """Of plain vLLM, then Baton."""
    vllm_args: tuple[str, ...] = ()
    """For all servers, behind those that the benchmark gives."""

    @property
    def max_model_len(self) -> int:
        """In tokens: the longest sequence, and some more."""
        longest = max(
            self.long_tokens_max + self.long_output_tokens,
            self.stream_prompt_tokens + self.stream_output_tokens,
        )
        return (longest // LENGTH_STEP + 1) * LENGTH_STEP

    def server_args(self) -> list[str]:
        return server_args(self.max_model_len, self.vllm_args)


QUICK = IsolationSettings(
    window_s=4.0,
    streams=2,
    stream_output_tokens=64,
    burst_every_s=2.0,
    burst_prompts=2,
    long_tokens_min=128,
    long_tokens_max=256,
    long_output_tokens=4,
)
"""Shows that it works, not what it gains."""


@dataclass(frozen=True, slots=True)
class Arrival:
    at_s: float
    """After the window's beginning."""
    prompt_tokens: int


def schedule(settings: IsolationSettings, seed: str) -> list[Arrival]:
    """The long prompts of a window: the same for the same seed."""
    chosen = random.Random(seed)
    bursts = itertools.takewhile(
        lambda at_s: at_s < settings.window_s, itertools.count(0.0, settings.burst_every_s)
    )
    return sorted(
        (
            Arrival(
                at_s + chosen.random() * settings.burst_spread_s,
                chosen.randint(settings.long_tokens_min, settings.long_tokens_max),
            )
            for at_s in bursts
            for _ in range(settings.burst_prompts)
        ),
        key=lambda arrival: arrival.at_s,
    )


@dataclass(slots=True)
class SideSamples:
    """All that was measured of one side, over all rounds. Seconds."""

    stream_gaps_s: list[float] = field(default_factory=list)
    """Between tokens of the streams, while long prompts came."""
    stream_first_token_s: list[float] = field(default_factory=list)
    """Of those that began within the window."""
    long_first_token_s: list[float] = field(default_factory=list)
    tokens_per_s: list[float] = field(default_factory=list)
    """Of each round: what streams and long prompts were answered within the window."""
    long_unanswered: int = 0
    """Long prompts without a token at the end of their window."""
    requests_by_path: dict[str, int] = field(default_factory=dict)
    """How Baton's requests went, warm-up included."""

    def add(
        self, streams: Sequence[Stream], long: Sequence[Stream], start_s: float, end_s: float
    ) -> None:
        for stream in streams:
            times = stream.token_times_s
            self.stream_gaps_s += [
                later - earlier
                for earlier, later in itertools.pairwise(times)
                if start_s <= earlier and later <= end_s
            ]
            if start_s <= stream.started_s and times and times[0] <= end_s:
                self.stream_first_token_s.append(stream.first_token_s)
        tokens = sum(
            start_s <= at_s <= end_s for s in (*streams, *long) for at_s in s.token_times_s
        )
        self.tokens_per_s.append(tokens / (end_s - start_s))
        self.long_first_token_s += [stream.first_token_s for stream in long]
        self.long_unanswered += sum(stream.token_times_s[0] > end_s for stream in long)


async def run_isolation(
    model: Path, vocabulary: int, settings: IsolationSettings, servers: Servers, report: Report
) -> tuple[SideSamples, SideSamples]:
    """Measure two plain servers and Baton in turn.

    Raises:
        BenchFailed
    """
    plain, baton = SideSamples(), SideSamples()
    args = settings.server_args()
    for i in range(settings.rounds):
        told = f"round {i + 1} of {settings.rounds}: starting"
        report(f"{told} two plain vLLM servers")
        async with (
            servers.plain_on_each_core(model, args) as pair,
            _clients([server.url for server in pair]) as clients,
        ):
            await _Side(clients, settings, vocabulary, str(i), report).measure(plain)
        report(f"{told} Baton")
        async with servers.baton(model, args) as server, _clients([server.url]) as clients:
            await _Side(clients, settings, vocabulary, str(i), report).measure(baton)
            by_path = (await clients[0].router_state())["requests_by_path"]
            for path, count in by_path.items():
                baton.requests_by_path[path] = baton.requests_by_path.get(path, 0) + count
    return plain, baton


@contextlib.asynccontextmanager
async def _clients(urls: Sequence[str]) -> AsyncIterator[list[Client]]:
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(Client(url, MODEL_NAME)) for url in urls]


class _Side:
    def __init__(
        self,
        clients: Sequence[Client],
        settings: IsolationSettings,
        vocabulary: int,
        round_name: str,
        report: Report,
    ) -> None:
        self._clients = clients
        self._settings = settings
        self._vocabulary = vocabulary
        self._round_name = round_name
        self._report = report
        # Each kind takes turns on its own, so that both servers get as much of both.
        self._for_streams: Iterator[Client] = itertools.cycle(clients)
        self._for_long: Iterator[Client] = itertools.cycle(clients)

    async def measure(self, samples: SideSamples) -> None:
        settings = self._settings
        self._report("  warming up")
        for i, client in enumerate(self._clients):
            prompt = self._prompt(f"warm-up {i}", settings.long_tokens_max)
            await client.complete(prompt, settings.long_output_tokens)
        streams: list[Stream] = []
        long: list[Stream] = []
        steady = [
            asyncio.create_task(self._keep_streaming(i, streams)) for i in range(settings.streams)
        ]
        measuring = asyncio.create_task(self._window(streams, long, samples))
        tasks = [measuring, *steady]
        try:
            # The streams end only by failing.
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _window(
        self, streams: list[Stream], long: list[Stream], samples: SideSamples
    ) -> None:
        settings = self._settings
        while sum(bool(stream.token_times_s) for stream in streams) < settings.streams:
            await asyncio.sleep(POLL_S)
        start_s = time.monotonic()
        end_s = start_s + settings.window_s
        arrivals = schedule(settings, self._round_name)
        self._report(
            f"  {settings.streams} streams, {len(arrivals)} long prompts in {settings.window_s:g} s"
        )
        sending = [
            asyncio.create_task(self._send_long(i, arrival, start_s, long))
            for i, arrival in enumerate(arrivals)
        ]
        try:
            await asyncio.gather(*sending)
        finally:
            for task in sending:
                task.cancel()
            await asyncio.gather(*sending, return_exceptions=True)
        await asyncio.sleep(end_s - time.monotonic())
        samples.add(streams, long, start_s, end_s)

    async def _keep_streaming(self, slot: int, streams: list[Stream]) -> None:
        settings = self._settings
        # The first ones have lengths of all kinds: they must not end together.
        output_tokens = -(-settings.stream_output_tokens * (slot + 1) // settings.streams)
        for i in itertools.count():
            streams.append(stream := Stream())
            prompt = self._prompt(f"stream {slot}/{i}", settings.stream_prompt_tokens)
            await next(self._for_streams).complete(prompt, output_tokens, into=stream)
            output_tokens = settings.stream_output_tokens

    async def _send_long(
        self, number: int, arrival: Arrival, start_s: float, long: list[Stream]
    ) -> None:
        prompt = self._prompt(f"long {number}", arrival.prompt_tokens)
        await asyncio.sleep(start_s + arrival.at_s - time.monotonic())
        client = next(self._for_long)
        long.append(await client.complete(prompt, self._settings.long_output_tokens))

    def _prompt(self, name: str, tokens: int) -> list[int]:
        return random_prompt(f"{self._round_name}/{name}", tokens, self._vocabulary)


def summary(
    machine: dict[str, Any],
    model: dict[str, Any],
    settings: IsolationSettings,
    plain: SideSamples,
    baton: SideSamples,
) -> dict[str, Any]:
    """The report as one JSON object."""
    results = {"plain": _side_result(plain), "baton": _side_result(baton)}
    ratios = {
        "inter_token_p99": ratio(
            results["plain"]["inter_token_p99_ms"], results["baton"]["inter_token_p99_ms"]
        ),
        "tokens_per_s": ratio(results["baton"]["tokens_per_s"], results["plain"]["tokens_per_s"]),
        "long_ttft": ratio(results["baton"]["long_ttft_ms"], results["plain"]["long_ttft_ms"]),
    }
    goals = [
        Goal(
            "inter_token_p99_plain_over_baton",
            ratios["inter_token_p99"],
            INTER_TOKEN_P99_RATIO_MIN,
            at_most=False,
        ),
        Goal("tokens_per_s_ratio", ratios["tokens_per_s"], TOKENS_PER_S_RATIO_MIN, at_most=False),
    ]
    return {
        "bench": "isolation",
        "machine": machine,
        "model": model,
        "settings": {
            **asdict(settings),
            "max_model_len": settings.max_model_len,
            "dtype": "float32",
        },
        "results": results,
        "ratios": ratios,
        "requests_by_path": baton.requests_by_path,
        "goals": [goal.to_json() for goal in goals],
    }


def _side_result(samples: SideSamples) -> dict[str, Any]:
    return {
        "inter_token_p50_ms": percentile(samples.stream_gaps_s, 50, 1e3),
        "inter_token_p99_ms": percentile(samples.stream_gaps_s, 99, 1e3),
        "inter_token_max_ms": percentile(samples.stream_gaps_s, 100, 1e3),
        "inter_tokens": len(samples.stream_gaps_s),
        "tokens_per_s": median(samples.tokens_per_s),
        "stream_ttft_ms": median(samples.stream_first_token_s, 1e3),
        "long_ttft_ms": median(samples.long_first_token_s, 1e3),
        "long_ttft_p99_ms": percentile(samples.long_first_token_s, 99, 1e3),
        "long_prompts": len(samples.long_first_token_s),
        "long_unanswered": samples.long_unanswered,
    }
