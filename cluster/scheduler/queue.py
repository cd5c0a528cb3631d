"""The order of those that wait for a place: by priority, fairly among tenants, nobody forever."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field

AGING_S = 5.0
"""Having waited this long is worth one priority, as far as anyone is that important."""
SMOOTHING = 0.2
FADE = 0.97
"""What the pace of late counts a second after the next one was due. Whom it refuses cannot show a
better one."""
ENDS_MAX = 64
"""Tenants remembered that don't wait."""


@dataclass(slots=True)
class _Waiting:
    request_id: str
    since_s: float
    priority: int
    tenant: str
    tokens: int
    start: float
    """Its tenant's virtual time when its turn comes."""
    order: int


@dataclass(slots=True)
class FairQueue:
    """Start-time fair queueing (Goyal et al., 1996), over tenants that count alike: a request
    starts where its tenant's last one ended, in tokens, and the smallest start is next. A tenant
    that comes anew starts at the common virtual time, which goes on with every token divided by the
    tenants that wait: so no number of newcomers keeps anyone waiting forever.

    The lower a priority, the sooner. Waiting makes a request more important step by step, but not
    more than the most important that waits; those below 0 stand apart and come first.
    """

    aging_s: float = AGING_S
    _lines: dict[tuple[int, str], dict[str, _Waiting]] = field(default_factory=dict)
    """By priority and tenant, in order of arrival, which is also that of starts."""
    _by_id: dict[str, _Waiting] = field(default_factory=dict)
    _ends: dict[str, float] = field(default_factory=dict)
    """Of each tenant's last request."""
    _virtual: float = 0.0
    _arrivals: int = 0
    _taken_at_s: float | None = None
    """None: nobody was left then."""
    _interval_s: float = 0.0
    """From one that is taken to the next."""
    _seen_at_s: float = 0.0
    """When that was."""

    def __len__(self) -> int:
        return len(self._by_id)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._by_id

    def add(self, request_id: str, now_s: float, priority: int, tenant: str, tokens: int) -> None:
        start = max(self._virtual, self._ends.get(tenant, 0.0))
        self._ends[tenant] = start + tokens
        self._arrivals += 1
        waiting = _Waiting(request_id, now_s, priority, tenant, tokens, start, self._arrivals)
        if not self._by_id:
            self._taken_at_s = now_s
        self._by_id[request_id] = waiting
        self._lines.setdefault((priority, tenant), {})[request_id] = waiting

    def take(self, request_id: str, now_s: float) -> None:
        """It has got its place."""
        waiting = self._by_id[request_id]
        tenants = len({tenant for _, tenant in self._lines})
        self._virtual = max(self._virtual, waiting.start) + waiting.tokens / tenants
        if self._taken_at_s is not None:
            pace_s = self._pace_s(now_s)
            self._interval_s = pace_s + SMOOTHING * (now_s - self._taken_at_s - pace_s)
            self._seen_at_s = now_s
        self._taken_at_s = now_s
        self.remove(request_id)
        if len(self._ends) > 2 * len(self._by_id) + ENDS_MAX:
            self._ends = {t: end for t, end in self._ends.items() if end > self._virtual}

    def remove(self, request_id: str) -> None:
        waiting = self._by_id.pop(request_id, None)
        if waiting is None:
            return
        line = self._lines[waiting.priority, waiting.tenant]
        del line[request_id]
        if not line:
            del self._lines[waiting.priority, waiting.tenant]
        if not self._by_id:
            # Whoever comes next has nobody to be fair to.
            self._ends.clear()
            self._virtual, self._taken_at_s = 0.0, None

    def in_order(self, now_s: float) -> Iterator[str]:
        """Those that wait when it is called for the first time, the next one first. They may be
        taken and removed meanwhile."""
        best = min((priority for priority, _ in self._lines if priority >= 0), default=0)
        # The first of a line comes before the others in it: only the firsts need comparing.
        lines = [iter(list(line.values())) for line in self._lines.values()]
        heap = [
            (self._rank(first, now_s, best), first, line)
            for line in lines
            if (first := next(line, None)) is not None
        ]
        heapq.heapify(heap)
        while heap:
            _, waiting, line = heap[0]
            yield waiting.request_id
            if (following := next(line, None)) is None:
                heapq.heappop(heap)
            else:
                heapq.heapreplace(heap, (self._rank(following, now_s, best), following, line))

    def waiting_longer_than(self, limit_s: float, now_s: float) -> list[str]:
        return [w.request_id for w in self._by_id.values() if now_s - w.since_s > limit_s]

    def wait_s(self, priority: int, now_s: float) -> float:
        """What one more of this priority would wait, at the pace of late."""
        ahead = sum(len(line) for (other, _), line in self._lines.items() if other <= priority)
        return (ahead + 1) * self._pace_s(now_s)

    def _pace_s(self, now_s: float) -> float:
        late_s = now_s - self._seen_at_s - self._interval_s
        return self._interval_s * float(FADE ** max(0.0, late_s))

    def _rank(self, waiting: _Waiting, now_s: float, best: int) -> tuple[int, float, int]:
        if waiting.priority < 0:
            return waiting.priority, waiting.start, waiting.order
        aged = waiting.priority - int((now_s - waiting.since_s) / self.aging_s)
        return max(best, aged), waiting.start, waiting.order
