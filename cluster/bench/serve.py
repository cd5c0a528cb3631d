"""`baton bench serve`: Baton with a prefill and a decode worker beside one plain vLLM server.

Both serve the same model to the same client with the same prompts, one after the other, never at
once. The time from the end of prefill to the first token at the client takes the worker's clock
(the end of the step, as the router tells it) from the client's: on one machine both are the same
monotonic clock.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.bench.client import Client
from cluster.bench.report import Goal, median, ratio
from cluster.bench.servers import MODEL_NAME, Servers
from cluster.bench.sides import (
    CompareSettings,
    LengthSamples,
    Report,
    Side,
    SideSamples,
    of_router,
    throughput,
    times,
)

FIRST_TOKEN_AFTER_PREFILL_MS_MAX = 20.0
TTFT_RATIO_MAX = 1.10
SECOND_TOKEN_PLAIN_STEPS_MAX = 2.0


async def run_serve(
    model: Path, vocabulary: int, settings: CompareSettings, servers: Servers, report: Report
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
                ended = of_router(client) if samples is baton else None
                await Side(client, samples, settings, vocabulary, str(i), ended, report).measure()
                if samples is baton:
                    baton.add_paths((await client.router_state())["requests_by_path"])
    return plain, baton


def summary(
    machine: dict[str, Any],
    model: dict[str, Any],
    settings: CompareSettings,
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
        "throughput": {
            "plain": throughput(plain),
            "baton": throughput(baton),
            "tokens_per_s_ratio": ratio(median(baton.tokens_per_s), median(plain.tokens_per_s)),
        },
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
    of_plain = times(plain) | {"decode_step_ms": plain_step_ms}
    of_baton = times(baton) | {"first_token_after_prefill_ms": median(baton.after_prefill_s, 1e3)}
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
