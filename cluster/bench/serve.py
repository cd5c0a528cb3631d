"""`baton bench serve`: Baton with a prefill and a decode worker beside one plain vLLM server.

Both serve the same model to the same client with the same prompts, one after the other, never at
once. The time from the end of prefill to the first token at the client takes the worker's clock
(the end of the step, as the router tells it) from the client's: on one machine both are the same
monotonic clock.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cluster.bench.client import Client, Stream, random_prompt
from cluster.bench.report import Goal, median, percentile, ratio
from cluster.bench.servers import MODEL_NAME, Servers, server_args

LENGTH_STEP = 512
FIRST_TOKEN_AFTER_PREFILL_MS_MAX = 20.0
TTFT_RATIO_MAX = 1.10
SECOND_TOKEN_PLAIN_STEPS_MAX = 2.0

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class ServeSettings:
    prompt_tokens: tuple[int, ...] = (256, 1024, 4096)
    repeats: int = 5
    """Of each prompt length, in each round."""
    repeats_long: int = 3
    """Of prompts of `long_tokens` and more."""
    long_tokens: int = 4096
    output_tokens: int = 16
    streams: int = 8
    stream_prompt_tokens: int = 512
    stream_output_tokens: int = 32
    stream_repeats: int = 2
    rounds: int = 1
    """Of plain vLLM, then Baton."""
    free_front_end: bool = False
    """The plain server's HTTP front end may use the second core."""
    vllm_args: tuple[str, ...] = ()
    """For both servers, behind those that the benchmark gives."""

    def repeats_of(self, tokens: int) -> int:
        return self.repeats_long if tokens >= self.long_tokens else self.repeats

    @property
    def max_model_len(self) -> int:
        """In tokens: the longest sequence, and some more."""
        longest = max(
            max(self.prompt_tokens) + self.output_tokens,
            self.stream_prompt_tokens + self.stream_output_tokens,
        )
        return (longest // LENGTH_STEP + 1) * LENGTH_STEP

    def server_args(self) -> list[str]:
        return server_args(self.max_model_len, self.vllm_args)


QUICK = ServeSettings(
    prompt_tokens=(64, 256),
    repeats=2,
    streams=4,
    stream_prompt_tokens=128,
    stream_output_tokens=8,
    stream_repeats=1,
)
"""Shows that it works, not how fast it is."""


@dataclass(slots=True)
class LengthSamples:
    """One side's requests of one prompt length, over all rounds. Seconds."""

    first_token_s: list[float] = field(default_factory=list)
    second_token_s: list[float] = field(default_factory=list)
    """After the first."""
    later_gaps_s: list[float] = field(default_factory=list)
    after_prefill_s: list[float] = field(default_factory=list)
    """From the end of the step that computed the first token, to the client. Baton only."""
    texts: list[str] = field(default_factory=list)

    def add(self, stream: Stream) -> None:
        self.first_token_s.append(stream.first_token_s)
        self.second_token_s += stream.gaps_s[:1]
        self.later_gaps_s += stream.gaps_s[1:]
        self.texts.append(stream.text)


@dataclass(slots=True)
class SideSamples:
    """All that was measured of one side."""

    lengths: dict[int, LengthSamples] = field(default_factory=dict)
    tokens_per_s: list[float] = field(default_factory=list)
    """Of each run of concurrent streams."""
    stream_gaps_s: list[float] = field(default_factory=list)
    stream_first_token_s: list[float] = field(default_factory=list)
    requests_by_path: dict[str, int] = field(default_factory=dict)
    """How Baton's requests went, warm-up included."""


async def run_serve(
    model: Path, vocabulary: int, settings: ServeSettings, servers: Servers, report: Report
) -> tuple[SideSamples, SideSamples]:
    """Measure plain vLLM and Baton in turn.

    Raises:
        BenchFailed
    """
    plain, baton = SideSamples(), SideSamples()
    args = settings.server_args()
    for i in range(settings.rounds):
        for start, samples in ((servers.plain, plain), (servers.baton, baton)):
            name = "Baton" if samples is baton else "plain vLLM"
            report(f"round {i + 1} of {settings.rounds}: starting {name}")
            async with start(model, args) as server, Client(server.url, MODEL_NAME) as client:
                report(f"measuring {name}")
                await _Side(
                    client, samples, settings, vocabulary, str(i), samples is baton, report
                ).measure()
    return plain, baton


@dataclass(slots=True)
class _Side:
    client: Client
    samples: SideSamples
    settings: ServeSettings
    vocabulary: int
    round_name: str
    is_baton: bool
    report: Report

    async def measure(self) -> None:
        settings = self.settings
        self.report("  warming up")
        for tokens in settings.prompt_tokens:
            await self._complete("warm-up", tokens, settings.output_tokens)
        for tokens in settings.prompt_tokens:
            repeats = settings.repeats_of(tokens)
            self.report(f"  {repeats} prompts of {tokens} tokens")
            samples = self.samples.lengths.setdefault(tokens, LengthSamples())
            for i in range(repeats):
                stream = await self._complete(str(i), tokens, settings.output_tokens)
                samples.add(stream)
                if self.is_baton:
                    samples.after_prefill_s += await self._after_prefill_s(stream)
        self.report(
            f"  {settings.streams} concurrent streams of {settings.stream_prompt_tokens} tokens"
        )
        for i in range(settings.stream_repeats):
            await self._measure_streams(i)
        if self.is_baton:
            by_path = (await self.client.router_state())["requests_by_path"]
            for path, count in by_path.items():
                total = self.samples.requests_by_path
                total[path] = total.get(path, 0) + count

    async def _complete(self, which: str, tokens: int, output_tokens: int) -> Stream:
        seed = f"{self.round_name}/{tokens}/{which}"
        return await self.client.complete(
            random_prompt(seed, tokens, self.vocabulary), output_tokens
        )

    async def _after_prefill_s(self, stream: Stream) -> list[float]:
        rows = (await self.client.router_state())["recent_first_tokens"]
        return [
            stream.token_times_s[0] - row["step_ended_monotonic_s"]
            for row in rows
            if row["request_id"].startswith(f"{stream.request_id}-")
        ]

    async def _measure_streams(self, repeat: int) -> None:
        settings = self.settings
        started_s = time.monotonic()
        streams = await asyncio.gather(
            *(
                self._complete(
                    f"stream {repeat}/{i}",
                    settings.stream_prompt_tokens,
                    settings.stream_output_tokens,
                )
                for i in range(settings.streams)
            )
        )
        ended_s = max(stream.token_times_s[-1] for stream in streams)
        tokens = sum(len(stream.token_times_s) for stream in streams)
        self.samples.tokens_per_s.append(tokens / (ended_s - started_s))
        self.samples.stream_first_token_s += [stream.first_token_s for stream in streams]
        for stream in streams:
            self.samples.stream_gaps_s += stream.gaps_s


def summary(
    machine: dict[str, Any],
    model: dict[str, Any],
    settings: ServeSettings,
    plain: SideSamples,
    baton: SideSamples,
) -> dict[str, Any]:
    """The report as one JSON object. Times are medians in milliseconds unless they say p99."""
    results = {
        str(tokens): _length_result(plain.lengths[tokens], baton.lengths[tokens])
        for tokens in settings.prompt_tokens
    }
    return {
        "bench": "serve",
        "machine": machine,
        "model": model,
        "settings": {
            **{k: v for k, v in asdict(settings).items() if k != "rounds"},
            "max_model_len": settings.max_model_len,
            "dtype": "float32",
        },
        "rounds": settings.rounds,
        "results": results,
        "requests_by_path": baton.requests_by_path,
        "throughput": _throughput(plain, baton),
        "goals": [goal.to_json() for goal in goals_of(results)],
    }


def goals_of(results: dict[str, dict[str, Any]]) -> list[Goal]:
    goals = []
    for tokens, result in results.items():
        ratios = result["ratios"]
        goals += [
            Goal(
                f"first_token_after_prefill_ms_{tokens}",
                result["baton"]["first_token_after_prefill_ms"],
                FIRST_TOKEN_AFTER_PREFILL_MS_MAX,
            ),
            Goal(f"ttft_ratio_{tokens}", ratios["ttft"], TTFT_RATIO_MAX),
            Goal(
                f"second_token_plain_steps_{tokens}",
                ratios["second_token_plain_steps"],
                SECOND_TOKEN_PLAIN_STEPS_MAX,
            ),
        ]
    return goals


def _length_result(plain: LengthSamples, baton: LengthSamples) -> dict[str, Any]:
    # Every gap of the plain server is one decode step, the first one too.
    plain_step_ms = median([*plain.second_token_s, *plain.later_gaps_s], 1e3)
    of_plain = _times(plain) | {"decode_step_ms": plain_step_ms}
    of_baton = _times(baton) | {"first_token_after_prefill_ms": median(baton.after_prefill_s, 1e3)}
    same = sum(a == b for a, b in zip(plain.texts, baton.texts, strict=True))
    return {
        "plain": of_plain,
        "baton": of_baton,
        "ratios": {
            "ttft": ratio(of_baton["ttft_ms"], of_plain["ttft_ms"]),
            "second_token_plain_steps": ratio(of_baton["second_token_ms"], plain_step_ms),
            "inter_token": ratio(of_baton["inter_token_ms"], of_plain["inter_token_ms"]),
        },
        "requests": len(plain.texts),
        "same_text": same,
    }


def _times(samples: LengthSamples) -> dict[str, float | None]:
    return {
        "ttft_ms": median(samples.first_token_s, 1e3),
        "second_token_ms": median(samples.second_token_s, 1e3),
        "inter_token_ms": median(samples.later_gaps_s, 1e3),
    }


def _throughput(plain: SideSamples, baton: SideSamples) -> dict[str, Any]:
    sides = {
        name: {
            "tokens_per_s": median(side.tokens_per_s),
            "ttft_ms": median(side.stream_first_token_s, 1e3),
            "inter_token_ms": median(side.stream_gaps_s, 1e3),
            "inter_token_p99_ms": percentile(side.stream_gaps_s, 99, 1e3),
        }
        for name, side in (("plain", plain), ("baton", baton))
    }
    speeds = sides["baton"]["tokens_per_s"], sides["plain"]["tokens_per_s"]
    return {**sides, "tokens_per_s_ratio": ratio(*speeds)}
