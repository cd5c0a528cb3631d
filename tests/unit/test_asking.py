"""What the scheduler is asked of a request."""

from __future__ import annotations

from typing import Any

import pytest
from vllm import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from router.asking import ask_of


@pytest.mark.parametrize(
    ("params", "can"),
    [
        ({}, True),
        ({"skip_reading_prefix_cache": True}, False),
        ({"prompt_logprobs": 1}, False),
        ({"prompt_logprobs": 1, "skip_reading_prefix_cache": False}, False),
    ],
)
def test_what_the_decode_worker_would_compute_anyway_is_not_handed_over(
    params: dict[str, Any], can: bool
) -> None:
    request = EngineCoreRequest(
        request_id="r",
        prompt_token_ids=[5, 6, 7],
        mm_features=None,
        sampling_params=SamplingParams(max_tokens=20, **params),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    ask = ask_of(request)
    assert (ask.can_hand_over, ask.prompt_tokens, ask.max_tokens) == (can, 3, 20)
