"""Requests, and what the model says to them: the same wherever it runs."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from cluster.scheduler.life import Finish

LONG_MODEL_LEN = 400
SHORT_MODEL_LEN = 120


@dataclass(frozen=True, slots=True)
class Spec:
    request_id: str
    text: str
    """Tells it from another router's request of the same id."""
    prompt_tokens: int
    max_tokens: int
    stops_after: int
    """Output tokens after which the model is done by itself."""
    can_hand_over: bool
    opening: int
    """Prompts of one opening begin alike."""

    def hashes(self, block_tokens: int) -> Iterator[int]:
        """The prompt's full blocks."""
        for i in range(self.prompt_tokens // block_tokens):
            yield zlib.crc32(f"{self.opening}:{block_tokens}:{i}".encode())

    def finish_at(self, tokens: int, model_len_tokens: int, max_tokens: int) -> Finish | None:
        """How the output ends with its `tokens`-th token."""
        if tokens == self.stops_after:
            return Finish.STOP
        if tokens >= max_tokens or self.prompt_tokens + tokens >= model_len_tokens:
            return Finish.LENGTH
        return None


def token_at(text: str, position: int) -> int:
    """What every worker generates there: the output depends on nothing else."""
    return zlib.crc32(f"{text}:{position}".encode())
