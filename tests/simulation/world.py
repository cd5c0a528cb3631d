"""A cluster in virtual time: real schedulers, real inboxes and the real following of the
membership, over simulated processes and networks.

`faults` says what goes wrong and `chaos` makes it happen; what is said travels by `network` from
`router` to `worker` and back, KV by `kv` from worker to worker. `books` and `watched` check every
step, and the world that everything comes to its end.

A new fault is a rate in `Faults` and a method that breaks something.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

from cluster.membership import WorkerState
from cluster.scheduler.policies import BUILT_IN, DEFAULT, PolicyOptions, make_policy
from cluster.scheduler.policy import PlacementPolicy
from cluster.scheduler.scheduler import Scheduler
from cluster.scheduler.view import NOTHING, Pool, WorkerKey
from tests.simulation.chaos import FAULTS_S, Chaos
from tests.simulation.faults import Faults
from tests.simulation.network import NOTICE_S, SLOW_S, Network
from tests.simulation.redis import LEASE_S, SimRedis
from tests.simulation.requests import LONG_MODEL_LEN, SHORT_MODEL_LEN, Spec
from tests.simulation.router import DESCRIBE_DEADLINE_S, POLL_S, SimRouter
from tests.simulation.timeline import Timeline
from tests.simulation.violation import Violation
from tests.simulation.watched import Watched
from tests.simulation.worker import REDIS_DEADLINE_S, SimWorker

ARRIVALS_S = 6.0
CHECK_S = 1.0
END_S = 120.0
"""A world that is not done by then makes no progress."""
TRACE_LINES = 40
PROMPTS_TOKENS = range(1, LONG_MODEL_LEN // 2)

SILENT_S = LEASE_S + POLL_S + 0.2
"""A router knows by then that a worker is frozen, or its machine gone, if Redis can be asked."""
CONNECTED_S = DESCRIBE_DEADLINE_S + LEASE_S + 3 * POLL_S
"""It knows by then that a worker is there."""
RENEWS_S = LEASE_S + REDIS_DEADLINE_S + 2 * POLL_S
"""A worker's lapse is told by then, and it has its lease again."""
STUCK_S = 8.0
"""A leg that says nothing for so long on a worker that can is stuck."""


