"""A request's tokens of several steps become one output, and nothing else does."""

from __future__ import annotations

from typing import Any

import pytest
from vllm.v1.engine import EngineCoreEvent, EngineCoreEventType, EngineCoreOutput, FinishReason
from vllm.v1.metrics.stats import PrefillStats

from router.together import Together

EVENT = EngineCoreEvent(EngineCoreEventType.QUEUED, 1.0)


def test_tokens_go_into_the_output_before() -> None:
    together = Together()
    first = EngineCoreOutput("a", [1], events=[EVENT], prefill_stats=PrefillStats())
    assert not together.joins(first)
    other = EngineCoreOutput("b", [7])
    assert not together.joins(other)
    assert together.joins(EngineCoreOutput("a", [2, 3]))
    last = EngineCoreOutput("a", [4], finish_reason=FinishReason.STOP, stop_reason=4)
    assert together.joins(last)
    assert first.new_token_ids == [1, 2, 3, 4]
    assert (first.finish_reason, first.stop_reason) == (FinishReason.STOP, 4)
    assert first.events == [EVENT] and first.prefill_stats is not None
    assert (other.new_token_ids, other.finish_reason) == ([7], None)


@pytest.mark.parametrize(
    "more",
    [
        {"new_logprobs": object()},
        {"pooling_output": object()},
        {"num_nans_in_logits": 1},
        {"kv_transfer_params": {}},
    ],
    ids=lambda more: next(iter(more)),
)
def test_what_has_more_than_tokens_stays_by_itself(more: dict[str, Any]) -> None:
    together = Together()
    before = EngineCoreOutput("a", [1])
    assert not together.joins(before)
    by_itself = EngineCoreOutput("a", [2], **more)
    assert not together.joins(by_itself)
    assert before.new_token_ids == [1]
    # What comes behind it is neither put before it nor into it.
    assert not together.joins(EngineCoreOutput("a", [3]))
    assert before.new_token_ids == [1] and by_itself.new_token_ids == [2]


@pytest.mark.parametrize("begins", [{"events": [EVENT]}, {"prefill_stats": PrefillStats()}])
def test_a_beginning_is_kept(begins: dict[str, Any]) -> None:
    together = Together()
    assert not together.joins(EngineCoreOutput("a", [1]))
    later_leg = EngineCoreOutput("a", [2], **begins)
    assert not together.joins(later_leg)
    assert together.joins(EngineCoreOutput("a", [3]))
    assert later_leg.new_token_ids == [2, 3]
