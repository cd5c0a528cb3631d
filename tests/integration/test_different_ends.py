"""Hand-offs between workers that differ in tensor-parallel ranks, block size and prefill chunk: the
answers are one plain vLLM's, and nothing is recomputed."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from cluster import vllm_names
from tests.integration.conftest import MAX_MODEL_LEN
from tests.integration.test_equal_to_plain_vllm import ask, prompt_of, without_volatile
from tests.integration.test_handoff import wait_for, worker_rows
from tests.nursery import Nursery
from tests.processes import Cluster, Process, metrics, running_cluster, shared_memories

TWO_RANKS = ["--tensor-parallel-size", "2"]
WORKER_ARGS = {
    "prefill-0": ["--block-size", "32", "--max-num-batched-tokens", "80"],
    "prefill-1": ["--block-size", "64", "--max-num-batched-tokens", "112", *TWO_RANKS],
    "decode-2": ["--block-size", "96", "--max-num-batched-tokens", "150"],
    "decode-3": ["--block-size", "32", "--max-num-batched-tokens", "96", *TWO_RANKS],
}
PAIRS = [(prefill, decode) for prefill in (0, 1) for decode in (2, 3)]
LENGTHS = [2, 17, 80, 81, 130, 257, 480]
TRIES_MAX = 6


@pytest.fixture(scope="module")
def ends(
    tmp_path_factory: pytest.TempPathFactory, vllm_args: list[str], nursery: Nursery
) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("ends")
    with running_cluster(
        folder,
        vllm_args,
        prefill=2,
        decode=2,
        worker_args=WORKER_ARGS,
        handoff={"transport": "collective"},
        spawn=nursery.spawn,
    ) as cluster:
        yield cluster


def requests_of(cluster: Cluster, path: str) -> float:
    return metrics(cluster.url)[f'baton_requests_total{{path="{path}"}}']


def post(
    cluster: Cluster, body: dict[str, Any], timeout_s: float = 120.0, policy: str = "round_robin"
) -> httpx.Response:
    return httpx.post(
        f"{cluster.url}/v1/completions",
        json={"model": "m", "temperature": 0, **body},
        headers={"X-Baton-Policy": policy},
        timeout=timeout_s,
    )


@pytest.mark.parametrize(("prefill", "decode"), PAIRS)
@pytest.mark.parametrize("tokens", LENGTHS)
def test_same_answers(ends: Cluster, plain: str, prefill: int, decode: int, tokens: int) -> None:
    before = requests_of(ends, "handed_over")
    for number in range(TRIES_MAX):
        body = {
            "prompt": prompt_of(tokens, 100 * number + 10 * prefill + decode),
            "temperature": 0,
            "max_tokens": min(12, MAX_MODEL_LEN - tokens),
            "logprobs": 1,
        }
        answer = post(ends, body)
        expected = ask(plain, "/v1/completions", body)
        assert (answer.status_code, without_volatile(answer.json())) == expected
        assert requests_of(ends, "handed_over") == before + 1 + number
        assert requests_of(ends, "recomputed") == 0
        pair = f"prefill-{prefill} -> decode-{decode};"
        if answer.headers["x-baton-placement"].startswith(pair):
            return
        if number % 2:
            # A prefill alone: the pools' turns are then no longer in step.
            post(ends, {"prompt": prompt_of(2, number), "max_tokens": 1})
    pytest.fail(f"no request went from prefill-{prefill} to decode-{decode}")


def test_ranks_send_by_the_transport_asked_for(ends: Cluster) -> None:
    """Those of a worker and the only one of another."""
    done = metrics(ends.url)
    by_collective = 'baton_handoffs_by_transport_total{instead_of="",transport="collective"}'
    assert done[by_collective] == done["baton_handoffs_completed_total"] > 0


def test_who_leaves_leaves_nothing(ends: Cluster) -> None:
    """Clients that go away while ranks send and receive."""
    for number in range(12):
        body = {"prompt": prompt_of(400, 7000 + number), "max_tokens": 100, "ignore_eos": True}
        with contextlib.suppress(httpx.TimeoutException):
            post(ends, body, timeout_s=0.05 + 0.04 * number, policy="random")

    def nothing_held() -> bool:
        # Workers tell their load with each step: a request for each of them.
        for number in range(2):
            post(ends, {"prompt": prompt_of(100, number), "max_tokens": 3})
        rows = worker_rows(ends).values()
        return all(row["running"] + row["waiting"] + row["inbox_bytes"] == 0 for row in rows)

    wait_for("workers hold nothing", nothing_held)
    receiver = ends.workers["decode-3"].popen.pid
    wait_for("no memory is lent", lambda: shared_memories(receiver) == 0)


def test_what_ranks_share_has_no_name(ends: Cluster) -> None:
    """So nothing is left of it, however they end."""
    for worker in (ends.workers["prefill-1"], ends.workers["decode-3"]):
        pids = [worker.popen.pid, *(rank.pid for rank in ranks_of(worker))]
        maps = "".join(Path(f"/proc/{pid}/maps").read_text() for pid in pids)
        assert "/dev/shm/psm_" in maps and "/dev/shm/vllm_dist_" in maps
        assert not vllm_names.mapped_by(pids)
    assert not [path for path in Path(ends.temporary).rglob("*") if path.is_socket()]


def ranks_of(process: Process) -> list[psutil.Process]:
    children = psutil.Process(process.popen.pid).children(recursive=True)
    return [child for child in children if "resource_tracker" not in " ".join(child.cmdline())]


def test_no_rank_outlives_its_worker(ends: Cluster) -> None:
    """Killed with its ranks in the middle of a step, or frozen."""
    worker = ends.workers["prefill-1"]
    ranks = ranks_of(worker)
    assert len(ranks) == 2
    ranks[0].suspend()
    worker.popen.send_signal(signal.SIGKILL)
    wait_for("no rank is left", lambda: not any(map(alive, ranks)))


def test_a_worker_ends_with_any_of_its_ranks(ends: Cluster) -> None:
    worker = ends.workers["decode-3"]
    ranks = ranks_of(worker)
    assert len(ranks) == 2
    ranks[1].kill()
    assert worker.popen.wait(timeout=30) != 0
    assert "a process of a tensor-parallel rank has ended" in worker.output()
    wait_for("no rank is left", lambda: not any(map(alive, ranks)))
    status, _ = ask(ends.url, "/v1/completions", {"prompt": prompt_of(50, 3), "max_tokens": 4})
    assert status == 200


def alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
