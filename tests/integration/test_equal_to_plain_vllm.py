"""Whatever is asked, Baton answers as one plain vLLM does, and the KV was handed over."""

from __future__ import annotations

import json
import random
from typing import Any

import httpx
import pytest

from tests.integration.conftest import MAX_MODEL_LEN
from tests.processes import Cluster, metrics, total

WORDS = ("k7=493; k12=018; ", "the ", "k3?", "baton ", "; ", "0 1 2 ")
VOLATILE = ("id", "created", "metrics", "system_fingerprint")


def prompt_of(tokens: int, seed: int = 0) -> list[int]:
    rng = random.Random(f"{tokens} {seed}")
    return [rng.randrange(2, 800) for _ in range(tokens)]


def ask(url: str, path: str, body: dict[str, Any]) -> tuple[int, Any]:
    response = httpx.post(f"{url}{path}", json={"model": "m", **body}, timeout=120)
    return response.status_code, without_volatile(response.json())


def stream(url: str, path: str, body: dict[str, Any]) -> list[Any]:
    """The events of a stream, checked for their framing."""
    body = {"model": "m", **body, "stream": True, "stream_options": {"include_usage": True}}
    with httpx.stream("POST", f"{url}{path}", json=body, timeout=120) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        text = "".join(response.iter_text())
    events = text.removesuffix("\n\n").split("\n\n")
    assert all(event.startswith("data: ") for event in events)
    assert events[-1] == "data: [DONE]"
    return [without_volatile(json.loads(event[len("data: ") :])) for event in events[:-1]]


def without_volatile(value: Any) -> Any:
    """Without what may differ between two servers, and with figures at float32's precision."""
    if isinstance(value, dict):
        return {k: without_volatile(v) for k, v in value.items() if k not in VOLATILE}
    if isinstance(value, list):
        return [without_volatile(item) for item in value]
    if isinstance(value, float):
        return pytest.approx(value, abs=2e-3)
    return value


def merged_stream(events: list[Any]) -> dict[int, dict[str, Any]]:
    """By choice: the text and what came with it. Two servers may cut the chunks differently."""
    merged: dict[int, dict[str, Any]] = {}
    for event in events:
        for choice in event["choices"]:
            into = merged.setdefault(
                choice["index"], {"text": "", "finish": None, "logprobs": [], "calls": ""}
            )
            delta = choice.get("delta") or {}
            into["text"] += choice.get("text") or delta.get("content") or ""
            into["finish"] = choice.get("finish_reason") or into["finish"]
            logprobs = choice.get("logprobs") or {}
            into["logprobs"] += logprobs.get("token_logprobs") or logprobs.get("content") or []
            for call in delta.get("tool_calls") or []:
                function = call.get("function") or {}
                into["calls"] += (function.get("name") or "") + (function.get("arguments") or "")
    return merged


COMPLETIONS: dict[str, dict[str, Any]] = {
    "greedy": {"max_tokens": 24},
    "text prompt": {"prompt": "k7=493; k12=018; k7?", "max_tokens": 12},
    "logprobs": {"max_tokens": 12, "logprobs": 5},
    "stop string": {"max_tokens": 60, "stop": ["4", "k1"]},
    "stop string included": {"max_tokens": 60, "stop": ["4"], "include_stop_str_in_output": True},
    "stop token ids": {"max_tokens": 60, "stop_token_ids": list(range(100, 300))},
    "min tokens": {"max_tokens": 40, "min_tokens": 30, "stop_token_ids": list(range(2, 500))},
    "presence penalty": {"max_tokens": 40, "presence_penalty": 1.7},
    "frequency penalty": {"max_tokens": 40, "frequency_penalty": 1.3},
    "repetition penalty": {"max_tokens": 40, "repetition_penalty": 1.4},
    "all penalties": {
        **{"max_tokens": 40, "presence_penalty": 0.5, "frequency_penalty": 0.9},
        "repetition_penalty": 1.2,
    },
    "logit bias": {"max_tokens": 20, "logit_bias": {"50": 6, "51": 5, "60": -100}},
    "bad words": {"max_tokens": 20, "bad_words": ["4", "5"]},
    # Hot enough that another draw gives another token.
    "seeded": {"max_tokens": 40, "temperature": 2.0, "seed": 1234},
    "seeded top-p top-k": {
        **{"max_tokens": 40, "temperature": 2.0, "seed": 7, "top_p": 0.9, "top_k": 40},
    },
    "seeded n": {"max_tokens": 20, "temperature": 2.0, "seed": 99, "n": 3},
    "seeded prompt in chunks": {
        **{"prompt": prompt_of(450), "max_tokens": 20, "temperature": 2.0, "seed": 3},
    },
    "json schema": {
        "max_tokens": 80,
        "structured_outputs": {
            "json": {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}},
                "required": ["a", "b"],
                "additionalProperties": False,
            }
        },
    },
    "regex": {"max_tokens": 40, "structured_outputs": {"regex": "[a-c]{5}-[0-9]{3}"}},
    "choice": {"max_tokens": 10, "structured_outputs": {"choice": ["alpha", "beta", "gamma"]}},
    "ignore eos": {"max_tokens": 50, "ignore_eos": True},
    "one token": {"max_tokens": 1},
    "two tokens": {"max_tokens": 2},
    "keys of Baton's own": {
        "max_tokens": 12,
        "vllm_xargs": {"baton_resume": ["x"], "baton_resume_vocab": "x", "another": 1},
        "kv_transfer_params": {"baton_send": "x", "baton_receive": "x"},
    },
    "echo": {"max_tokens": 5, "echo": True},
    "prompt logprobs": {"max_tokens": 5, "prompt_logprobs": 2},
    "token ids": {"max_tokens": 12, "return_token_ids": True},
    "batch": {"max_tokens": 8, "prompt": [prompt_of(20, 1), prompt_of(90, 2), prompt_of(5, 3)]},
}


