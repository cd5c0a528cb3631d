"""`X-Baton-Policy` and `X-Baton-Placement` through vLLM's own application."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest

from tests.processes import Cluster, metrics

ORDINARY = {None: "shortest queues", "round_robin": "round robin"}


def told(answer: httpx.Response) -> set[str]:
    """The reasons of all placements, which are from the prefill worker to a decode worker."""
    assert answer.status_code == 200, answer.text
    reasons = set()
    for placement in answer.headers["x-baton-placement"].split(", "):
        workers, reason = placement.split("; ")
        assert re.fullmatch(r"prefill-0 -> decode-\d", workers)
        reasons.add(reason)
    return reasons


def placements(cluster: Cluster, reason: str) -> float:
    return metrics(cluster.url).get(f'baton_placements_total{{reason="{reason}"}}', 0.0)


def post(cluster: Cluster, path: str, policy: str | None = None, **body: Any) -> httpx.Response:
    headers = {} if policy is None else {"X-Baton-Policy": policy}
    body = {"model": "m", "max_tokens": 4, **body}
    return httpx.post(f"{cluster.url}{path}", json=body, headers=headers, timeout=60)


@pytest.mark.parametrize("policy", ORDINARY)
@pytest.mark.parametrize(
    ("body", "engine_requests"),
    [
        ({"prompt": "a b c d"}, 1),
        ({"prompt": "a b c d", "stream": True}, 1),
        ({"prompt": "a b c d", "n": 3}, 3),
        ({"prompt": ["a b c", "d e f", "g h"]}, 3),
        ({"prompt": ["a b c", "d e f"], "n": 2, "stream": True}, 4),
    ],
    ids=["whole", "stream", "n", "batch", "batch-stream"],
)
def test_every_engine_request_is_placed_as_asked(
    cluster: Cluster, body: dict[str, Any], engine_requests: int, policy: str | None
) -> None:
    reason = ORDINARY[policy]
    before = placements(cluster, reason)
    assert told(post(cluster, "/v1/completions", policy, **body)) == {reason}
    assert placements(cluster, reason) == before + engine_requests


def test_a_chat_tells_its_placement(cluster: Cluster) -> None:
    messages = [{"role": "user", "content": "a b c"}]
    for stream in (False, True):
        path, policy = "/v1/chat/completions", "power_of_two"
        answer = post(cluster, path, policy, messages=messages, stream=stream)
        assert told(answer) == {"shorter of two queues"}


def test_one_token_stays_where_it_prefills(cluster: Cluster) -> None:
    answer = post(cluster, "/v1/completions", prompt="a b", max_tokens=1)
    assert answer.headers["x-baton-placement"] == "prefill-0 -> prefill-0; one token only"


def test_an_unknown_policy_is_an_error_in_openais_form(cluster: Cluster) -> None:
    refused = post(cluster, "/v1/completions", "best", prompt="a b")
    error = refused.json()["error"]
    assert refused.status_code == error["code"] == 400
    assert error["type"] == "BadRequestError" and error["param"] == "X-Baton-Policy"
    assert "'best'" in error["message"] and "splitwise" in error["message"]
    # The same keys as in vLLM's own errors.
    wrong = post(cluster, "/v1/completions", prompt="a b", max_tokens=-1)
    assert wrong.status_code == 400 and wrong.json()["error"].keys() == error.keys()
    for answer in (refused, wrong):
        assert "x-baton-placement" not in answer.headers
