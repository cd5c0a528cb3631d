"""`baton bench isolation`: the same long prompts for both sides, and what counts of the streams."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace

import pytest

from cluster.bench.client import Stream
from cluster.bench.isolation import (
    QUICK,
    IsolationSettings,
    SideSamples,
    _Side,
    schedule,
    summary,
)
from cluster.bench.report import BenchFailed

SETTINGS = IsolationSettings()


def side(gap_s: float, stall_s: float, tokens_per_s: float) -> SideSamples:
    return SideSamples(
        stream_gaps_s=[gap_s] * 98 + [stall_s] * 2,
        stream_first_token_s=[0.5],
        long_first_token_s=[1.0, 2.0, 4.0],
        tokens_per_s=[tokens_per_s],
    )


def test_long_prompts_come_in_bursts_and_are_the_same_for_the_same_seed() -> None:
    arrivals = schedule(SETTINGS, "0")
    assert arrivals == schedule(SETTINGS, "0") != schedule(SETTINGS, "1")
    assert len(arrivals) == 10 * SETTINGS.burst_prompts
    assert [arrival.at_s for arrival in arrivals] == sorted(arrival.at_s for arrival in arrivals)
    for arrival in arrivals:
        assert 0 <= arrival.at_s % SETTINGS.burst_every_s <= SETTINGS.burst_spread_s
        assert SETTINGS.long_tokens_min <= arrival.prompt_tokens <= SETTINGS.long_tokens_max


def test_servers_have_room_for_the_longest_sequence() -> None:
    assert SETTINGS.max_model_len >= SETTINGS.long_tokens_max + SETTINGS.long_output_tokens
    longer = replace(SETTINGS, stream_prompt_tokens=3000)
    assert longer.max_model_len >= 3000 + SETTINGS.stream_output_tokens


def test_only_what_came_within_the_window_counts() -> None:
    samples = SideSamples()
    before = Stream(started_s=8.0, token_times_s=[9.0, 9.9, 10.5, 11.0])
    within = Stream(started_s=11.0, token_times_s=[11.5, 13.5, 20.5])
    waiting = Stream(started_s=19.0)
    long = [
        Stream(started_s=12.0, token_times_s=[14.0, 14.1]),
        Stream(started_s=19.0, token_times_s=[21.0]),
    ]
    samples.add([before, within, waiting], long, 10.0, 20.0)
    assert samples.stream_gaps_s == [0.5, 2.0]
    assert samples.stream_first_token_s == [0.5]
    assert samples.long_first_token_s == [2.0, 2.0]
    assert samples.long_unanswered == 1
    assert samples.tokens_per_s == [(2 + 2 + 2) / 10]


@pytest.mark.parametrize(
    ("stall_s", "tokens_per_s", "met"),
    [(0.2, 95.0, [True, True]), (0.201, 95.0, [False, True]), (0.1, 94.0, [True, False])],
)
def test_the_goals_are_isolation_at_the_same_throughput(
    stall_s: float, tokens_per_s: float, met: list[bool]
) -> None:
    plain, baton = side(0.02, 0.6, 100.0), side(0.03, stall_s, tokens_per_s)
    report = json.loads(json.dumps(summary({"cores": 2}, {"name": "m"}, SETTINGS, plain, baton)))
    assert [goal["met"] for goal in report["goals"]] == met
    assert report["results"]["plain"]["inter_token_p99_ms"] == 600.0
    assert report["results"]["plain"]["inter_token_p50_ms"] == 20.0
    assert report["results"]["baton"]["long_ttft_ms"] == 2000.0
    assert report["ratios"]["long_ttft"] == 1.0
    assert report["ratios"]["tokens_per_s"] == tokens_per_s / 100


class Answers:
    """A server that answers a token every `gap_s`, and counts what it got."""

    def __init__(self, gap_s: float = 0.001, fail_long: bool = False) -> None:
        self._gap_s = gap_s
        self._fail_long = fail_long
        self.prompts: list[int] = []

    async def complete(
        self, prompt: Sequence[int], output_tokens: int, into: Stream | None = None
    ) -> Stream:
        loop = asyncio.get_running_loop()
        self.prompts.append(len(prompt))
        if self._fail_long and len(prompt) > QUICK.stream_prompt_tokens:
            raise BenchFailed("too long")
        stream = into or Stream()
        stream.started_s = loop.time()
        for _ in range(output_tokens):
            await asyncio.sleep(self._gap_s)
            stream.token_times_s.append(loop.time())
        return stream


def quick_side(servers: list[Answers]) -> _Side:
    settings = replace(QUICK, window_s=0.3, burst_every_s=0.1, burst_spread_s=0.05)
    return _Side(servers, settings, 859, "0", lambda what: None)  # type: ignore[arg-type]


async def test_streams_are_kept_up_and_both_servers_get_as_much() -> None:
    servers, samples = [Answers(), Answers()], SideSamples()
    await quick_side(servers).measure(samples)
    assert len(samples.long_first_token_s) == 6
    assert samples.stream_gaps_s and samples.tokens_per_s[0] > 0
    for server in servers:
        # Three of the bursts' and one to warm up.
        assert sum(tokens > QUICK.stream_prompt_tokens for tokens in server.prompts) == 4
        # More than the first ones: those that ended were followed by others.
        assert sum(tokens == QUICK.stream_prompt_tokens for tokens in server.prompts) > 1
    assert len(asyncio.all_tasks()) == 1


async def test_a_server_that_fails_ends_the_benchmark() -> None:
    with pytest.raises(BenchFailed, match="too long"):
        await quick_side([Answers(fail_long=True)]).measure(SideSamples())
    assert len(asyncio.all_tasks()) == 1
