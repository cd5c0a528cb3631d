"""Promises, bounds and the queue, through vLLM's own application: a second router with its own
settings, over the same workers."""

from __future__ import annotations

import dataclasses
import hashlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.processes import Cluster, free_port, metrics, wait_for_workers, wait_until_serving

SETTINGS = {
    "router_id": "router-1",
    "worker_requests_max": 1,
    "queue_max": 2,
    "slo_classes": {"strict": {"ttft_s": 0.0005}, "batch": {"priority": 5}},
    "api_key_classes": {hashlib.sha256(b"batch-key").hexdigest(): "batch"},
}
LONG = " ".join(f"k{i % 7}" for i in range(60))


@pytest.fixture(scope="module")
def bounded(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder: Path = tmp_path_factory.mktemp("bounded")
    other = dataclasses.replace(
        cluster,
        url=f"http://127.0.0.1:{free_port()}",
        folder=folder,
        workers={},
        router_settings=SETTINGS,
    )
    router = other.start_router()
    try:
        wait_until_serving(other.url, router)
        wait_for_workers(other, 2)
        yield other
    finally:
        other.stop()


def post(cluster: Cluster, headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
    body = {"model": "m", "prompt": LONG, "max_tokens": 8, "temperature": 0, **body}
    return httpx.post(f"{cluster.url}/v1/completions", json=body, headers=headers, timeout=60)


def refused(cluster: Cluster, reason: str) -> float:
    return metrics(cluster.url)[f'baton_requests_refused_total{{reason="{reason}"}}']


def assert_refused(answer: httpx.Response, message: str) -> None:
    assert answer.status_code == 429, answer.text
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    error = answer.json()["error"]
    assert error["code"] == 429 and error["type"] == "RateLimitError"
    assert message in error["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_more_than_the_queue_holds_is_refused_at_once(bounded: Cluster, stream: bool) -> None:
    # One runs, two wait, and the fourth is one too many.
    fits = post(bounded, prompt=["a b c", "d e f", "g h i"], stream=stream)
    assert fits.status_code == 200, fits.text
    before = refused(bounded, "queue_full")
    assert_refused(post(bounded, prompt=["a", "b", "c", "d"], stream=stream), "waiting already")
    assert refused(bounded, "queue_full") > before
    # The others of the refused request have left nothing behind.
    deadline_s = time.monotonic() + 30
    while (again := post(bounded, prompt=["x", "y", "z"])).status_code != 200:
        assert time.monotonic() < deadline_s, again.text


def test_a_promise_that_cannot_be_kept_is_not_given(bounded: Cluster, cluster: Cluster) -> None:
    strict = {"X-Baton-Class": "strict"}
    # Nobody else is there.
    assert post(bounded, strict, prompt="a b c").status_code == 200
    stop = threading.Event()

    def load() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            assert post(bounded, prompt=f"{number} {LONG}", max_tokens=2).status_code == 200

    thread = threading.Thread(target=load)
    thread.start()
    try:
        for stream in (False, True):
            deadline_s = time.monotonic() + 60
            while (answer := post(bounded, strict, prompt="a b", stream=stream)).status_code == 200:
                assert time.monotonic() < deadline_s, "nothing was refused"
            assert_refused(answer, "")
        assert refused(bounded, "slo") >= 2
    finally:
        stop.set()
        thread.join()
    assert post(bounded, strict, prompt="a b c").status_code == 200


def test_classes_by_name_and_by_key(bounded: Cluster) -> None:
    assert post(bounded, {"Authorization": "Bearer batch-key"}).status_code == 200
    unknown = post(bounded, {"X-Baton-Class": "best"})
    error = unknown.json()["error"]
    assert unknown.status_code == error["code"] == 400
    assert error["param"] == "X-Baton-Class"
    assert error["message"] == "no class is called 'best': there are strict, batch"


@pytest.mark.parametrize("stream", [False, True])
def test_a_number_that_no_worker_can_be_sent_is_the_clients_fault(
    bounded: Cluster, stream: bool
) -> None:
    """And leaves nothing: a worker has room for one request."""
    messages = [{"role": "user", "content": "a"}]
    for url, headers, body, name in (
        ("chat/completions", {"X-Vllm-Priority": "9" * 23}, {"messages": messages}, "priority"),
        ("completions", {}, {"prompt": "a", "top_k": 10**25}, "top_k"),
    ):
        body = {"model": "m", "max_tokens": 8, "stream": stream, **body}
        answer = httpx.post(f"{bounded.url}/v1/{url}", json=body, headers=headers, timeout=60)
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert error["code"] == 400 and name in error["message"]
    assert post(bounded, prompt=["a", "b"]).status_code == 200


def test_those_who_wait_get_their_answers(bounded: Cluster) -> None:
    """Twenty clients over workers of one place: all are answered, a few at a time."""
    answers: list[int] = []

    def ask(number: int) -> None:
        while True:
            answer = post(bounded, prompt=f"{number} a b c")
            if answer.status_code != 429:
                answers.append(answer.status_code)
                return
            time.sleep(0.05)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [200] * 20
