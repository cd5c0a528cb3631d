"""Which requests leave a draining worker with their KV, and when. SpotServe's choice: what cannot
end before the deadline takes its KV along where that is cheaper than to compute it again; the
others are computed again elsewhere, and until the deadline go on where they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

MARGIN_S = 1.0
"""A router looks at draining workers twice a second."""
SLOWER = 2.0
"""A move may take so many times what it is expected to."""


@dataclass(frozen=True, slots=True)
class MoveCosts:
    kv_s: float
    """To send its KV."""
    recompute_s: float
    """To compute it elsewhere, with what waits there."""
    ends_s: float
    """Until it ends by itself, at the latest."""


def leaving(left_s: float, costs: Mapping[str, MoveCosts]) -> list[str]:
    """The requests that are to send their KV now, what saves most first. None as long as there is
    time: they get on meanwhile, and may end."""
    movable = {
        request_id: cost
        for request_id, cost in costs.items()
        if cost.kv_s < cost.recompute_s and cost.ends_s > left_s
    }
    if left_s > MARGIN_S + SLOWER * sum(cost.kv_s for cost in movable.values()):
        return []
    # Their KV goes out one after the other.
    chosen: list[str] = []
    sent_at_s = 0.0
    for request_id, cost in sorted(movable.items(), key=lambda item: _saved_share(item[1])):
        if sent_at_s + cost.kv_s <= left_s:
            sent_at_s += cost.kv_s
            chosen.append(request_id)
    return chosen


def _saved_share(cost: MoveCosts) -> float:
    """Less is better: what sending takes of what computing would."""
    return cost.kv_s / cost.recompute_s
