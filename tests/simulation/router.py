"""A simulated router: the real scheduler, and the real decisions about the membership. It plays
`router/cluster_core.py`, `router/members.py` and `router/peers.py`: actions become messages, and
what workers say goes to the scheduler. Its books check every one of these."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.membership import WorkerRecord, WorkerState
from cluster.scheduler.life import (
    Action,
    CancelLeg,
    Deliver,
    DropTransfer,
    MoveOut,
    StartDecode,
    StartLocal,
    StartPrefill,
    StopAwaiting,
)
from cluster.scheduler.policy import Ask, PlacementPolicy
from cluster.scheduler.slo import SloClass
from cluster.scheduler.view import WorkerKey, WorkerView
from router.following import Leases, Starts, follow, key_of
from router.peers import from_json, to_json, together
from tests.simulation.books import Books, Client
from tests.simulation.kv import GEOMETRY
from tests.simulation.network import Stream
from tests.simulation.redis import LEASE_S
from tests.simulation.requests import Spec
from tests.simulation.timeline import Node
from tests.simulation.worker import REDIS_DEADLINE_S, Adopted, MovedOut, Output, Undelivered

if TYPE_CHECKING:
    from tests.simulation.world import World

POLL_S = 0.5
EXCHANGE_EVERY_S = 0.3
DESCRIBE_DEADLINE_S = 3.0
KV_TOKENS = 2000
LAPSED = "its lease ran out"
Said = StartPrefill | StartDecode | StartLocal | MoveOut | CancelLeg | DropTransfer | StopAwaiting
"""Actions that are messages to a worker."""


class SimRouter(Node):
    def __init__(self, world: World, name: str) -> None:
        super().__init__(world.timeline, name)
        self.world = world
        self.scheduler = world.new_scheduler()
        self.books = Books(self.scheduler, world.legs_seen)
        self.links: dict[WorkerKey, Stream] = {}
        self.records: dict[WorkerKey, WorkerRecord] = {}
        self.connecting: set[WorkerKey] = set()
        self.starts = Starts()
        self.leases = Leases(LEASE_S + REDIS_DEADLINE_S)
        self.heard_at_s = 0.0
        """When it last heard what other routers placed."""
        self.after(0.0, 0.1, self._poll)
        if world.several_routers:
            self.after(0.0, EXCHANGE_EVERY_S, self._exchange)

    # --- clients

    def arrive(self, spec: Spec, policy: PlacementPolicy | None) -> None:
        self.timeline.note("arrive", self.name, spec)
        self.books.clients[spec.request_id] = Client(spec)
        ask = Ask(
            spec.request_id,
            spec.prompt_tokens,
            spec.max_tokens,
            can_hand_over=spec.can_hand_over,
            blocks=spec,
            slo=SloClass(priority=spec.prompt_tokens % 3),
            tenant=f"tenant-{spec.stops_after % 3}",
        )
        self._carry_out(self.scheduler.on_arrival(ask, self.timeline.now_s, policy))

    def leave(self, spec: Spec) -> None:
        client = self.books.clients.get(spec.request_id)
        if client is None:
            return
        self.timeline.note("leave", self.name, spec.request_id)
        if not client.ended:
            client.end("left")
            self.timeline.counts[f"left while {self.scheduler.lives[spec.request_id].phase}"] += 1
        self._carry_out(self.scheduler.on_abort(spec.request_id))

    def stop(self) -> None:
        """The process is gone, with all it knew."""
        self.end()
        for request_id in self.books.unended():
            self.books.clients[request_id].end("lost its connection")
            phase = self.scheduler.lives[request_id].phase
            self.timeline.counts[f"router ended while {phase}"] += 1
        for stream in list(self.links.values()):
            stream.close_at_router()

    # --- the membership

    def _poll(self) -> None:
        redis = self.world.redis
        if self.world.network.reaches(self, redis):
            records, run_id = redis.workers(), str(redis.run_id)
            self.after(0.001, 0.05, lambda: self._polled(records, run_id))
        else:
            self.after(0.0, REDIS_DEADLINE_S, lambda: self._polled(None))

    def _polled(self, records: list[WorkerRecord] | None, run_id: str = "") -> None:
        if records is None:
            self.leases.on_failure()
        else:
            self.leases.on_read(run_id, self.timeline.now_s)
            records = self.starts.latest(records)
            self.books.on_records(records)
            self._follow(records)
        self._carry_out(self.scheduler.on_tick(self.timeline.now_s))
        self.books.check_queue()
        self.after(POLL_S, POLL_S, self._poll)

    def _follow(self, records: list[WorkerRecord]) -> None:
        self.records = {key_of(record): record for record in records}
        now_s = self.timeline.now_s
        tell = self.leases.tell(now_s)
        steps = follow(records, self.scheduler.view, self.connecting, now_s, tell)
        for key in steps.lost:
            if key in self.links:
                self.world.check_lapse(self, self.links[key].worker)
                self.lose(self.links[key], LAPSED)
        for key, left_s in steps.draining.items():
            self._carry_out(self.scheduler.on_draining(key, left_s, now_s))
        for key in steps.evacuate:
            self.timeline.note("evacuate", self.name, key)
            self._count_phases("moved while", key)
            self._carry_out(self.scheduler.on_drain_deadline(key, now_s))
            self.books.check_evacuated(key)
        for record in steps.connect:
            self._connect(record)

    def _exchange(self) -> None:
        redis, now_s = self.world.redis, self.timeline.now_s
        if self.world.network.reaches(self, redis):
            self.heard_at_s = now_s
            redis.put_load(self.name, to_json(self.scheduler.own_load()))
            told = [from_json(placed) for placed in redis.loads_of_others(self.name)]
            self.scheduler.on_others(together(told))
        elif now_s - self.heard_at_s > LEASE_S:
            self.scheduler.on_others({})
        self.books.check_loads(now_s)
        self.after(EXCHANGE_EVERY_S, EXCHANGE_EVERY_S, self._exchange)

    def _connect(self, record: WorkerRecord) -> None:
        key = key_of(record)
        network, timeline = self.world.network, self.timeline
        worker = self.world.find_worker(key)
        self.connecting.add(key)
        waits = True

        def give_up() -> None:
            nonlocal waits
            if waits:
                waits = False
                self.connecting.discard(key)

        def answered() -> None:
            nonlocal waits
            if waits:
                waits = False
                self.connecting.discard(key)
                assert worker is not None
                self._connected(self.records.get(key, record), Stream(network, self, worker))

        def asked() -> None:
            assert worker is not None
            network.carry(worker, self, timeline.now_s + network.delay_s(), answered)

        if worker is None or not worker.alive:
            self.after(0.0, 0.1, give_up)
            return
        self.after(DESCRIBE_DEADLINE_S, DESCRIBE_DEADLINE_S, give_up)
        network.carry(self, worker, timeline.now_s + network.delay_s(), asked)

    def _connected(self, record: WorkerRecord, stream: Stream) -> None:
        worker = stream.worker
        self.timeline.note("up", self.name, worker.key, record.pool, worker.model)
        self.links[worker.key] = stream
        view = WorkerView(
            worker.key,
            record.pool,
            worker.model,
            worker.model_len_tokens,
            KV_TOKENS,
            draining=record.state is WorkerState.DRAINING,
            kv_bytes_per_token=GEOMETRY.bytes_per_token,
            inbox_bytes_max=worker.inbox.max_bytes,
            block_tokens=worker.block_tokens,
        )
        self.books.on_worker_up(view)
        self._carry_out(self.scheduler.on_worker_up(view))
        self.books.check_queue()

    def lose(self, stream: Stream, reason: str) -> None:
        key = stream.worker.key
        if self.links.get(key) is not stream:
            return
        self.timeline.note("lost", self.name, key, reason)
        del self.links[key]
        stream.close_at_router()
        self._count_phases("lost while", key)
        self.books.on_worker_lost(key)
        self._carry_out(self.scheduler.on_worker_lost(key, self.timeline.now_s))

    def _count_phases(self, what: str, key: WorkerKey) -> None:
        for life in self.scheduler.lives.values():
            if life.depends_on(key):
                self.timeline.counts[f"{what} {life.phase}"] += 1

    # --- what workers say

    def hear(self, stream: Stream, message: object) -> None:
        match message:
            case Output():
                self._on_output(stream, message)
            case MovedOut():
                known = self.scheduler.life_of_leg(message.leg_id) is not None
                what = "moved" if message.moved else "moved nothing"
                self.timeline.note(what, message.leg_id, "" if known else "late")
                if known:
                    self.books.on_moved_out(message.leg_id, message.moved)
                now_s = self.timeline.now_s
                self._carry_out(self.scheduler.on_moved_out(message.leg_id, message.moved, now_s))
            case Undelivered():
                self.timeline.note("undelivered", message.transfer_id)
                self.books.undelivered.add(message.transfer_id)
                self._carry_out(self.scheduler.on_undelivered(message.transfer_id, "no way"))
            case Adopted():
                life = self.scheduler.on_adopted(message.leg_id, message.whole, message.exposed_s)
                known = life is not None
                what = "adopted" if message.whole else "recomputed"
                self.timeline.note(what, message.leg_id, "" if known else "late")
                if known:
                    self.books.on_progress(message.leg_id, self.timeline.now_s)

    def _on_output(self, stream: Stream, output: Output) -> None:
        tokens = list(output.tokens)
        worker, usage = stream.worker, self.timeline.random.random()
        held_bytes = worker.inbox.bytes_held
        self.scheduler.on_load(worker.key, len(worker.legs), 0, usage, held_bytes)
        self.scheduler.on_step(worker.key, self.timeline.now_s, {output.leg_id: None})
        self.scheduler.prefixes.stored(worker.key, output.stored)
        life = self.scheduler.life_of_leg(output.leg_id)
        what = f"output {life.phase}" if life else "late output"
        self.timeline.note(what, output.leg_id, len(tokens), output.finish or "")
        if life is None:
            return
        request_id = life.ask.request_id
        self.books.on_progress(output.leg_id, self.timeline.now_s)
        self.books.on_output(request_id, output.finish)
        actions = self.scheduler.on_output(output.leg_id, tokens, output.finish)
        for action in actions:
            if isinstance(action, Deliver):
                self.books.clients[action.request_id].deliver(tokens, action.finish)
        self._carry_out(actions)

    def _carry_out(self, actions: list[Action]) -> None:
        for action in actions:
            if not isinstance(action, Deliver):
                self.timeline.note(type(action).__name__, *_values(action))
            self.books.check_action(action, self.timeline.now_s)
            if isinstance(action, Said) and action.worker in self.links:
                self.links[action.worker].to_worker(action)
        self.books.check_loads(self.timeline.now_s)


def _values(action: Action) -> tuple[object, ...]:
    """An action in a trace: without the tokens themselves."""
    values = ((name, getattr(action, name)) for name in action.__slots__)
    return tuple(f"after {len(v)}" if name == "resume_tokens" else v for name, v in values)
