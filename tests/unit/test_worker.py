"""What a worker finds out at its start."""

from __future__ import annotations

import logging

import pytest

from cluster.scheduler.handover import inbox_tokens_max
from workers.worker import warn_of_small_inbox

LLAMA_8B_BYTES = 131_072
"""KV of a token in bfloat16."""


def test_an_inbox_that_is_too_small_for_some_prompts_is_told_with_what_to_set(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, "workers"):
        warn_of_small_inbox(1 << 30, LLAMA_8B_BYTES, 7372)
        assert not caplog.records
        warn_of_small_inbox(1 << 30, LLAMA_8B_BYTES, 32768)
        (record,) = caplog.records
        said = record.getMessage()
        assert "more than 7372 tokens" in said
        assert said.endswith("(32768 tokens) set handoff.inbox_bytes to 4772185885 or more")
        warn_of_small_inbox(4772185885, LLAMA_8B_BYTES, 32768)
    assert inbox_tokens_max(4772185885, LLAMA_8B_BYTES) == 32768
    assert len(caplog.records) == 1