@pytest.mark.parametrize("name", COMPLETIONS)
def test_completion(cluster: Cluster, plain: str, name: str) -> None:
    body = {"prompt": prompt_of(70), "temperature": 0, **COMPLETIONS[name]}
    expected = ask(plain, "/v1/completions", body)
    assert expected[0] == 200
    assert ask(cluster.url, "/v1/completions", body) == expected


@pytest.mark.parametrize("name", [n for n in COMPLETIONS if n not in ("prompt logprobs",)])
def test_completion_stream(cluster: Cluster, plain: str, name: str) -> None:
    # Another prompt than in the test above: nothing of it is in a prefix cache.
    body = {"prompt": prompt_of(71), "temperature": 0, **COMPLETIONS[name]}
    expected, got = (stream(url, "/v1/completions", body) for url in (plain, cluster.url))
    assert merged_stream(got) == merged_stream(expected)
    assert got[-1]["usage"] == expected[-1]["usage"]


LENGTHS = [1, 2, 31, 32, 33, 127, 128, 129, 191, 192, 193, 300, 385, 480, MAX_MODEL_LEN - 1]


@pytest.mark.parametrize("tokens", LENGTHS)
def test_prompt_length(cluster: Cluster, plain: str, tokens: int) -> None:
    """Around the ends of blocks (128 tokens) and prefill chunks (192), up to the model's limit."""
    body = {
        "prompt": prompt_of(tokens, 5),
        "temperature": 0,
        "max_tokens": min(16, MAX_MODEL_LEN - tokens),
        "logprobs": 1,
    }
    assert ask(cluster.url, "/v1/completions", body) == ask(plain, "/v1/completions", body)


def test_repeated_prompt_from_prefix_caches(cluster: Cluster, plain: str) -> None:
    """What prefill finds in its prefix cache fires no layer hook and must be sent all the same; and
    what decode has in its own is not loaded again."""
    for extra in (0, 1, 40, 130):
        body = {
            "prompt": prompt_of(260, 8) + prompt_of(extra, 9),
            "temperature": 0,
            "max_tokens": 12,
        }
        first = ask(plain, "/v1/completions", body)
        for _ in range(2):
            assert ask(cluster.url, "/v1/completions", body) == first


TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "parameters": {
            "type": "object",
            "properties": {"key": {"type": "integer"}},
            "required": ["key"],
            "additionalProperties": False,
        },
    },
}
USER = [{"role": "user", "content": "k7=493; k12=018; k12?"}]
CHATS: dict[str, dict[str, Any]] = {
    "plain": {"messages": USER, "max_tokens": 20},
    "turns": {
        "messages": [*USER, {"role": "assistant", "content": "018"}, *USER],
        "max_tokens": 20,
    },
    "logprobs": {"messages": USER, "max_tokens": 10, "logprobs": True, "top_logprobs": 3},
    "named tool": {
        "messages": USER,
        "max_tokens": 60,
        "tools": [TOOL],
        "tool_choice": {"type": "function", "function": {"name": "look_up"}},
    },
    "auto tool": {"messages": USER, "max_tokens": 20, "tools": [TOOL]},
    "json schema": {
        "messages": USER,
        "max_tokens": 60,
        "response_format": {
            "type": "json_schema",
            "json_schema": {
                "name": "s",
                "schema": {
                    "type": "object",
                    "properties": {"ok": {"type": "boolean"}},
                    "required": ["ok"],
                    "additionalProperties": False,
                },
            },
        },
    },
    "n": {"messages": USER, "max_tokens": 10, "n": 2, "temperature": 0.8, "seed": 5},
}


