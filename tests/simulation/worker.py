"""A simulated worker: does what routers tell it, in its own time. Its inbox is the real one; the
rest plays `workers/server.py`, `workers/engine.py` and `workers/registration.py`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.membership import WorkerRecord, WorkerState
from cluster.scheduler.life import (
    CancelLeg,
    DropTransfer,
    Finish,
    MoveOut,
    StartDecode,
    StartLocal,
    StartPrefill,
    StopAwaiting,
)
from cluster.scheduler.view import Pool, WorkerKey
from tests.simulation.kv import GEOMETRY, Push, check_adopted, digest_of
from tests.simulation.network import Stream
from tests.simulation.redis import LEASE_S
from tests.simulation.requests import Spec, token_at
from tests.simulation.timeline import Node
from tests.simulation.violation import Violation
from workers.kv.inbox import Inbox
from workers.kv.incoming import Settled

if TYPE_CHECKING:
    from tests.simulation.world import World

Start = StartPrefill | StartDecode | StartLocal
ADOPT_DEADLINE_S = 1.5
INBOX_IDLE_S = 4.0
SWEEP_EVERY_S = 1.0
REDIS_DEADLINE_S = 2.0
ROUTERS_NOTICE_S = 1.5
MOVE_GRACE_S = 3.0
DRAIN_POLL_S = 0.25


@dataclass(frozen=True, slots=True)
class Output:
    """What a leg says in one engine step."""

    leg_id: str
    tokens: tuple[int, ...]
    finish: Finish | None
    stored: tuple[int, ...] = ()
    """Blocks that the prefix cache holds since."""


@dataclass(frozen=True, slots=True)
class Adopted:
    leg_id: str
    whole: bool
    exposed_s: float


@dataclass(frozen=True, slots=True)
class Undelivered:
    transfer_id: str


@dataclass(frozen=True, slots=True)
class MovedOut:
    leg_id: str
    moved: bool


@dataclass(slots=True, eq=False)
class SimLeg:
    leg_id: str
    stream: Stream
    spec: Spec
    position: int
    """Output tokens so far, former legs' included."""
    stored: tuple[int, ...]
    """Blocks of its prompt, until they are told."""
    max_tokens: int
    push: Push | None = None
    since_s: float = 0.0
    """When it began to wait for its KV."""
    waits_for: str = ""
    """The transfer that it claims, until that is settled."""
    adopts: str = ""
    """The transfer whose KV it loads with its first step."""
    generated: bool = False