class World:
    def __init__(
        self,
        seed: int,
        faults: Faults | None = None,
        policy: PlacementPolicy | None = None,
        policy_name: str | None = None,
        make_scheduler: Callable[..., Scheduler] = Scheduler,
        requests_max: int | None = None,
    ) -> None:
        timeline = self.timeline = Timeline(seed)
        rng = timeline.random
        self.faults = Faults().drawn(rng) if faults is None else faults
        self.network = Network(timeline, self.faults)
        self.redis = SimRedis(timeline)
        self.workers: dict[str, SimWorker] = {}
        """By name; a new start takes the place of the one before."""
        self.superseded: list[SimWorker] = []
        """Former starts that may live on."""
        self.routers: dict[str, SimRouter] = {}
        self.inbox_bytes = 1000 if timeline.chance(self.faults.full_inboxes) else 10**6
        self.legs_seen: set[str] = set()
        self._ended_routers: list[SimRouter] = []
        self._incarnations = itertools.count(1)
        self._legs = itertools.count(1)
        self._make_scheduler = make_scheduler
        self._gone_s = NOTICE_S[1] + 0.2 + (SLOW_S[1] if self.faults.slow_messages else 0.0)
        """A router knows by then that a worker's process has ended."""
        self._queue_deadline_s = rng.choice((3.0, 30.0))
        bound = rng.choice((0, 0, 0, 1, 4))
        self._requests_max = bound if requests_max is None else requests_max
        options = PolicyOptions(
            local_prompt_tokens=rng.choice((0, 0, 20)),
            queue_threshold_tokens=rng.choice((1, 100, 400, 8192)),
            rng=rng,
            hand_over=rng.choice(("always", "always", "cheaper")),
        )
        self.policies = {name: Watched(make_policy(name, options)) for name in BUILT_IN}
        policy_name = policy_name or rng.choice((*[DEFAULT] * 3, *BUILT_IN))
        self.policy = Watched(policy) if policy else self.policies[policy_name]
        self._own_policies = rng.choice((0.0, 0.0, 0.3))
        self._plan()
        self.chaos = Chaos(self)

    def run(self) -> Counter[str]:
        """Play the schedule to its end. Returns how often what happened.

        Raises:
            Violation
        """
        timeline = self.timeline
        next_check_s = CHECK_S
        while True:
            event = timeline.next()
            if timeline.now_s >= next_check_s:
                next_check_s = timeline.now_s + CHECK_S
                self._check()
                if timeline.now_s > FAULTS_S and self._settled():
                    break
                if timeline.now_s > END_S:
                    raise Violation(f"no progress: {self._unsettled()}")
            event()
        for router in self._all_routers():
            router.books.check_end(router.alive)
        timeline.counts["draw"] = sum(p.draws for p in {self.policy, *self.policies.values()})
        return timeline.counts

    # --- processes, started anew by the controller

    def new_scheduler(self) -> Scheduler:
        return self._make_scheduler(
            policy=self.policy,
            new_id=lambda: str(next(self._legs)),
            queue_deadline_s=self._queue_deadline_s,
            requests_max=self._requests_max,
        )

    def start_router(self, name: str) -> None:
        if name in self.routers:
            self._ended_routers.append(self.routers[name])
        self.routers[name] = SimRouter(self, name)

    def start_worker(
        self, worker_id: str, pool: Pool, model: str, length: int, machine: str = ""
    ) -> None:
        key = WorkerKey(worker_id, f"i{next(self._incarnations)}")
        machine = machine or worker_id
        self.workers[worker_id] = SimWorker(self, key, machine, pool, model, length)

    def start_again(self, ended: SimWorker) -> None:
        pool = self.timeline.random.choice(tuple(Pool))

        def start() -> None:
            if self.workers[ended.key.worker_id] is ended:
                self.start_worker(
                    ended.key.worker_id, pool, ended.model, ended.model_len_tokens, ended.name
                )

        self.timeline.after(0.1, 5.0, start)

    def supersede(self, given_up: SimWorker) -> None:
        """The controller takes it for dead, and starts it anew on another machine. Some time later
        it can end it."""
        self.superseded.append(given_up)
        worker_id, machine = given_up.key.worker_id, f"m{len(self.superseded)}"
        pool = self.timeline.random.choice(tuple(Pool))
        self.start_worker(worker_id, pool, given_up.model, given_up.model_len_tokens, machine)

        def end() -> None:
            if given_up.alive:
                given_up.stop()

        self.timeline.after(1.0, 10.0, end)

    def find_worker(self, key: WorkerKey) -> SimWorker | None:
        """Who listens at the address that the start of a worker had."""
        started = (w for w in (*self.workers.values(), *self.superseded) if w.key == key)
        return next(started, None)

    def start_last_worker(self) -> None:
        """One that takes every prompt, if none is left."""
        alive = [worker for worker in self.workers.values() if worker.alive]
        if not any(worker.model_len_tokens == LONG_MODEL_LEN for worker in alive):
            self.start_worker("last", Pool.PREFILL, "m", LONG_MODEL_LEN)

    # --- the schedule

    def _plan(self) -> None:
        rng = self.timeline.random
        models = rng.choice((("m",), ("m",), ("m",), ("m", "n")))
        lengths = rng.choice(((LONG_MODEL_LEN,), (LONG_MODEL_LEN, SHORT_MODEL_LEN)))
        self.several_routers = rng.random() < 0.4
        for name in ("r0", "r1") if self.several_routers else ("r0",):
            self.start_router(name)
        for i in range(rng.randint(1, 5)):
            # The first takes every prompt: with nothing broken, nothing has to fail.
            length = rng.choice(lengths) if i else LONG_MODEL_LEN
            self.start_worker(f"w{i}", rng.choice(tuple(Pool)), rng.choice(models), length)
        requests = rng.randint(2, 14)
        # Clients of two routers may come with the same ids.
        ids = {name: iter(range(requests)) for name in self.routers}
        for _ in range(requests):
            router = rng.choice(tuple(self.routers))
            self._plan_request(router, f"q{next(ids[router])}")

    def _plan_request(self, router: str, request_id: str) -> None:
        timeline = self.timeline
        rng = timeline.random
        spec = Spec(
            request_id=request_id,
            text=f"{router}:{request_id}",
            # Now and then one that fits a short model by a single token.
            prompt_tokens=rng.choice((*rng.choices(PROMPTS_TOKENS, k=5), SHORT_MODEL_LEN - 1)),
            max_tokens=rng.choice((1, 2, 5, 20, 40, LONG_MODEL_LEN)),
            stops_after=rng.choice((1, 2, 4, 15, 30, LONG_MODEL_LEN * 2)),
            can_hand_over=rng.random() < 0.9,
            opening=rng.randint(0, 3),
        )
        policy = rng.choice(list(self.policies.values()))
        own = policy if timeline.chance(self._own_policies) else None
        arrives_s = rng.uniform(0.0, ARRIVALS_S)

        def come() -> None:
            at = self.routers[router]
            at.run(lambda: at.arrive(spec, own))

        def leave() -> None:
            at = self.routers[router]
            at.run(lambda: at.leave(spec))

        timeline.at(arrives_s, come)
        if timeline.chance(self.faults.client_aborts):
            timeline.at(arrives_s + rng.choice((0.0, 0.2, 1.0, 4.0)) * rng.random(), leave)

    # --- what must hold of the whole

    def _check(self) -> None:
        for worker in self.workers.values():
            for leg in worker.legs.values():
                if worker.runs and not leg.stream.open_at_worker:
                    raise Violation(f"{leg.leg_id} runs for nobody on {worker.key}")
        for router in self.routers.values():
            if router.runs:
                self._check_links(router)
                self._check_progress(router)

    def _check_links(self, router: SimRouter) -> None:
        """A router finds out who is gone, and who is there, and in time."""
        calm_s, now_s = self.network.calm_s, self.timeline.now_s
        for worker in self.workers.values():
            stream = router.links.get(worker.key)
            if stream is None:
                if calm_s(router, worker, self.redis) > CONNECTED_S:
                    raise Violation(f"{router.name} does not use {worker.key}, which is there")
                continue
            if worker.runs:
                continue
            away_s = now_s - max(worker.changed_at_s, stream.opened_at_s)
            ended = not (worker.alive or worker.silent_end or self.network.is_cut(router, worker))
            if ended and min(away_s, calm_s(router)) > self._gone_s:
                raise Violation(f"{router.name} keeps {worker.key}, which ended")
            told_s = min(calm_s(router, self.redis), now_s - router.leases.trusted_from_s)
            if min(away_s, told_s) > SILENT_S:
                raise Violation(f"{router.name} keeps {worker.key}, which is silent")

    def check_lapse(self, router: SimRouter, worker: SimWorker) -> None:
        """Where the worker has its lease, nothing but Redis can have failed it."""
        network, redis = self.network, self.redis
        if self.workers[worker.key.worker_id] is not worker or not worker.runs:
            return
        if worker.record.state is not WorkerState.READY:
            return
        renews_s = min(network.calm_s(worker), network.pair_calm_s(worker, redis))
        if renews_s > RENEWS_S:
            raise Violation(f"{router.name} gives up {worker.key}, which keeps its lease")

    def _check_progress(self, router: SimRouter) -> None:
        for request_id, client in router.books.clients.items():
            placed = client.placed
            if placed is None or client.ended:
                continue
            worker = self.workers.get(placed.leg_worker.worker_id)
            if worker is None or worker.key != placed.leg_worker:
                continue
            quiet_s = self.timeline.now_s - placed.heard_at_s
            if min(quiet_s, self.network.calm_s(router, worker)) > STUCK_S:
                raise Violation(f"{request_id} is stuck: {placed.leg_id} says nothing")

    def _settled(self) -> bool:
        return not self._unsettled()

    def _unsettled(self) -> list[str]:
        """Who still waits, and who still holds something."""
        waiting = [
            f"{router.name}:{request_id} waits"
            for router in self._all_routers()
            for request_id in router.books.unended()
        ]
        holding = [
            f"{worker.key} holds legs {set(worker.legs)}, "
            f"KV of {worker.inbox.transfers_held} in {worker.inbox.bytes_held} bytes"
            for worker in self.workers.values()
            if worker.alive and not worker.idle
        ]
        counting = [
            f"{router.name} counts work on {view.key}"
            for router in self.routers.values()
            for view in router.scheduler.view.workers.values()
            if view.others != NOTHING or view.own != NOTHING
        ]
        return waiting + holding + counting

    def _all_routers(self) -> list[SimRouter]:
        return [*self.routers.values(), *self._ended_routers]


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
            f"seed {seed}: {type(error).__name__}: {error}\n{played.timeline.trace(TRACE_LINES)}\n"
            f"replay: {replay_command(seed)}"
        ) from error


def report(counts: Counter[str]) -> str:
    """How often what happened, one a line."""
    return "\n".join(f"{count:12}  {what}" for what, count in sorted(counts.items()))


def replay_command(seed: int) -> str:
    return f"make fuzz SEED={seed}"
