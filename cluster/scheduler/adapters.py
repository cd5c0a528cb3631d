"""Which LoRA adapters a worker holds: it loads one with the first request for it, and drops the one
used longest ago when it has too many. The router counts along."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Adapters:
    """One worker's."""

    most: int = 0
    """That it holds; 0: as many as there are."""
    most_at_once: int = 0
    """That run in one batch; requests for another wait in the worker. 0: no bound."""
    _running: dict[str, int] = field(default_factory=dict)
    """Requests for each that it holds; the one used last is last."""

    def holds(self, name: str) -> bool:
        return name in self._running

    def has_place(self, name: str) -> bool:
        """A request for it would run at once."""
        busy = sum(running > 0 for other, running in self._running.items() if other != name)
        return not self.most_at_once or busy < self.most_at_once

    def use(self, name: str) -> None:
        self._running[name] = self._running.pop(name, 0) + 1
        for other in [other for other, running in self._running.items() if not running]:
            if len(self._running) <= self.most or not self.most:
                break
            del self._running[other]

    def release(self, name: str) -> None:
        if name in self._running:
            self._running[name] -= 1

    def drop(self, name: str) -> None:
        """It was unloaded."""
        self._running.pop(name, None)
