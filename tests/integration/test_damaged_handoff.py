"""KV that arrives damaged is recomputed and counted, and KV that is wrong makes wrong answers:
without the second, the equality shown elsewhere would show nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from cluster.handoff_failure import HandoffFailure
from tests.integration.conftest import CHUNK_TOKENS
from tests.integration.tampering_worker import FAULT_FILE
from tests.integration.test_equal_to_plain_vllm import ask, prompt_of
from tests.nursery import Nursery
from tests.processes import Cluster, metrics, running_cluster, total


@dataclass(frozen=True)
class Tampered:
    cluster: Cluster
    fault_file: Path

    def ask(self, fault: str, seed: int) -> str:
        self.fault_file.write_text(fault)
        return answer(self.cluster.url, seed)


def answer(url: str, seed: int, prompt_tokens: int = 150) -> str:
    body = {"prompt": prompt_of(prompt_tokens, 7000 + seed), "temperature": 0, "max_tokens": 12}
    status, reply = ask(url, "/v1/completions", body)
    assert status == 200, reply
    return str(reply["choices"][0]["text"])


@pytest.fixture(scope="module")
def tampered(
    tmp_path_factory: pytest.TempPathFactory, vllm_args: list[str], nursery: Nursery
) -> Iterator[Tampered]:
    folder = tmp_path_factory.mktemp("tampered")
    fault_file = folder / "fault"
    fault_file.write_text("")
    with running_cluster(
        folder,
        vllm_args,
        prefill_module="tests.integration.tampering_worker",
        environment={FAULT_FILE: str(fault_file)},
        handoff={"overlap": "never"},
        spawn=nursery.spawn,
    ) as cluster:
        yield Tampered(cluster, fault_file)


def test_wrong_kv_makes_wrong_answers(tampered: Tampered, plain: str) -> None:
    expected = [answer(plain, seed) for seed in range(4)]
    assert [tampered.ask("", seed) for seed in range(4)] == expected
    # New prompts: the decode worker has the KV of the others in its prefix cache.
    expected = [answer(plain, seed) for seed in range(10, 14)]
    assert [tampered.ask("silent", seed) for seed in range(10, 14)] != expected


def test_chunks_of_a_prompt_go_in_one_go(tampered: Tampered, plain: str) -> None:
    tampered.fault_file.write_text("")
    before = metrics(tampered.cluster.url)
    expected = answer(plain, 50, 2 * CHUNK_TOKENS + 30)
    assert answer(tampered.cluster.url, 50, 2 * CHUNK_TOKENS + 30) == expected
    after = metrics(tampered.cluster.url)
    tokens = "baton_handoff_tokens_total"
    assert after[tokens] - before[tokens] == 2 * CHUNK_TOKENS + 30


FAULTS = {
    "flipped": "does not match its checksum",
    "truncated": "does not match its checksum",
    "missing": "stream ended before the KV was whole",
    "duplicated": "arrived twice",
    "foreign": "in the stream of",
    "other prompt": "the KV is of another prompt",
    "stale receiver": "it is meant for incarnation an older one",
    "stale sender": "it comes from prefill-0/an older one",
    # Of these two the receiver would never hear.
    "no way": "its sender could not deliver it: 127.0.0.1:9: UNAVAILABLE",
    "no pair": "its sender could not deliver it: asked for decode-1/an older one",
}


# A stale sender's is refused when it opens, or when the decode leg says who was meant.
OPENED_BY = {"stale receiver": [""], "stale sender": ["", "grpc"], "no way": [""], "no pair": [""]}
REASONS = dict.fromkeys(["missing", "no way", "no pair"], HandoffFailure.SENDER)


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_kv_is_recomputed(tampered: Tampered, plain: str, fault: str) -> None:
    seed = 100 + list(FAULTS).index(fault)
    url = tampered.cluster.url
    before = metrics(url)
    assert tampered.ask(fault, seed) == answer(plain, seed)
    after = metrics(url)
    failed, recomputed = "baton_handoffs_failed_total", 'baton_requests_total{path="recomputed"}'
    assert total(after, failed) - total(before, failed) == 1
    why = f'{failed}{{reason="{REASONS.get(fault, HandoffFailure.WRONG)}"}}'
    assert after[why] - before[why] == 1
    assert after[recomputed] - before[recomputed] == 1
    waited = "baton_handoff_exposed_seconds_count"
    assert after[waited] - before[waited] == 1
    row = httpx.get(f"{url}/dashboard/state").json()["recent_handoffs"][0]
    assert row["transport"] in OPENED_BY.get(fault, ["grpc"])
    assert tampered.cluster.router is not None
    last = [li for li in tampered.cluster.router.output().splitlines() if " recomputes " in li][-1]
    assert FAULTS[fault] in last