def without_call_ids(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            k: without_call_ids(v)
            for k, v in value.items()
            if not (k == "id" and str(v).startswith(("call", "chatcmpl-tool")))
        }
    return [without_call_ids(v) for v in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", CHATS)
def test_chat(cluster: Cluster, plain: str, name: str) -> None:
    body = {"temperature": 0, **CHATS[name]}
    expected = ask(plain, "/v1/chat/completions", body)
    assert expected[0] == 200, expected
    got = ask(cluster.url, "/v1/chat/completions", body)
    assert without_call_ids(got) == without_call_ids(expected)


@pytest.mark.parametrize("name", CHATS)
def test_chat_stream(cluster: Cluster, plain: str, name: str) -> None:
    body = {"temperature": 0, **CHATS[name]}
    expected, got = (stream(url, "/v1/chat/completions", body) for url in (plain, cluster.url))
    assert merged_stream(got) == merged_stream(expected)
    assert got[-1]["usage"] == expected[-1]["usage"]


def test_seeds_matter(cluster: Cluster) -> None:
    """Or the comparisons of seeded answers above would show nothing."""
    body = {"prompt": prompt_of(70), "temperature": 2.0, "max_tokens": 20}
    texts = {str(ask(cluster.url, "/v1/completions", {**body, "seed": s})) for s in range(6)}
    assert len(texts) == 6


def test_tokens_come_one_by_one(cluster: Cluster) -> None:
    body = {"prompt": prompt_of(40, 11), "temperature": 0, "max_tokens": 16, "ignore_eos": True}
    events = stream(cluster.url, "/v1/completions", {**body, "return_token_ids": True})
    tokens = [len(c["token_ids"] or ()) for e in events for c in e["choices"]]
    assert sum(tokens) == 16
    # A reader that falls behind may find two waiting; on an idle machine that is the exception.
    assert tokens.count(1) >= 12


BAD: dict[str, tuple[str, Any]] = {
    "prompt too long": ("/v1/completions", {"prompt": prompt_of(MAX_MODEL_LEN + 1)}),
    "max_tokens beyond the model": (
        "/v1/completions",
        {"prompt": prompt_of(10), "max_tokens": 0},
    ),
    "several greedy choices": ("/v1/completions", {"prompt": "x", "temperature": 0, "n": 2}),
    "unknown model": ("/v1/completions", {"model": "other", "prompt": "x"}),
    "wrong type": ("/v1/completions", {"prompt": {"a": 1}}),
    "wrong temperature": ("/v1/completions", {"prompt": "x", "temperature": -1}),
    "empty messages": ("/v1/chat/completions", {"messages": []}),
    "no messages": ("/v1/chat/completions", {}),
    "bad schema": (
        "/v1/completions",
        {"prompt": "x", "structured_outputs": {"regex": "(["}},
    ),
    "token out of range": ("/v1/completions", {"prompt": [999999]}),
    "no such route": ("/v1/nothing", {}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(cluster: Cluster, plain: str, name: str) -> None:
    path, body = BAD[name]
    status, answer = ask(cluster.url, path, body)
    assert (status, answer) == ask(plain, path, body)
    assert 400 <= status < 500
    if path != "/v1/nothing":
        assert answer["error"]["message"]


def test_malformed_json(cluster: Cluster, plain: str) -> None:
    answers = [
        httpx.post(
            f"{url}/v1/completions",
            content=b'{"model": "m", ',
            headers={"content-type": "application/json"},
        )
        for url in (plain, cluster.url)
    ]
    assert answers[0].status_code == answers[1].status_code
    assert 400 <= answers[1].status_code < 500
    assert answers[1].json()["error"]["message"]


def test_routes_are_vllms(cluster: Cluster, plain: str) -> None:
    expected, got = (
        set(httpx.get(f"{url}/openapi.json").json()["paths"]) for url in (plain, cluster.url)
    )
    assert expected <= got


def test_everything_was_handed_over(cluster: Cluster, plain: str) -> None:
    """Runs last in this file: equality means something only if the KV really crossed over."""
    before = metrics(cluster.url)
    for seed in range(8):
        ask(cluster.url, "/v1/completions", {"prompt": prompt_of(100, 100 + seed), "max_tokens": 4})
    after = metrics(cluster.url)

    def grew(name: str) -> float:
        return after[name] - before[name]

    assert grew("baton_handoffs_completed_total") == 8
    assert grew("baton_handoff_tokens_total") == 800
    # 3 layers, keys and values, 2 heads of 64 float32 channels
    assert grew("baton_handoff_bytes_total") == 800 * 3 * 2 * 2 * 64 * 4
    assert total(after, "baton_handoffs_failed_total") == 0
    by_transport = "baton_handoffs_by_transport_total"
    assert after[by_transport + '{instead_of="",transport="collective"}'] >= 8
    assert after["baton_requests_resumed_total"] == 0
    assert after['baton_requests_total{path="recomputed"}'] == 0
