"""LoRA adapters: loaded where they are needed, requests kept together, answers as plain vLLM's."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integration.test_handoff import wait_for
from tests.models import make_random_lora
from tests.nursery import Nursery
from tests.processes import (
    Cluster,
    plain_vllm,
    running_cluster,
    wait_for_workers,
    wait_until_serving,
)

PROMPT = " ".join(f"k{i % 7} v{i % 11}" for i in range(12))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {name: make_random_lora(folder / name, seed) for seed, name in enumerate("abc")}


@pytest.fixture(scope="module")
def lora_args(vllm_args: list[str], adapters: dict[str, Path]) -> list[str]:
    modules = [f"{name}={adapters[name]}" for name in "ab"]
    return [
        *(*vllm_args, "--enable-lora", "--max-loras", "2", "--max-lora-rank", "8"),
        *("--lora-modules", *modules),
    ]


@pytest.fixture(scope="module")
def lora_cluster(
    tmp_path_factory: pytest.TempPathFactory, lora_args: list[str], nursery: Nursery
) -> Iterator[Cluster]:
    allowed = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    with running_cluster(
        tmp_path_factory.mktemp("lora"),
        lora_args,
        decode=2,
        environment=allowed,
        router_environment=allowed,
        spawn=nursery.spawn,
    ) as running:
        yield running


@pytest.fixture(scope="module")
def expected(
    tmp_path_factory: pytest.TempPathFactory, lora_args: list[str], nursery: Nursery
) -> dict[str, str]:
    """Plain vLLM's answers."""
    folder = tmp_path_factory.mktemp("plain")
    with plain_vllm(folder, lora_args, nursery.spawn) as url:
        return {model: ask(url, model)[0] for model in ("m", "a", "b")}


def ask(url: str, model: str, **values: Any) -> tuple[str, str]:
    """The answer and its placement."""
    body = {"model": model, "prompt": PROMPT, "max_tokens": 16, "temperature": 0, **values}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"], answer.headers.get("x-baton-placement", "")


def test_adapters_answer_as_in_plain_vllm(lora_cluster: Cluster, expected: dict[str, str]) -> None:
    assert len(set(expected.values())) == 3, "the adapters change nothing"
    for attempt in range(2):
        for model, text in expected.items():
            answer, placement = ask(lora_cluster.url, model)
            assert answer == text, model
            assert attempt or placement.startswith("prefill-0 -> decode-"), placement


def test_requests_for_an_adapter_stay_together(lora_cluster: Cluster) -> None:
    places = set()
    for _ in range(3):
        # The other decode worker has less to do meanwhile.
        placements = ask(lora_cluster.url, "a", n=4, temperature=1)[1]
        places.update(re.findall(r"-> (decode-\d)", placements))
    assert len(places) == 1


def test_an_adapter_comes_and_goes(lora_cluster: Cluster, adapters: dict[str, Path]) -> None:
    url = lora_cluster.url
    body = {"lora_name": "c", "lora_path": str(adapters["c"])}
    loaded = httpx.post(f"{url}/v1/load_lora_adapter", json=body, timeout=60)
    assert loaded.status_code == 200, loaded.text
    answer = ask(url, "c")[0]
    assert answer not in (ask(url, "a")[0], ask(url, "m")[0])
    unloaded = httpx.post(f"{url}/v1/unload_lora_adapter", json={"lora_name": "c"}, timeout=60)
    assert unloaded.status_code == 200, unloaded.text
    gone = httpx.post(f"{url}/v1/completions", json={"model": "c", "prompt": "x"}, timeout=60)
    assert gone.status_code == 404
    missing = {"lora_name": "d", "lora_path": str(adapters["c"] / "nowhere")}
    refused = httpx.post(f"{url}/v1/load_lora_adapter", json=missing, timeout=60)
    assert 400 <= refused.status_code < 600 and "error" in refused.text


def test_what_one_router_loads_others_have(
    lora_cluster: Cluster, adapters: dict[str, Path]
) -> None:
    """Also one that starts later."""
    url = lora_cluster.url
    load = {"lora_name": "c", "lora_path": str(adapters["c"])}
    assert httpx.post(f"{url}/v1/load_lora_adapter", json=load, timeout=60).status_code == 200
    other, router = lora_cluster.start_another_router()
    wait_until_serving(other, router)
    wait_for_workers(lora_cluster, 3, other)
    assert ask(other, "c")[0] == ask(url, "c")[0]
    assert listed(other) == listed(url) == {"m", "a", "b", "c"}
    unload = {"lora_name": "c"}
    assert httpx.post(f"{other}/v1/unload_lora_adapter", json=unload, timeout=60).status_code == 200
    wait_for("it is unloaded", lambda: listed(url) == {"m", "a", "b"})
    body = {"model": "c", "prompt": "x"}
    assert httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 404
    assert httpx.post(f"{other}/v1/load_lora_adapter", json=load, timeout=60).status_code == 200
    # At once, whether or not it has heard of it.
    assert ask(url, "c")[0] not in (ask(url, "a")[0], ask(url, "m")[0])


def listed(url: str) -> set[str]:
    return {model["id"] for model in httpx.get(f"{url}/v1/models", timeout=60).json()["data"]}
