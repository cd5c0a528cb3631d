"""Hand-offs between workers that differ in block size and prefill chunk: the answers are one plain
vLLM's, and nothing is recomputed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.conftest import MAX_MODEL_LEN
from tests.integration.test_equal_to_plain_vllm import ask, prompt_of
from tests.processes import Cluster, metrics, running_cluster

WORKER_ARGS = {
    "prefill-0": ["--block-size", "32", "--max-num-batched-tokens", "80"],
    "decode-1": ["--block-size", "64", "--max-num-batched-tokens", "150"],
}
LENGTHS = [2, 17, 80, 81, 130, 257, 480]


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory, vllm_args: list[str]) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("ends")
    with running_cluster(folder, vllm_args, worker_args=WORKER_ARGS) as cluster:
        yield cluster


def recomputed(cluster: Cluster) -> float:
    return metrics(cluster.url)['baton_requests_total{path="recomputed"}']


def handed_over(cluster: Cluster) -> float:
    return metrics(cluster.url)['baton_requests_total{path="handed_over"}']


@pytest.mark.parametrize("tokens", LENGTHS)
def test_same_answers(ends: Cluster, plain: str, tokens: int) -> None:
    before = handed_over(ends)
    body = {
        "prompt": prompt_of(tokens, 60),
        "temperature": 0,
        "max_tokens": min(12, MAX_MODEL_LEN - tokens),
        "logprobs": 1,
    }
    assert ask(ends.url, "/v1/completions", body) == ask(plain, "/v1/completions", body)
    assert handed_over(ends) == before + 1
    assert recomputed(ends) == 0
