"""Faults that befall processes and the network: when, which, and for how long."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from cluster.membership import DrainRequest
from cluster.scheduler.view import Pool
from tests.simulation.redis import SimRedis
from tests.simulation.router import SimRouter
from tests.simulation.timeline import Node
from tests.simulation.worker import SimWorker

if TYPE_CHECKING:
    from tests.simulation.world import World

FAULTS_S = 12.0
"""From here on nothing breaks, so everything must come to its end."""
TROUBLE_S = (0.3, 1.5, 4.0, 10.0)
"""How long a process is frozen or cut off."""
_KINDS: dict[type[Node], str] = {SimRouter: "router", SimWorker: "worker", SimRedis: "redis"}


class Chaos:
    def __init__(self, world: World) -> None:
        self._world = world
        self._timeline = world.timeline
        faults = world.faults
        self._plan(faults.kills_per_s, self._kill)
        self._plan(faults.freezes_per_s, self._freeze)
        self._plan(faults.supersedes_per_s, self._supersede)
        self._plan(faults.cuts_per_s, self._cut)
        self._plan(faults.breaks_per_s, self._break)
        self._plan(faults.drains_per_s, self._drain)
        self._plan(faults.pool_changes_per_s, self._change_pool)
        self._plan(faults.redis_losses_per_s, self._lose_redis)
        self._plan(faults.router_ends_per_s, self._end_router)
        self._timeline.at(FAULTS_S, self._heal)

    def _plan(self, per_s: float, fault: Callable[[], None]) -> None:
        time_s = 0.0
        while per_s > 0:
            time_s += self._timeline.random.expovariate(per_s)
            if time_s >= FAULTS_S:
                return
            self._timeline.at(time_s, fault)

    def _heal(self) -> None:
        world = self._world
        self._timeline.note("heal")
        world.faults = world.network.faults = world.faults.healed()
        for node in self._nodes():
            if node.frozen:
                node.thaw()
        world.network.heal_all()
        if not world.redis.alive:
            world.redis.restart(keeps=True)
        for name, router in list(world.routers.items()):
            if not router.alive:
                world.start_router(name)
        world.start_last_worker()

    # --- processes

    def _kill(self) -> None:
        worker = self._some_worker()
        if worker is None:
            return
        silently = self._timeline.chance(0.3)
        self._timeline.note("kill machine" if silently else "kill", worker.key)
        worker.stop(silently)
        if self._timeline.chance(0.7):
            self._world.start_again(worker)

    def _freeze(self) -> None:
        nodes = [node for node in self._nodes() if node.runs]
        if not nodes:
            return
        self._freeze_node(self._timeline.random.choice(nodes))

    def _freeze_node(self, node: Node) -> None:
        if node.frozen:
            return
        self._timeline.note("freeze", node.name)
        node.freeze()
        for stream in list(self._world.network.streams):
            if node in (stream.router, stream.worker):
                stream.watch_silence()
        self._later(lambda: self._thaw(node))

    def _thaw(self, node: Node) -> None:
        if node.frozen:
            self._timeline.note("thaw", node.name)
            node.thaw()

    def _supersede(self) -> None:
        worker, world = self._some_worker(), self._world
        if worker is None:
            return
        self._timeline.note("supersede", worker.key)
        if self._timeline.chance(0.5):
            self._freeze_node(worker)
        else:
            self._cut_off(worker, [*world.routers.values(), world.redis])
        world.supersede(worker)

    def _end_router(self) -> None:
        routers = [router for router in self._world.routers.values() if router.alive]
        if not routers:
            return
        router = self._timeline.random.choice(routers)
        self._timeline.note("router ends", router.name)
        router.stop()
        wait_s = self._timeline.random.choice((0.1, 1.0, 5.0))

        def start() -> None:
            if self._world.routers[router.name] is router:
                self._world.start_router(router.name)

        self._timeline.at(self._timeline.now_s + wait_s, start)

    def _lose_redis(self) -> None:
        redis = self._world.redis
        if not redis.alive:
            return
        keeps = self._timeline.chance(0.5)
        self._timeline.note("Redis ends" if keeps else "Redis forgets")
        redis.end()
        self._later(lambda: None if redis.alive else redis.restart(keeps))

    # --- the network

    def _cut(self) -> None:
        """One process is cut off from another, or from all."""
        world, rng = self._world, self._timeline.random
        nodes = [*self._nodes(), world.redis]
        node = rng.choice(nodes)
        others = [other for other in nodes if other is not node]
        if not others:
            return
        alone = rng.random() < 0.4
        self._timeline.note("cut off" if alone else "cut", node.name)
        self._cut_off(node, others if alone else [rng.choice(others)])

    def _cut_off(self, node: Node, others: list[Node]) -> None:
        for other in others:
            self._timeline.note(f"cut {_kind(node, other)}", node.name, other.name)
            self._world.network.cut(node, other)

        def heal() -> None:
            self._timeline.note("uncut", node.name)
            for other in others:
                self._world.network.heal(node, other)

        self._later(heal)

    def _break(self) -> None:
        open_streams = self._world.network.streams
        streams = [s for s in open_streams if s.open_at_router and s.open_at_worker]
        if streams:
            stream = self._timeline.random.choice(streams)
            self._timeline.note("break", stream.router.name, stream.worker.key)
            stream.break_off()

    # --- operators

    def _drain(self) -> None:
        worker, redis = self._some_worker(), self._world.redis
        if worker is None or not redis.alive:
            return
        until_s = self._timeline.now_s + self._timeline.random.choice((0.0, 1.0, 3.0, 8.0))
        self._timeline.note("drain", worker.key, f"{until_s:.3f}")
        redis.drains[worker.key.worker_id] = DrainRequest(worker.key.incarnation, until_s)

    def _change_pool(self) -> None:
        worker = self._some_worker()
        if worker is not None:
            pool = self._timeline.random.choice(tuple(Pool))
            self._timeline.note("pool", worker.key, pool)
            worker.label(pool)

    # --- whom

    def _nodes(self) -> list[Node]:
        world = self._world
        former = [worker for worker in world.superseded if worker.alive]
        return [*world.workers.values(), *former, *world.routers.values()]

    def _some_worker(self) -> SimWorker | None:
        alive = [worker for worker in self._world.workers.values() if worker.alive]
        return self._timeline.random.choice(alive) if alive else None

    def _later(self, event: Callable[[], None]) -> None:
        """When the trouble is over."""
        length_s = self._timeline.random.choice(TROUBLE_S) * self._timeline.random.random()
        self._timeline.at(self._timeline.now_s + length_s, event)


def _kind(a: Node, b: Node) -> str:
    return "-".join(sorted(_KINDS[type(node)] for node in (a, b)))
