"""What a request goes on after is what the router says, whatever the client does."""

from __future__ import annotations

from typing import Any

import pytest
from vllm.sampling_params import SamplingParams

from workers.vllm_resume import ResumableRequestState, resume_after

CLIENTS: list[Any] = [["x"], [1], "12", 7, []]


def state_of(params: SamplingParams) -> ResumableRequestState:
    """What the model runner makes of it."""
    return ResumableRequestState(
        req_id="r",
        prompt_token_ids=[5, 6],
        mm_features=[],
        sampling_params=params,
        generator=None,
        block_ids=([0],),
        num_computed_tokens=0,
        output_token_ids=[],
    )


@pytest.mark.parametrize("given", CLIENTS)
@pytest.mark.parametrize("tokens", [[], [3, 4]])
def test_a_clients_word_does_not_count(given: Any, tokens: list[int]) -> None:
    extra = {"baton_resume": given, "baton_resume_vocab": given, "another": 1}
    params = SamplingParams(extra_args=dict(extra))
    resume_after(params, tokens, vocab_size=9)
    assert state_of(params).output_token_ids == tokens
    assert params.extra_args is not None and params.extra_args["another"] == 1


def test_nothing_is_said_of_a_request_that_begins() -> None:
    params = SamplingParams()
    resume_after(params, [], vocab_size=9)
    assert params.extra_args is None
