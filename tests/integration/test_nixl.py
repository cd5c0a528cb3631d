"""Hand-offs by nixl between real workers, one of which has two ranks: the answers are one plain
vLLM's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.test_equal_to_plain_vllm import ask, prompt_of
from tests.nursery import Nursery
from tests.processes import Cluster, metrics, running_cluster
from tests.unit.test_groups import needs_nixl

pytestmark = needs_nixl

LENGTHS = [2, 17, 193, 257, 480]
BY_NIXL = 'baton_handoffs_by_transport_total{instead_of="",transport="nixl"}'


@pytest.fixture(scope="module")
def by_nixl(
    tmp_path_factory: pytest.TempPathFactory, vllm_args: list[str], nursery: Nursery
) -> Iterator[Cluster]:
    handoff = {"overlap": "always", "transport": "nixl"}
    worker_args = {"prefill-0": ["--tensor-parallel-size", "2"]}
    with running_cluster(
        tmp_path_factory.mktemp("nixl"),
        vllm_args,
        handoff=handoff,
        worker_args=worker_args,
        spawn=nursery.spawn,
    ) as cluster:
        yield cluster


def test_same_answers(by_nixl: Cluster, plain: str) -> None:
    for tokens in LENGTHS:
        body = {
            "prompt": prompt_of(tokens, tokens),
            "temperature": 0,
            "max_tokens": 12,
            "logprobs": 1,
        }
        assert ask(by_nixl.url, "/v1/completions", body) == ask(plain, "/v1/completions", body)
    assert metrics(by_nixl.url)[BY_NIXL] == len(LENGTHS)
    assert metrics(by_nixl.url)['baton_requests_total{path="recomputed"}'] == 0
