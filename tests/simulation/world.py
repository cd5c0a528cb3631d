"""A cluster in virtual time: the real scheduler over simulated workers, links and clients.

Everything random comes from one seed, so a seed replays its schedule exactly. The world plays the
router's part (`router/cluster_core.py`): it turns the scheduler's actions into messages and hands
it what workers say. `Books` checks every action and, after each, what the scheduler holds.

A new fault is a method that breaks something and a rate in `Faults`.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cluster.scheduler.life import (
    Action,
    CancelLeg,
    Deliver,
    DropTransfer,
    Finish,
    StartDecode,
    StartLocal,
    StartPrefill,
)
from cluster.scheduler.policies import BUILT_IN, DEFAULT, PolicyOptions, make_policy
from cluster.scheduler.policy import Ask, PlacementPolicy
from cluster.scheduler.scheduler import Scheduler
from cluster.scheduler.view import Pool, WorkerKey, WorkerView
from tests.simulation.books import Books, Client, Violation
from tests.simulation.watched import Watched
from tests.simulation.worker import LONG_MODEL_LEN, SHORT_MODEL_LEN, SimWorker, Spec

TICK_S = 1.0
ARRIVALS_S = 6.0
FAULTS_S = 12.0
END_S = 200.0
"""A world that is not done by then makes no progress."""
TRACE_LINES = 40
PROMPTS_TOKENS = range(1, LONG_MODEL_LEN // 2)
Said = StartPrefill | StartDecode | StartLocal | CancelLeg | DropTransfer
"""Actions that are messages to a worker."""


@dataclass(frozen=True, slots=True)
class Faults:
    """Events in a virtual second, or shares of what they befall."""

    kills_per_s: float = 0.25
    breaks_per_s: float = 0.15
    """A link breaks while its worker lives on: both ends notice, and later it is there again."""
    drains_per_s: float = 0.15
    pool_changes_per_s: float = 0.2
    client_aborts: float = 0.2
    engine_errors: float = 0.02
    failed_transfers: float = 0.1
    answered_cancels: float = 0.5
    """A cancelled leg still says that it was aborted."""


NO_FAULTS = Faults(0, 0, 0, 0, 0, 0, 0, 0)


@dataclass(slots=True, eq=False)
class Link:
    """A stream to a worker: in order both ways until it breaks."""

    worker: SimWorker
    down_at_s: float = 0.0
    up_at_s: float = 0.0
    down_broken: bool = False
    up_ends_s: float = float("inf")


class World:
    def __init__(
        self,
        seed: int,
        faults: Faults | None = None,
        policy: PlacementPolicy | None = None,
        policy_name: str | None = None,
        make_scheduler: Callable[..., Scheduler] = Scheduler,
    ) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        scale = self.random.choice((0.0, 0.5, 1.0, 2.0))
        self.faults = faults or _scaled(Faults(), scale)
        self.now_s = 0.0
        self.workers: dict[WorkerKey, SimWorker] = {}
        """Those that live."""
        self.links: dict[WorkerKey, Link] = {}
        """Those that the router holds open."""
        self.counts: Counter[str] = Counter()
        self._trace: list[tuple[float, str, tuple[object, ...]]] = []
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._incarnations = itertools.count(1)
        self._orphans: set[str] = set()
        """Transfers whose end the router could not tell: left to the inbox's own sweep."""
        leg_suffixes = itertools.count(1)
        options = PolicyOptions(
            local_prompt_tokens=self.random.choice((0, 0, 20)),
            queue_threshold_tokens=self.random.choice((1, 100, 400, 8192)),
            rng=self.random,
        )
        self.policies = {name: Watched(make_policy(name, options)) for name in BUILT_IN}
        policy_name = policy_name or self.random.choice((*[DEFAULT] * 3, *BUILT_IN))
        self.policy = Watched(policy) if policy else self.policies[policy_name]
        self.own_policies = self.random.choice((0.0, 0.0, 0.3))
        self.scheduler = make_scheduler(
            policy=self.policy,
            new_id=lambda: str(next(leg_suffixes)),
            queue_deadline_s=self.random.choice((3.0, 30.0)),
        )
        self.books = Books(self.scheduler)
        self._plan()

    def run(self) -> Counter[str]:
        """Play the schedule to its end. Returns how often what happened.

        Raises:
            Violation
        """
        while self._events:
            self.now_s, _, event = heapq.heappop(self._events)
            event()
            if self.now_s > END_S:
                raise Violation(f"no progress: {self.books.unended()} still wait")
        self.books.check_end()
        self.counts["draw"] = sum(p.draws for p in {self.policy, *self.policies.values()})
        for worker in self.workers.values():
            left = set(worker.transfers) - self._orphans
            if worker.legs or left:
                raise Violation(f"{worker.key} still holds legs {set(worker.legs)}, KV {left}")
        return self.counts

    def trace(self, lines: int) -> str:
        """The last events, one a line."""
        return "\n".join(
            f"{at_s:9.3f}  {what:<14} {' '.join(map(str, values))}"
            for at_s, what, values in self._trace[-lines:]
        )

    # --- time and chance

    def at(self, time_s: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time_s, next(self._order), event))

    def after(self, low_s: float, high_s: float, event: Callable[[], None]) -> None:
        self.at(self.now_s + self.random.uniform(low_s, high_s), event)

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def _note(self, what: str, *values: object) -> None:
        self.counts[what] += 1
        self._trace.append((self.now_s, what, values))

    # --- the schedule

    def _plan(self) -> None:
        rng = self.random
        models = rng.choice((("m",), ("m",), ("m",), ("m", "n")))
        lengths = rng.choice(((LONG_MODEL_LEN,), (LONG_MODEL_LEN, SHORT_MODEL_LEN)))
        for i in range(rng.randint(1, 5)):
            pool = rng.choice(tuple(Pool))
            # The first takes every prompt: with nothing broken, nothing has to fail.
            length = rng.choice(lengths) if i else LONG_MODEL_LEN
            self._start_worker(f"w{i}", pool, rng.choice(models), length)
        for i in range(rng.randint(2, 14)):
            spec = Spec(
                request_id=f"r{i}",
                # Now and then one that fits a short model by a single token.
                prompt_tokens=rng.choice((*rng.choices(PROMPTS_TOKENS, k=5), SHORT_MODEL_LEN - 1)),
                max_tokens=rng.choice((1, 2, 5, 20, 40, LONG_MODEL_LEN)),
                stops_after=rng.choice((1, 2, 4, 15, 30, LONG_MODEL_LEN * 2)),
                can_hand_over=rng.random() < 0.9,
            )
            arrives_s = rng.uniform(0.0, ARRIVALS_S)
            self.at(arrives_s, lambda spec=spec: self._arrive(spec))  # type: ignore[misc]
            if self.chance(self.faults.client_aborts):
                leaves_s = arrives_s + rng.choice((0.0, 0.2, 1.0, 4.0)) * rng.random()
                self.at(leaves_s, lambda spec=spec: self._leave(spec))  # type: ignore[misc]
        self._plan_faults(self.faults.kills_per_s, self._kill)
        self._plan_faults(self.faults.breaks_per_s, self._break_link)
        self._plan_faults(self.faults.drains_per_s, self._drain)
        self._plan_faults(self.faults.pool_changes_per_s, self._change_pool)
        self.at(FAULTS_S, self._heal)
        self.at(TICK_S, self._tick)

    def _plan_faults(self, per_s: float, fault: Callable[[], None]) -> None:
        time_s = 0.0
        while per_s > 0 and (time_s := time_s + self.random.expovariate(per_s)) < FAULTS_S:
            self.at(time_s, fault)

    def _start_worker(self, worker_id: str, pool: Pool, model: str, length: int) -> None:
        key = WorkerKey(worker_id, f"i{next(self._incarnations)}")
        worker = self.workers[key] = SimWorker(self, key, pool, model, length)
        self.after(0.0, 0.1, lambda: self._connect(worker))

    def _kill(self) -> None:
        if not self.workers:
            return
        worker = self.random.choice(list(self.workers.values()))
        self._note("kill", worker.key)
        del self.workers[worker.key]
        worker.die()
        self._cut(worker)
        if self.chance(0.7):
            pool = self.random.choice(tuple(Pool))
            self.after(
                0.1,
                5.0,
                lambda: self._start_worker(
                    worker.key.worker_id, pool, worker.model, worker.model_len_tokens
                ),
            )

    def _break_link(self) -> None:
        links = [link for link in self.links.values() if not link.down_broken]
        if not links:
            return
        worker = self.random.choice(links).worker
        self._note("break", worker.key)
        router_notices_s = self._cut(worker)
        worker_notices_s = self.now_s + self.random.uniform(0.0, 1.0)
        self.at(worker_notices_s, worker.end_stream)
        again_s = max(router_notices_s, worker_notices_s) + self.random.uniform(0.01, 1.0)
        self.at(again_s, lambda: self._connect(worker))

    def _cut(self, worker: SimWorker) -> float:
        """What is on its way is lost, or some of it. Returns when the router notices."""
        notices_s = self.now_s + self.random.uniform(0.0, 1.0)
        link = self.links.get(worker.key)
        if link is not None and not link.down_broken:
            link.down_broken = True
            link.up_ends_s = self.random.uniform(self.now_s, notices_s)
            self.at(notices_s, lambda: self._lose(link))
        return notices_s

    def _drain(self) -> None:
        views = list(self.scheduler.view.workers.values())
        if views:
            view = self.random.choice(views)
            view.draining = True
            self._note("drain", view.key)
            self.after(0.5, 6.0, lambda: setattr(view, "draining", False))

    def _change_pool(self) -> None:
        views = list(self.scheduler.view.workers.values())
        if views:
            view = self.random.choice(views)
            view.pool = self.random.choice(tuple(Pool))
            self._note("pool", view.key, view.pool)

    def _heal(self) -> None:
        """From here on nothing breaks, so everything must come to its end."""
        self._note("heal")
        if not any(w.model_len_tokens == LONG_MODEL_LEN for w in self.workers.values()):
            self._start_worker("last", Pool.PREFILL, "m", LONG_MODEL_LEN)

    # --- the router's part ------------------------------------------------------------------------

    def _arrive(self, spec: Spec) -> None:
        self._note("arrive", spec)
        self.books.clients[spec.request_id] = Client(spec)
        ask = Ask(
            spec.request_id, spec.prompt_tokens, spec.max_tokens, can_hand_over=spec.can_hand_over
        )
        policy = None
        if self.chance(self.own_policies):
            policy = self.random.choice(list(self.policies.values()))
        self._carry_out(self.scheduler.on_arrival(ask, self.now_s, policy))

    def _leave(self, spec: Spec) -> None:
        client = self.books.clients[spec.request_id]
        self._note("leave", spec.request_id)
        if not client.ended:
            client.end("left")
        self._carry_out(self.scheduler.on_abort(spec.request_id))

    def _tick(self) -> None:
        self._carry_out(self.scheduler.on_tick(self.now_s))
        self.books.check_queue()
        if self.now_s < FAULTS_S or self.books.unended():
            self.at(self.now_s + TICK_S, self._tick)

    def _connect(self, worker: SimWorker) -> None:
        if not worker.alive:
            return
        self._note("up", worker.key, worker.pool, worker.model, worker.model_len_tokens)
        if worker.key in self.links:
            raise RuntimeError(f"{worker.key} is connected twice")
        self.links[worker.key] = Link(worker, self.now_s, self.now_s)
        view = WorkerView(
            worker.key, worker.pool, worker.model, worker.model_len_tokens, kv_tokens=2000
        )
        self._carry_out(self.scheduler.on_worker_up(view))
        self.books.check_queue()

    def _lose(self, link: Link) -> None:
        key = link.worker.key
        self._note("lost", key)
        del self.links[key]
        self._orphans |= self.books.transfers_to.get(key, set())
        self.books.on_worker_lost(key)
        self._carry_out(self.scheduler.on_worker_lost(key, self.now_s))

    def say(self, worker: SimWorker, leg_id: str, tokens: list[int], finish: Finish | None) -> None:
        self._send_up(worker, lambda: self._on_output(worker, leg_id, tokens, finish))

    def say_adopted(self, worker: SimWorker, leg_id: str, whole: bool) -> None:
        self._send_up(worker, lambda: self._on_adopted(leg_id, whole))

    def _send_up(self, worker: SimWorker, deliver: Callable[[], None]) -> None:
        link = self.links.get(worker.key)
        if link is None:
            return
        link.up_at_s = max(link.up_at_s, self.now_s + self.random.uniform(0.001, 0.1))
        arrives_s = link.up_at_s

        def arrive() -> None:
            if arrives_s <= link.up_ends_s and self.links.get(worker.key) is link:
                deliver()

        self.at(arrives_s, arrive)

    def _send_down(self, key: WorkerKey, action: Action) -> None:
        link = self.links.get(key)
        if link is None:
            return
        link.down_at_s = max(link.down_at_s, self.now_s + self.random.uniform(0.001, 0.1))

        def arrive() -> None:
            if link.worker.alive and not link.down_broken:
                link.worker.handle(action)

        self.at(link.down_at_s, arrive)

    def _on_output(
        self, worker: SimWorker, leg_id: str, tokens: list[int], finish: Finish | None
    ) -> None:
        usage = self.random.random()
        self.scheduler.on_load(worker.key, len(worker.legs), 0, usage)
        life = self.scheduler.life_of_leg(leg_id)
        self._note("output" if life else "late", leg_id, len(tokens), finish or "")
        if life is None:
            return
        self.books.on_output(life.ask.request_id, finish)
        actions = self.scheduler.on_output(leg_id, tokens, finish)
        for action in actions:
            if isinstance(action, Deliver):
                self.books.clients[action.request_id].deliver(tokens, action.finish)
        self._carry_out(actions)

    def _on_adopted(self, leg_id: str, whole: bool) -> None:
        known = self.scheduler.on_adopted(leg_id, whole) is not None
        self._note("adopted" if whole else "recomputed", leg_id, "" if known else "late")

    def _carry_out(self, actions: list[Action]) -> None:
        for action in actions:
            if not isinstance(action, Deliver):
                self._note(type(action).__name__, *_values(action))
            self.books.check_action(action, self.now_s)
            if isinstance(action, Said):
                self._send_down(action.worker, action)
        self.books.check_loads(self.now_s)


def simulate(seed: int, **world: Any) -> Counter[str]:
    """Play one schedule.

    Raises:
        AssertionError: with the seed and the last events.
    """
    played = World(seed, **world)
    try:
        return played.run()
    except Exception as error:
        raise AssertionError(
            f"seed {seed}: {type(error).__name__}: {error}\n{played.trace(TRACE_LINES)}\n"
            f"replay: BATON_SEED={seed} python -m pytest -s tests/simulation/test_random_faults.py"
        ) from error


def _scaled(faults: Faults, scale: float) -> Faults:
    rates = {name: getattr(faults, name) * scale for name in Faults.__slots__ if "per_s" in name}
    return dataclasses.replace(faults, **rates)


def _values(action: Action) -> tuple[object, ...]:
    """An action in a trace: without the tokens themselves."""
    values = (getattr(action, name) for name in action.__slots__)
    return tuple(f"after {len(v)}" if isinstance(v, tuple) else v for v in values)
