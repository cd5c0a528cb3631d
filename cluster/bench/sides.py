"""What is measured of each side of a comparison: one server, or one cluster, after the other."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from cluster.bench.client import Client, Stream, random_prompt
from cluster.bench.report import median, percentile
from cluster.bench.servers import server_args

LENGTH_STEP = 512

Report = Callable[[str], None]
PrefillEnded = Callable[[Stream], Awaitable[float | None]]
"""When the step that computed a stream's first token ended, by the machine's monotonic clock."""


@dataclass(frozen=True, slots=True)
class CompareSettings:
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
    stream_repeats: int = 5
    rounds: int = 1
    """Of each side in turn."""
    free_front_end: bool = False
    """The vLLM servers' HTTP front ends may use both cores."""
    vllm_args: tuple[str, ...] = ()
    """For every side, behind those that the benchmark gives."""

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


QUICK = CompareSettings(
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
    """From the end of the step that computed the first token, until it is at the client."""
    second_after_prefill_s: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    def add(self, stream: Stream, prefill_ended_s: float | None = None) -> None:
        if prefill_ended_s is not None:
            after = [at_s - prefill_ended_s for at_s in stream.token_times_s[:2]]
            self.after_prefill_s += after[:1]
            self.second_after_prefill_s += after[1:]
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

    def add_paths(self, by_path: dict[str, int]) -> None:
        for path, count in by_path.items():
            self.requests_by_path[path] = self.requests_by_path.get(path, 0) + count


@dataclass(slots=True)
class Side:
    client: Client
    samples: SideSamples
    settings: CompareSettings
    vocabulary: int
    round_name: str
    prefill_ended: PrefillEnded | None
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
                ended = await self.prefill_ended(stream) if self.prefill_ended else None
                samples.add(stream, ended)
        self.report(
            f"  {settings.streams} concurrent streams of {settings.stream_prompt_tokens} tokens"
        )
        for i in range(settings.stream_repeats):
            await self._measure_streams(i)

    async def _complete(self, which: str, tokens: int, output_tokens: int) -> Stream:
        seed = f"{self.round_name}/{tokens}/{which}"
        return await self.client.complete(
            random_prompt(seed, tokens, self.vocabulary), output_tokens
        )

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


def of_router(client: Client) -> PrefillEnded:
    """Baton's router knows, by the worker's clock: on one machine the same monotonic clock."""

    async def prefill_ended(stream: Stream) -> float | None:
        for row in (await client.router_state())["recent_first_tokens"]:
            if row["request_id"].startswith(f"{stream.request_id}-"):
                ended_s: float = row["step_ended_monotonic_s"]
                return ended_s
        return None

    return prefill_ended


def times(samples: LengthSamples) -> dict[str, float | None]:
    return {
        "ttft_ms": median(samples.first_token_s, 1e3),
        "second_token_ms": median(samples.second_token_s, 1e3),
        "inter_token_ms": median(samples.later_gaps_s, 1e3),
    }


def throughput(side: SideSamples) -> dict[str, float | None]:
    return {
        "tokens_per_s": median(side.tokens_per_s),
        "ttft_ms": median(side.stream_first_token_s, 1e3),
        "inter_token_ms": median(side.stream_gaps_s, 1e3),
        "inter_token_p99_ms": percentile(side.stream_gaps_s, 99, 1e3),
    }
