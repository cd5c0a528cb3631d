"""What workers hold in their prefix caches comes to the router, and the router makes use of it."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
from prometheus_client import CollectorRegistry

from cluster.scheduler.policies.splitwise import Splitwise
from cluster.scheduler.scheduler import Scheduler
from cluster.scheduler.view import Pool, WorkerKey, WorkerView
from cluster.wire import worker_pb2
from router.cluster_core import ClusterCore
from router.every_worker import ConnectedWorker
from router.link import WorkerLink
from router.metrics import RouterMetrics
from tests.integration.test_equal_to_plain_vllm import ask as ask_any
from tests.integration.test_equal_to_plain_vllm import prompt_of
from tests.processes import Cluster, metrics

WORDS = " ".join(f"k{i % 7} v{i % 11}" for i in range(60))
BLOCK_TOKENS_MAX = 128
KEY = WorkerKey("decode-1", "i1")


def ask(cluster: Cluster, prompt: str, policy: str | None = None) -> tuple[str, str]:
    """The answer and the placement's reason."""
    answer = httpx.post(
        f"{cluster.url}/v1/completions",
        json={"model": "m", "prompt": prompt, "max_tokens": 6, "temperature": 0},
        headers={} if policy is None else {"X-Baton-Policy": policy},
        timeout=60,
    )
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"], answer.headers["x-baton-placement"]


@pytest.mark.parametrize("policy", [None, "prefix_aware", "predicted_latency"])
def test_a_prompt_that_the_decode_worker_holds_is_not_handed_over_again(
    cluster: Cluster, policy: str | None
) -> None:
    prompt = f"{policy} {WORDS}"
    first, placement = ask(cluster, prompt, policy)
    assert placement.startswith("prefill-0 -> decode-1;")
    # What the last step stored is told with its outputs, or just after them.
    deadline_s = time.monotonic() + 10
    while placement != "decode-1 -> decode-1; prefix held":
        assert time.monotonic() < deadline_s, placement
        again, placement = ask(cluster, prompt, policy)
        assert again == first
    # Another prompt is an ordinary one.
    assert ask(cluster, f"other {policy} {WORDS}", policy)[1].startswith("prefill-0 -> decode-1;")


def test_a_conversations_next_turn_sends_only_what_is_new(cluster: Cluster, plain: str) -> None:
    """Both turns as plain vLLM answers them; of the second, the decode worker has the first."""
    question, follow_up = prompt_of(200, 70_001), prompt_of(120, 70_002)
    body = {"max_tokens": 24, "temperature": 0, "ignore_eos": True, "return_token_ids": True}

    def turn(url: str, prompt: list[int]) -> list[int]:
        status, answer = ask_any(url, "/v1/completions", {**body, "prompt": prompt})
        assert status == 200, answer
        return list(answer["choices"][0]["token_ids"])

    answer = turn(cluster.url, question)
    assert answer == turn(plain, question)
    history = question + answer
    expected = turn(plain, history + follow_up)
    # What the first turn stored is told with its last outputs, or just after them.
    time.sleep(1)
    before = metrics(cluster.url)
    assert turn(cluster.url, history + follow_up) == expected
    after = metrics(cluster.url)

    def grew(name: str) -> float:
        return after[name] - before[name]

    assert grew("baton_handoffs_completed_total") == 1
    held, sent = grew("baton_handoff_held_tokens_total"), grew("baton_handoff_tokens_total")
    assert held + sent == len(history + follow_up)
    assert len(history) - BLOCK_TOKENS_MAX < held <= len(history)


class FakeLink:
    def __init__(self) -> None:
        self.sent: list[worker_pb2.ToEngine] = []

    def send(self, message: worker_pb2.ToEngine) -> None:
        self.sent.append(message)


class OneBlock:
    """A prompt of a single block."""

    def __init__(self, block: int) -> None:
        self.block = block

    def hashes(self, block_tokens: int) -> Any:
        yield self.block


def test_events_that_are_missing_are_noticed_and_asked_for() -> None:
    cache = SimpleNamespace(enable_prefix_caching=True, prefix_caching_hash_algo="sha256")
    scheduler = Scheduler(Splitwise(), new_id=lambda: "x")
    core = ClusterCore(
        cast(Any, SimpleNamespace(cache_config=cache)),
        scheduler,
        RouterMetrics(CollectorRegistry()),
        1.0,
    )
    link = FakeLink()
    worker = ConnectedWorker(KEY, cast(WorkerLink, link), worker_pb2.WorkerDescription())
    scheduler.on_worker_up(WorkerView(KEY, Pool.DECODE, "m", 1000, 1000, block_tokens=16))

    def tell(sequence: int, stored: list[int], reset: bool = False) -> None:
        events = worker_pb2.KvEvents(sequence=sequence, reset=reset, stored=stored)
        core._on_messages(worker, [worker_pb2.FromEngine(kv_events=events)])

    def held(block: int) -> bool:
        return bool(scheduler.prefixes.held_tokens(OneBlock(block)))

    # Before it has told all, changes mean nothing.
    tell(4, [4])
    assert not held(4) and not link.sent
    tell(5, [1, 2], reset=True)
    tell(6, [3])
    assert held(1) and held(3) and not held(4)
    tell(8, [5])
    assert [m.WhichOneof("kind") for m in link.sent] == ["tell_kv"]
    tell(9, [6])
    assert len(link.sent) == 1 and not held(5) and not held(6)
    tell(9, [2, 5, 6], reset=True)
    assert held(5) and held(2) and not held(1)
    tell(10, [7])
    assert held(7) and len(link.sent) == 1