class SimWorker(Node):
    def __init__(
        self,
        world: World,
        key: WorkerKey,
        machine: str,
        pool: Pool,
        model: str,
        model_len_tokens: int,
    ) -> None:
        super().__init__(world.timeline, machine)
        self.world = world
        self.key = key
        self.model = model
        self.model_len_tokens = model_len_tokens
        self.silent_end = False
        self.block_tokens = self.timeline.random.choice((8, 16))
        self.legs: dict[str, SimLeg] = {}
        self.inbox = Inbox(
            GEOMETRY, key.incarnation, world.inbox_bytes, INBOX_IDLE_S, lambda: self.timeline.now_s
        )
        self.adopted: set[str] = set()
        self.record = WorkerRecord(
            key.worker_id,
            key.incarnation,
            pool,
            WorkerState.READY,
            started_unix_s=self.timeline.now_s,
        )
        self.after(0.0, 0.1, self._keep_lease)
        self.after(0.0, SWEEP_EVERY_S, self._sweep)

    @property
    def idle(self) -> bool:
        """It holds nothing for anybody."""
        return not (self.legs or self.inbox.transfers_held or self.inbox.bytes_held)

    # --- routers' streams

    def handle(self, stream: Stream, message: object) -> None:
        match message:
            case StartPrefill():
                self._start_prefill(stream, message)
            case StartDecode():
                self._start_decode(stream, message)
            case StartLocal():
                leg = self._add(stream, message)
                self._later(0.02, 1.0, leg, lambda: self._generate(leg))
            case MoveOut():
                self._move_out(stream, message)
            case CancelLeg():
                left = self._remove(message.leg_id)
                if left and self.timeline.chance(self.world.faults.answered_cancels):
                    stream.to_router(Output(message.leg_id, (), Finish.ABORT))
            case DropTransfer():
                self.inbox.drop(message.transfer_id, "the router gave it up")
            case StopAwaiting():
                self.inbox.fail(message.transfer_id, message.reason)

    def end_stream(self, stream: Stream) -> None:
        """A router's stream has ended: everything it had here is aborted."""
        for leg in [leg for leg in self.legs.values() if leg.stream is stream]:
            self._remove(leg.leg_id)

    def stop(self, silently: bool = False) -> None:
        """The process is gone, or its whole machine."""
        self.silent_end = silently
        self.end()
        for stream in [s for s in self.world.network.streams if s.worker is self]:
            if silently:
                stream.vanish_at_worker()
            else:
                stream.close_at_worker()
        for leg in self.legs.values():
            if leg.push is not None and not silently:
                leg.push.finish()
        self.legs.clear()

    # --- membership

    def label(self, pool: Pool) -> None:
        self.record = dataclasses.replace(self.record, pool=pool)

    def _keep_lease(self) -> None:
        redis = self.world.redis
        if not self.world.network.reaches(self, redis):
            # Refused at once, or not answered at all.
            self.after(LEASE_S / 12, LEASE_S / 3 + LEASE_S / 12, self._keep_lease)
            return
        if not redis.put_worker(self.record):
            self.timeline.note("superseded", self.key)
        asked = redis.drains.get(self.key.worker_id)
        if (
            asked is not None
            and asked.incarnation == self.key.incarnation
            and self.record.state is WorkerState.READY
        ):
            self.record = dataclasses.replace(
                self.record, state=WorkerState.DRAINING, drain_until_unix_s=asked.until_unix_s
            )
            redis.put_worker(self.record)
            self.after(ROUTERS_NOTICE_S, ROUTERS_NOTICE_S, self._end_when_drained)
        self.after(LEASE_S / 3, LEASE_S / 3, self._keep_lease)

    def _end_when_drained(self) -> None:
        last_s = self.record.drain_until_unix_s + MOVE_GRACE_S
        if self.legs and self.timeline.now_s < last_s:
            self.after(DRAIN_POLL_S, DRAIN_POLL_S, self._end_when_drained)
            return
        self.timeline.note("drained", self.key)
        if self.world.network.reaches(self, self.world.redis):
            self.world.redis.remove_worker(self.record)
        self.stop()
        self.world.start_again(self)

    # --- the inbox

    def _sweep(self) -> None:
        for transfer_id in self.inbox.sweep():
            self.timeline.note("swept", transfer_id)
            if transfer_id in self.adopted:
                raise Violation(f"{transfer_id} was adopted, and {self.key} held it again")
        self.after(SWEEP_EVERY_S, SWEEP_EVERY_S, self._sweep)

    # --- legs

    def _add(self, stream: Stream, action: Start) -> SimLeg:
        if action.leg_id in self.legs:
            raise Violation(f"{action.leg_id} starts twice on {self.key}")
        spec = stream.router.books.clients[action.request_id].spec
        blocks = tuple(spec.hashes(self.block_tokens))
        resumed = len(action.resume_tokens)
        leg = SimLeg(action.leg_id, stream, spec, resumed, blocks, spec.max_tokens)
        self.legs[leg.leg_id] = leg
        return leg

    def _remove(self, leg_id: str) -> SimLeg | None:
        leg = self.legs.pop(leg_id, None)
        if leg is not None:
            if transfer_id := leg.waits_for or leg.adopts:
                self.inbox.drop(transfer_id, "the request is aborted")
            if leg.push is not None:
                leg.push.abort("the request is aborted")
        return leg

    def _start_prefill(self, stream: Stream, action: StartPrefill) -> None:
        leg = self._add(stream, action)
        leg.max_tokens = leg.position + 1
        tokens = leg.spec.prompt_tokens + leg.position
        rng = self.timeline.random
        middle = rng.choice((0, tokens // 2, rng.randint(0, tokens)))

        def open_push() -> None:
            if self.timeline.chance(self.world.faults.undelivered_transfers):
                self._tell_undelivered(action.transfer_id)
            else:
                leg.push = Push(self, action.receiver, action.transfer_id, leg.spec.text, tokens)
                leg.push.send(0, middle)
            self._later(0.3, 1.5, leg, end_prompt)

        def end_prompt() -> None:
            if leg.push is None:
                pass
            elif self.timeline.chance(self.world.faults.failed_transfers):
                leg.push.abort("more waits to be sent than may")
            else:
                leg.push.send(middle, tokens)
                leg.push.finish()
            leg.push = None
            self._generate(leg)

        self._later(0.0, 0.5, leg, open_push)

    def _start_decode(self, stream: Stream, action: StartDecode) -> None:
        leg = self._add(stream, action)
        leg.waits_for, leg.since_s = action.transfer_id, self.timeline.now_s

        def settled(how: Settled) -> None:
            self._later(0.0, 0.01, leg, lambda: self._settled(leg, how))

        def expire() -> None:
            if leg.waits_for:
                self.inbox.fail(leg.waits_for, "the KV was not whole in time")

        self.inbox.expect(action.transfer_id, tuple(action.sender), settled)
        self._later(ADOPT_DEADLINE_S, ADOPT_DEADLINE_S, leg, expire)

    def _move_out(self, stream: Stream, action: MoveOut) -> None:
        leg = self.legs.get(action.leg_id)
        if leg is None or not leg.generated:
            stream.to_router(MovedOut(action.leg_id, False))
            return
        del self.legs[leg.leg_id]
        # The last token's KV would come with the next step.
        tokens = leg.spec.prompt_tokens + leg.position - 1
        if self.timeline.chance(self.world.faults.undelivered_transfers):
            self._tell_undelivered(action.transfer_id)
            stream.to_router(MovedOut(action.leg_id, True))
            return
        push = Push(self, action.receiver, action.transfer_id, leg.spec.text, tokens)
        if self.timeline.chance(self.world.faults.failed_transfers):
            push.abort("more waits to be sent than may")
        else:
            push.send(0, tokens)
            push.finish()
        stream.to_router(MovedOut(action.leg_id, True))

    def _tell_undelivered(self, transfer_id: str) -> None:
        """Sooner or later, and to all."""

        def tell() -> None:
            for stream in [s for s in self.world.network.streams if s.worker is self]:
                stream.to_router(Undelivered(transfer_id))

        self.after(0.0, 2.0, tell)

    def _settled(self, leg: SimLeg, how: Settled) -> None:
        transfer_id, leg.waits_for = leg.waits_for, ""
        whole = self.inbox.admit(transfer_id) if how.whole else None
        if whole is not None and whole[1] == digest_of(leg.spec.text):
            leg.adopts = transfer_id
        else:
            self.inbox.drop(transfer_id, how.reason)
        exposed_s = self.timeline.now_s - leg.since_s
        leg.stream.to_router(Adopted(leg.leg_id, bool(leg.adopts), exposed_s))
        self._later(0.01, 0.05 if leg.adopts else 1.0, leg, lambda: self._load(leg))

    def _load(self, leg: SimLeg) -> None:
        frames = self.inbox.take(leg.adopts) if leg.adopts else None
        if frames is not None:
            self.adopted.add(leg.adopts)
            # The transfer holds what was computed before the first token of this leg's worker.
            tokens = leg.spec.prompt_tokens + leg.position - 1
            check_adopted(frames, tokens, leg.spec.text)
        leg.adopts = ""
        self._generate(leg)

    def _generate(self, leg: SimLeg) -> None:
        """One engine step of this leg: a token or a few."""
        timeline = self.timeline
        tokens: list[int] = []
        finish = None
        if timeline.chance(self.world.faults.engine_errors):
            finish = Finish.ERROR
        leg.generated = True
        for _ in range(0 if finish else timeline.random.randint(1, 3)):
            tokens.append(token_at(leg.spec.text, leg.position))
            leg.position += 1
            finish = leg.spec.finish_at(leg.position, self.model_len_tokens, leg.max_tokens)
            if finish is not None:
                break
        if finish is None:
            self._later(0.02, 0.3, leg, lambda: self._generate(leg))
        else:
            del self.legs[leg.leg_id]
        leg.stream.to_router(Output(leg.leg_id, tuple(tokens), finish, leg.stored))
        leg.stored = ()

    def _later(self, low_s: float, high_s: float, leg: SimLeg, do: Callable[[], None]) -> None:
        """Do it then, if the worker and the leg are still there."""
        self.after(low_s, high_s, lambda: do() if self.legs.get(leg.leg_id) is leg else None)
