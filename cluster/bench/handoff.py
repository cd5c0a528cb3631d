"""`baton bench handoff`: Baton's hand-off beside that of vLLM's NixlConnector.

One plain vLLM server, two vLLM servers joined by NixlConnector behind vllm-router, and Baton with a
prefill and a decode worker: the same model, client and prompts, one after the other. What counts is
the time after prefill, from the end of the step that computed the first token. Baton's router tells
when that was; the vLLM servers' scheduler notes it in a file. All are the same monotonic clock.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.bench.client import Client, Stream
from cluster.bench.nixl import nixl
from cluster.bench.report import Goal, median, ratio
from cluster.bench.servers import MODEL_NAME, Server, Servers
from cluster.bench.sides import (
    CompareSettings,
    LengthSamples,
    PrefillEnded,
    Report,
    Side,
    SideSamples,
    of_router,
    throughput,
    times,
)
from cluster.bench.steps import first_token_steps

PLAIN, PEER, BATON = "plain", "nixl", "baton"
FIRST_TOKEN_OF_PEER_MAX = 0.2
SECOND_TOKEN_OF_PEER_MAX = 0.6
TTFT_OF_PLAIN_MAX = 1.05
SHORT_TTFT_OF_PLAIN_MAX = 1.10
SHORT_TOKENS = 1024
"""A prompt of fewer has less computing to hide a hand-off's fixed costs behind."""

Start = Callable[[Path, list[str]], contextlib.AbstractAsyncContextManager[Server]]


async def run_handoff(
    peer_packages: Path | None,
    model: Path,
    vocabulary: int,
    settings: CompareSettings,
    servers: Servers,
    report: Report,
) -> dict[str, SideSamples]:
    """Measure all sides in turn; without `peer_packages`, all but the peer.

    Raises:
        BenchFailed
    """
    starts: dict[str, Start] = {PLAIN: functools.partial(servers.plain, noting=True)}
    if peer_packages is not None:
        starts[PEER] = functools.partial(nixl, servers, peer_packages)
    starts[BATON] = servers.baton
    sides = {name: SideSamples() for name in starts}
    args = settings.server_args()
    for i in range(settings.rounds):
        for name, start in starts.items():
            report(f"round {i + 1} of {settings.rounds}: starting {name}")
            async with start(model, args) as server, Client(server.url, MODEL_NAME) as client:
                report(f"measuring {name}")
                ended = of_steps(server.steps) if server.steps else of_router(client)
                side = Side(client, sides[name], settings, vocabulary, str(i), ended, report)
                await side.measure()
                if name == BATON:
                    sides[name].add_paths((await client.router_state())["requests_by_path"])
    return sides


def of_steps(steps: Path) -> PrefillEnded:
    """By what the scheduler notes. The peer's router asks both of its servers under one id."""

    async def prefill_ended(stream: Stream) -> float | None:
        for request_id, ended_s in first_token_steps(steps).items():
            if request_id.startswith(f"{stream.request_id}-"):
                return ended_s
        return None

    return prefill_ended


def summary(
    machine: dict[str, Any],
    model: dict[str, Any],
    settings: CompareSettings,
    peer_versions: dict[str, str],
    sides: dict[str, SideSamples],
) -> dict[str, Any]:
    """The report as one JSON object. Times are medians in milliseconds unless they say p99."""
    results = {
        str(tokens): _length_result({name: side.lengths[tokens] for name, side in sides.items()})
        for tokens in settings.prompt_tokens
    }
    speeds = {name: throughput(side) for name, side in sides.items()}
    return {
        "bench": "handoff",
        "machine": machine | {"peer": peer_versions},
        "model": model,
        "settings": {
            **asdict(settings),
            "max_model_len": settings.max_model_len,
            "dtype": "float32",
        },
        "results": results,
        "requests_by_path": sides[BATON].requests_by_path,
        "throughput": speeds,
        "goals": [goal.to_json() for goal in goals_of(results, speeds)],
    }


def goals_of(
    results: dict[str, dict[str, Any]], speeds: dict[str, dict[str, float | None]]
) -> list[Goal]:
    goals = []
    for tokens, result in results.items():
        ttft_max = SHORT_TTFT_OF_PLAIN_MAX if int(tokens) < SHORT_TOKENS else TTFT_OF_PLAIN_MAX
        ttft = result[BATON]["of_plain"]["ttft"]
        goals.append(Goal(f"ttft_of_plain_{tokens}", ttft, ttft_max))
        if PEER in result:
            of_peer, name = result["baton_of_nixl"], "token_after_prefill_of_nixl"
            first, second = of_peer["first_token"], of_peer["second_token"]
            goals.append(Goal(f"first_{name}_{tokens}", first, FIRST_TOKEN_OF_PEER_MAX))
            goals.append(Goal(f"second_{name}_{tokens}", second, SECOND_TOKEN_OF_PEER_MAX))
    if PEER in speeds:
        peer, baton = (speeds[name]["tokens_per_s"] for name in (PEER, BATON))
        goals.append(Goal("nixl_tokens_per_s_of_baton", ratio(peer, baton), 1.0))
    return goals


def _length_result(sides: dict[str, LengthSamples]) -> dict[str, Any]:
    """Each side's times; those of all but the plain server also as ratios to the plain server's,
    and Baton's to the peer's."""
    of_sides: dict[str, dict[str, Any]] = {
        name: times(samples)
        | {
            "first_token_after_prefill_ms": median(samples.after_prefill_s, 1e3),
            "second_token_after_prefill_ms": median(samples.second_after_prefill_s, 1e3),
        }
        for name, samples in sides.items()
    }
    plain = of_sides[PLAIN]
    for name, samples in sides.items():
        if name != PLAIN:
            of_plain = _ratios(of_sides[name], plain)
            of_sides[name] |= {
                "of_plain": {"ttft": ratio(of_sides[name]["ttft_ms"], plain["ttft_ms"])} | of_plain,
                "same_text_as_plain": sum(map(str.__eq__, samples.texts, sides[PLAIN].texts)),
            }
    result: dict[str, Any] = {"requests": len(sides[PLAIN].texts), **of_sides}
    if PEER in sides:
        result["baton_of_nixl"] = _ratios(of_sides[BATON], of_sides[PEER])
    return result


def _ratios(side: dict[str, Any], base: dict[str, Any]) -> dict[str, float | None]:
    """Of the times after prefill."""
    return {
        name: ratio(side[key], base[key])
        for name, key in (
            ("first_token", "first_token_after_prefill_ms"),
            ("second_token", "second_token_after_prefill_ms"),
        )
    }
