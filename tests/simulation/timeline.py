"""Virtual time, chance, and the record of what happened: all that is random comes from one seed,
so a seed replays its schedule exactly."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter
from collections.abc import Callable

Event = Callable[[], None]


class Timeline:
    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        self.now_s = 0.0
        self.counts: Counter[str] = Counter()
        self._events: list[tuple[float, int, Event]] = []
        self._order = itertools.count()
        self._trace: list[tuple[float, str, tuple[object, ...]]] = []

    def next(self) -> Event:
        """The next event, at whose time it is then. There always is one."""
        self.now_s, _, event = heapq.heappop(self._events)
        return event

    def at(self, time_s: float, event: Event) -> None:
        heapq.heappush(self._events, (time_s, next(self._order), event))

    def after(self, low_s: float, high_s: float, event: Event) -> None:
        self.at(self.now_s + low_s + (high_s - low_s) * self.random.random(), event)

    def chance(self, share: float) -> bool:
        return share > 0 and self.random.random() < share

    def note(self, what: str, *values: object) -> None:
        self.counts[what] += 1
        self._trace.append((self.now_s, what, values))

    def trace(self, lines: int) -> str:
        """The last events, one a line."""
        return "\n".join(
            f"{at_s:9.3f}  {what:<14} {' '.join(map(str, values))}"
            for at_s, what, values in self._trace[-lines:]
        )


class Node:
    """A process on a machine of its own."""

    def __init__(self, timeline: Timeline, name: str) -> None:
        self.timeline = timeline
        self.name = name
        self.alive = True
        self.frozen = False
        self.changed_at_s = timeline.now_s
        """When it started, froze, went on or died."""
        self._waiting: list[Event] = []

    @property
    def runs(self) -> bool:
        return self.alive and not self.frozen

    def run(self, event: Event) -> None:
        """Something comes to it, or is due: now, or when it goes on."""
        if self.frozen:
            self._waiting.append(event)
        elif self.alive:
            event()

    def after(self, low_s: float, high_s: float, event: Event) -> None:
        self.timeline.after(low_s, high_s, lambda: self.run(event))

    def freeze(self) -> None:
        self.frozen = True
        self.changed_at_s = self.timeline.now_s

    def thaw(self) -> None:
        self.frozen = False
        self.changed_at_s = self.timeline.now_s
        waiting, self._waiting = self._waiting, []
        for event in waiting:
            self.run(event)

    def end(self) -> None:
        self.alive = self.frozen = False
        self.changed_at_s = self.timeline.now_s
        self._waiting.clear()
