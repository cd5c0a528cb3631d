"""How a deliberately broken variant is caught."""

from __future__ import annotations

import re
from typing import Any

from tests.simulation.world import simulate

SEEDS = range(600)
"""They pass unbroken."""


def assert_caught(violation: str, **world: Any) -> None:
    """Other rules may be broken by the same variant."""
    seen: set[str] = set()
    for seed in SEEDS:
        try:
            simulate(seed, **world)
        except AssertionError as error:
            message = str(error).partition("\n")[0]
            if re.search(rf"^seed \d+: Violation: .*({violation})", message):
                return
            seen.add(message.partition(": ")[2])
    raise AssertionError(
        f"not caught in {len(SEEDS)} schedules; seen were {sorted(seen)[:5] or 'none'}"
    )
