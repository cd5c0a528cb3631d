"""Redis restarted or gone stops changes, not traffic."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.test_equal_to_plain_vllm import ask, prompt_of
from tests.integration.test_handoff import wait_for
from tests.processes import (
    Cluster,
    free_port,
    metrics,
    start_redis,
    wait_for_workers,
    wait_until_serving,
)


def handed_over(cluster: Cluster, seed: int) -> bool:
    """Whether a request is answered, over both workers."""
    before = metrics(cluster.url)["baton_handoffs_completed_total"]
    body = {"prompt": prompt_of(60, 20_000 + seed), "max_tokens": 4}
    status, answer = ask(cluster.url, "/v1/completions", body)
    assert status == 200, answer
    return metrics(cluster.url)["baton_handoffs_completed_total"] == before + 1


def test_requests_go_on_without_redis(
    tmp_path_factory: pytest.TempPathFactory, vllm_args: list[str]
) -> None:
    folder: Path = tmp_path_factory.mktemp("redis")
    port = free_port()
    redis = start_redis(folder, port)
    url = f"http://127.0.0.1:{free_port()}"
    cluster = Cluster(url, f"redis://127.0.0.1:{port}/0", folder, vllm_args)
    try:
        for core, pool in enumerate(("prefill", "decode")):
            cluster.start_worker(f"{pool}-0", pool, [core])
        router = cluster.start_router()
        wait_until_serving(url, *cluster.processes())
        wait_for_workers(cluster, 2)
        assert handed_over(cluster, 0)

        redis.stop()
        wait_for("the router sees it", lambda: "Redis is out of reach" in router.output())
        assert all(handed_over(cluster, seed) for seed in range(1, 6))

        # An empty one in its place: members write themselves in again.
        redis = start_redis(folder, port)
        wait_for_workers(cluster, 2)
        assert all(handed_over(cluster, seed) for seed in range(6, 9))
        assert metrics(url)["baton_requests_resumed_total"] == 0
    finally:
        cluster.stop()
        redis.stop()
