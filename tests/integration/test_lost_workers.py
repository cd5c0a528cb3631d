"""Streams of all kinds go on when their worker dies, also by an engine that hangs, and end with an
error, never silently, when no worker is left. Where in a hand-off: see test_real_faults.py."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integration.hanging_worker import HANG_FILE
from tests.integration.test_equal_to_plain_vllm import ask, prompt_of
from tests.nursery import Nursery
from tests.processes import Cluster, metrics, running_cluster, wait_for_workers


@pytest.fixture(scope="module")
def mortal(
    tmp_path_factory: pytest.TempPathFactory, vllm_args: list[str], nursery: Nursery
) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("mortal")
    with running_cluster(folder, vllm_args, spawn=nursery.spawn) as cluster:
        yield cluster


class Reader(threading.Thread):
    """Reads one stream to its end."""

    def __init__(self, url: str, body: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self._url, self._body = url, body
        self.events: list[str] = []
        self.closed = False

    def run(self) -> None:
        with httpx.stream(
            "POST", f"{self._url}/v1/completions", json={**self._body, "stream": True}, timeout=120
        ) as response:
            for line in response.iter_lines():
                if line:
                    self.events.append(line)
        self.closed = True

    def wait_for_tokens(self, count: int) -> None:
        deadline = time.monotonic() + 60
        while len(self.events) < count:
            assert time.monotonic() < deadline
            time.sleep(0.002)

    @property
    def text(self) -> str:
        chunks = [json.loads(e[len("data: ") :]) for e in self.events if e != "data: [DONE]"]
        return "".join(c["text"] for chunk in chunks for c in chunk.get("choices", []))


FEATURES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "penalties": {"temperature": 0, "frequency_penalty": 1.2, "presence_penalty": 0.4},
    "seeded": {"temperature": 2.0, "seed": 17},
    "structured": {
        "temperature": 0,
        "structured_outputs": {"regex": "[a-c0-9]{150}-[0-9]{40}"},
    },
}


@pytest.mark.parametrize("feature", FEATURES)
def test_stream_survives_the_death_of_its_decode_worker(
    mortal: Cluster, plain: str, feature: str
) -> None:
    """Killed in the middle: the rest comes from the worker that is left, token for token."""
    seed = list(FEATURES).index(feature)
    body = {
        "model": "m",
        "prompt": prompt_of(120, 9000 + seed),
        "max_tokens": 180,
        "ignore_eos": "structured" not in feature,
        **FEATURES[feature],
    }
    expected = ask(plain, "/v1/completions", body)[1]["choices"][0]["text"]
    victim = next(name for name in mortal.workers if name.startswith("decode"))
    reader = Reader(mortal.url, body)
    reader.start()
    reader.wait_for_tokens(20)
    mortal.workers.pop(victim).stop(signal.SIGKILL)
    reader.join(60)
    assert reader.closed and reader.events[-1] == "data: [DONE]"
    assert reader.text == expected
    assert metrics(mortal.url)["baton_requests_resumed_total"] >= 1
    mortal.start_worker(f"decode-{100 + seed}", "decode", [1])
    wait_for_workers(mortal, 2)


def test_stream_survives_a_stuck_engine(mortal: Cluster, plain: str, tmp_path: Path) -> None:
    """Its process lives, keeps its lease and answers, but its engine does no step any more."""
    hang = tmp_path / "hang"
    mortal.environment[HANG_FILE] = str(hang)
    mortal.workers.pop(next(n for n in mortal.workers if n.startswith("decode"))).stop()
    sick = mortal.start_worker(
        "decode-150", "decode", [1], "tests.integration.hanging_worker", stuck_after_s=3.0
    )
    wait_for_workers(mortal, 2)
    body = {"model": "m", "prompt": prompt_of(90, 9055), "max_tokens": 180, "ignore_eos": True}
    body["temperature"] = 0
    expected = ask(plain, "/v1/completions", body)[1]["choices"][0]["text"]
    reader = Reader(mortal.url, body)
    reader.start()
    reader.wait_for_tokens(20)
    hang.touch()
    reader.join(60)
    assert reader.closed and reader.events[-1] == "data: [DONE]"
    assert reader.text == expected
    mortal.workers.pop("decode-150")
    assert sick.popen.wait(60) == 1
    assert "the engine is stuck: no step for 3 s" in sick.output()
    mortal.start_worker("decode-151", "decode", [1])
    wait_for_workers(mortal, 2)


def test_no_worker_left_is_an_error_event(mortal: Cluster) -> None:
    """The last test of this cluster: after the headers, an error event and [DONE]."""
    body = {"model": "m", "prompt": prompt_of(60, 9100), "max_tokens": 400, "ignore_eos": True}
    reader = Reader(mortal.url, body)
    reader.start()
    reader.wait_for_tokens(5)
    for name in list(mortal.workers):
        mortal.workers.pop(name).stop(signal.SIGKILL)
    reader.join(60)
    assert reader.closed
    assert reader.events[-1] == "data: [DONE]"
    error = json.loads(reader.events[-2].removeprefix("data: "))["error"]
    assert error["message"] and error["code"] == 500
    # Before the headers, it is a status: an error object, not a hanging connection.
    status, answer = ask(mortal.url, "/v1/completions", {"prompt": "x", "max_tokens": 2})
    assert status == answer["error"]["code"] == 503
    assert "no worker could take it" in answer["error"]["message"]
