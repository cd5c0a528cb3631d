"""What a placement costs: the scheduler alone, without workers, links or HTTP."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from time import perf_counter
from typing import Any

from cluster.bench.report import Goal, machine, median, percentile
from cluster.scheduler.life import Action, Finish, StartDecode, StartLocal, StartPrefill
from cluster.scheduler.policies import DEFAULT, PolicyOptions, make_policy
from cluster.scheduler.policy import Ask
from cluster.scheduler.scheduler import Scheduler
from cluster.scheduler.view import Pool, WorkerKey, WorkerView

GOALS_US = {100: 50.0, 1000: 500.0}
KV_TOKENS = 200_000
MODEL_LEN_TOKENS = 131_072
OUTPUT_TOKENS = 200
PREFILLING_SHARE = 0.1
"""Of the requests in flight, those whose prompt is still computed."""


@dataclass(frozen=True, slots=True)
class SchedulerSettings:
    policy: str = DEFAULT
    workers: tuple[int, ...] = (10, 100, 1000)
    requests_per_worker: int = 16
    """In flight while it is measured."""
    placements: int = 5000
    seed: int = 1


QUICK = SchedulerSettings(workers=(10, 100), requests_per_worker=4, placements=50)


@dataclass(slots=True)
class Times:
    """Seconds, one for each request."""

    arrival: list[float] = field(default_factory=list)
    """The decision, and what the scheduler notes of it."""
    request: list[float] = field(default_factory=list)
    """All the scheduler does for a request, but for its tokens between the first and the last."""
    token: list[float] = field(default_factory=list)
    """One engine step's output of one request."""


class LoadedCluster:
    """Half of the workers in each pool, and always as many requests in flight."""

    def __init__(self, workers: int, settings: SchedulerSettings) -> None:
        self._rng = random.Random(settings.seed)
        ids, self._names = count(), count()
        policy = make_policy(settings.policy, PolicyOptions(rng=self._rng))
        self.scheduler = Scheduler(policy, new_id=lambda: str(next(ids)))
        for i in range(workers):
            pool = Pool.DECODE if i % 2 else Pool.PREFILL
            key = WorkerKey(f"{pool}-{i // 2}", "i1")
            self.scheduler.on_worker_up(
                WorkerView(key, pool, "model", MODEL_LEN_TOKENS, kv_tokens=KV_TOKENS)
            )
        self._keys = list(self.scheduler.view.workers)
        self._prefilling: list[str] = []
        self._decoding: list[str] = []
        """Legs."""
        in_flight = workers * settings.requests_per_worker
        self._prefilling_target = max(1, round(in_flight * PREFILLING_SHARE))
        for _ in range(in_flight):
            self._step(Times(), in_flight)
        self._in_flight = in_flight

    def measure(self, placements: int) -> Times:
        times = Times()
        for _ in range(placements):
            self._step(times, self._in_flight)
        return times

    def _step(self, times: Times, in_flight: int) -> None:
        """A request arrives, one comes to its hand-over, others to a token, and one ends."""
        scheduler, rng = self.scheduler, self._rng
        spent: list[float] = []
        ask = self._ask()
        (start,) = _timed(spent, lambda: scheduler.on_arrival(ask, 0.0))
        assert isinstance(start, StartPrefill | StartLocal)
        times.arrival.append(spent[0])
        self._prefilling.append(start.leg_id)
        if len(self._prefilling) > self._prefilling_target:
            first = _take(self._prefilling, rng)
            actions = _timed(spent, lambda: scheduler.on_output(first, [1], Finish.LENGTH))
            self._decoding += [a.leg_id for a in actions if isinstance(a, StartDecode)]
        for leg in rng.sample(self._decoding, min(8, len(self._decoding))):
            _timed(times.token, lambda leg=leg: scheduler.on_output(leg, [1], None))  # type: ignore[misc]
        if len(self._prefilling) + len(self._decoding) > in_flight and self._decoding:
            last = _take(self._decoding, rng)
            _timed(spent, lambda: scheduler.on_output(last, [1], Finish.STOP))
            times.request.append(sum(spent))
        key = rng.choice(self._keys)
        scheduler.on_load(key, 8, 1, min(1.0, scheduler.view.workers[key].kv_load * 1.02))

    def _ask(self) -> Ask:
        prompt_tokens = min(8192, 1 + int(self._rng.lognormvariate(6.5, 1.0)))
        max_tokens = 2 + int(self._rng.expovariate(1 / OUTPUT_TOKENS))
        return Ask(f"request-{next(self._names)}", prompt_tokens, max_tokens)


def _timed(spent: list[float], call: Callable[[], list[Action]]) -> list[Action]:
    began = perf_counter()
    result = call()
    spent.append(perf_counter() - began)
    return result


def _take(legs: list[str], rng: random.Random) -> str:
    index = rng.randrange(len(legs))
    legs[index], legs[-1] = legs[-1], legs[index]
    return legs.pop()


def run_scheduler(settings: SchedulerSettings, tell: Callable[[str], None]) -> dict[str, Any]:
    """Measure and report: medians, unless they say p99.

    Raises:
        BadPolicy
    """
    host = machine()
    results: dict[str, Any] = {}
    for workers in settings.workers:
        tell(f"{workers} workers")
        cluster = LoadedCluster(workers, settings)
        times = cluster.measure(settings.placements)
        results[str(workers)] = {
            "request_us": median(times.request, 1e6),
            "request_p99_us": percentile(times.request, 99, 1e6),
            "arrival_us": median(times.arrival, 1e6),
            "token_us": median(times.token, 1e6),
        }
    goals = [
        Goal(f"us a placement at {n} workers", results[str(n)]["request_us"], GOALS_US[n])
        for n in settings.workers
        if n in GOALS_US
    ]
    return {
        "benchmark": "scheduler",
        "machine": host,
        "settings": dataclasses.asdict(settings),
        "results": results,
        "goals": [goal.to_json() for goal in goals],
    }
