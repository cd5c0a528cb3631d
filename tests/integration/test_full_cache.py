"""A cache that is nearly full, and one that an operator resets: what is held in it is not in the
way for good, and nobody waits for what has ended."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import msgspec
import pytest

from cluster.wire import worker_pb2
from tests.integration import test_no_leak
from tests.integration.conftest import gated_cluster
from tests.integration.gated_worker import ENGINE
from tests.integration.held import Client, Held, OtherRouter, Watch, wait_until
from tests.integration.test_no_leak import IN_ONE_GO, LAYER_BY_LAYER, asking
from tests.integration.test_no_leak_late import answered, record, recording
from tests.nursery import Nursery
from tests.processes import Cluster, metrics, total

BLOCKS, BLOCK_TOKENS = 16, 32
HELD_BLOCKS = 4
"""A quarter of all is the most."""
watch, idle, starts_idle = test_no_leak.watch, test_no_leak.idle, test_no_leak.starts_idle


@pytest.fixture(scope="module")
def gated(
    tmp_path_factory: pytest.TempPathFactory, vllm_args: list[str], nursery: Nursery
) -> Iterator[Cluster]:
    # One block is vLLM's own.
    size = ["--block-size", str(BLOCK_TOKENS), "--num-gpu-blocks-override", str(BLOCKS + 1)]
    folder = tmp_path_factory.mktemp("small")
    with gated_cluster(folder, [*vllm_args, *size], nursery, decode=1) as running:
        yield running


def paths(watch: Watch) -> dict[str, float]:
    told = metrics(watch.cluster.url)
    return {
        path: told[f'baton_requests_total{{path="{path}"}}']
        for path in ("handed_over", "recomputed")
    }


def test_what_is_held_for_one_lets_by_another_that_needs_all_blocks(
    watch: Watch, idle: Held
) -> None:
    """The one waits behind the other, in vLLM's queue."""
    beginning = asking(HELD_BLOCKS * BLOCK_TOKENS, max_tokens=2)
    answered(watch, beginning)
    behind = asking(100, max_tokens=4)
    behind["prompt"] = [*beginning["prompt"], *behind["prompt"]]
    largest = asking((BLOCKS - 1) * BLOCK_TOKENS - 8, max_tokens=4)
    before, clients = paths(watch), list[Client]()
    completed = metrics(watch.cluster.url)["baton_handoffs_completed_total"]

    def held() -> bool:
        for client in clients:
            client.leave()
        clients.append(Client(watch.cluster.url, behind, True, {"X-Baton-Policy": "prefix_aware"}))
        queued = 1 + len(clients)
        wait_until("queued", lambda: watch.worker("prefill-0")["waiting"] == queued)
        return watch.decode("kv_blocks") == HELD_BLOCKS

    with watch.closed("prefill", ENGINE, "any"):
        first = Client(watch.cluster.url, largest, True)
        wait_until("it is first", lambda: watch.worker("prefill-0")["waiting"] == 1)
        # What the decode worker has stored it tells a moment later.
        wait_until("a beginning is held", held)
    expected = {path: count + 1 for path, count in before.items()}
    wait_until("both have ended", lambda: paths(watch) == expected)
    told = metrics(watch.cluster.url)
    # It had come whole, and is one hand-off.
    assert total(told, "baton_handoffs_failed_total") == 0
    ended = told["baton_handoffs_completed_total"] - completed
    assert ended == sum(expected.values()) - sum(before.values())
    for client in (first, *clients):
        client.leave()
    watch.settles_to(idle)


def called(router: OtherRouter, method: str, *arguments: Any) -> Any:
    encoded = msgspec.msgpack.encode(arguments)
    call = worker_pb2.UtilityCall(call_id=7, method=method, args=encoded)
    router.send(worker_pb2.ToEngine(utility=call))
    reply = router.hears("utility").utility
    assert not reply.error
    return msgspec.msgpack.decode(reply.result)


def test_the_prefix_cache_is_reset_although_some_of_it_is_held(watch: Watch, idle: Held) -> None:
    with recording(watch):
        known = record(watch, answered(watch, asking(LAYER_BY_LAYER - 350))[1])
    with OtherRouter(watch.channel(known.decode_worker)) as router:
        hold = worker_pb2.HoldPrefix(transfer_id="held", request=known.decode.request)
        router.send(worker_pb2.ToEngine(hold=hold))
        wait_until("it is held", lambda: watch.worker(known.decode_worker)["kv_blocks"])
        assert called(router, "reset_prefix_cache") is True
    watch.settles_to(idle)


def test_requests_that_a_pause_ends_are_told(watch: Watch, idle: Held) -> None:
    url, body = f"{watch.cluster.url}/v1/completions", asking(IN_ONE_GO, max_tokens=400)
    (worker_id,) = watch.decode_workers
    with ThreadPoolExecutor(1) as pool, OtherRouter(watch.channel(worker_id)) as router:
        answer = pool.submit(httpx.post, url, json=body, timeout=60)
        wait_until("it decodes", lambda: watch.worker(worker_id)["running"] == 1)
        called(router, "pause_scheduler", "abort", True)
        assert answer.result().json()["choices"][0]["finish_reason"] == "abort"
        called(router, "resume_scheduler")
    watch.settles_to(idle)
