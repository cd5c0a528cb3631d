"""Classes of requests, and what they are promised."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class SloClass:
    name: str = ""
    ttft_s: float | None = None
    """To the first token."""
    tpot_s: float | None = None
    """From one token to the next."""
    priority: int = 0
    """The lower, the sooner it gets its place."""

    @property
    def promises(self) -> bool:
        return self.ttft_s is not None or self.tpot_s is not None

    def without_targets(self) -> SloClass:
        return replace(self, ttft_s=None, tpot_s=None)


NO_PROMISE = SloClass()
