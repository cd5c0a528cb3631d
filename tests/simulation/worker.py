"""A simulated worker: does what it is told, in its own time."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cluster.scheduler.life import (
    Action,
    CancelLeg,
    DropTransfer,
    Finish,
    StartDecode,
    StartLocal,
    StartPrefill,
)
from cluster.scheduler.view import Pool, WorkerKey

if TYPE_CHECKING:
    from tests.simulation.world import World

Start = StartPrefill | StartDecode | StartLocal
LONG_MODEL_LEN = 400
SHORT_MODEL_LEN = 120


@dataclass(frozen=True, slots=True)
class Spec:
    """A request, and what the model says to it."""

    request_id: str
    prompt_tokens: int
    max_tokens: int
    stops_after: int
    """Output tokens after which the model is done by itself."""
    can_hand_over: bool

    def finish_at(self, tokens: int, model_len_tokens: int, max_tokens: int) -> Finish | None:
        """How the output ends with its `tokens`-th token."""
        if tokens == self.stops_after:
            return Finish.STOP
        if tokens >= max_tokens or self.prompt_tokens + tokens >= model_len_tokens:
            return Finish.LENGTH
        return None


def token_at(request_id: str, position: int) -> int:
    """What every worker generates there: the output depends on nothing else."""
    return zlib.crc32(f"{request_id}:{position}".encode())


@dataclass(slots=True, eq=False)
class SimLeg:
    leg_id: str
    spec: Spec
    position: int
    """Output tokens so far, former legs' included."""
    max_tokens: int
    transfer_id: str = ""
    receiver: SimWorker | None = None
    waits_for_kv: bool = False


@dataclass(slots=True)
class SimTransfer:
    state: str = "arriving"
    claimed_by: SimLeg | None = None


@dataclass(slots=True, eq=False)
class SimWorker:
    world: World
    key: WorkerKey
    pool: Pool
    model: str
    model_len_tokens: int
    alive: bool = True
    legs: dict[str, SimLeg] = field(default_factory=dict)
    transfers: dict[str, SimTransfer] = field(default_factory=dict)
    dropped: set[str] = field(default_factory=set)

    def handle(self, action: Action) -> None:
        match action:
            case StartPrefill():
                self._start_prefill(action)
            case StartDecode():
                self._start_decode(action)
            case StartLocal():
                leg = self._add(action)
                self._later(0.02, 1.0, leg, lambda: self._generate(leg))
            case CancelLeg():
                leg_or_none = self._remove(action.leg_id)
                if leg_or_none and self.world.chance(self.world.faults.answered_cancels):
                    self.world.say(self, action.leg_id, [], Finish.ABORT)
            case DropTransfer():
                self.drop(action.transfer_id)

    def end_stream(self) -> None:
        """The router's stream has ended: everything it had here is aborted."""
        for leg_id in list(self.legs):
            self._remove(leg_id)

    def die(self) -> None:
        self.alive = False
        self.legs.clear()
        self.transfers.clear()

    # --- the inbox

    def open(self, transfer_id: str) -> None:
        if self.alive and transfer_id not in self.dropped:
            self.transfers.setdefault(transfer_id, SimTransfer())

    def settle(self, transfer_id: str, state: str) -> None:
        """All of the KV is here, or it is known that it will not come."""
        transfer = self.transfers.get(transfer_id)
        if not self.alive or transfer is None or transfer.state != "arriving":
            return
        transfer.state = state
        if transfer.claimed_by is not None:
            self._adopt(transfer.claimed_by, transfer)

    def drop(self, transfer_id: str) -> None:
        self.dropped.add(transfer_id)
        transfer = self.transfers.pop(transfer_id, None)
        if transfer is not None and transfer.claimed_by is not None:
            self._adopt(transfer.claimed_by, SimTransfer("failed"))

    # --- legs

    def _add(self, action: Start) -> SimLeg:
        spec = self.world.books.clients[action.request_id].spec
        leg = SimLeg(action.leg_id, spec, len(action.resume_tokens), spec.max_tokens)
        self.legs[leg.leg_id] = leg
        return leg

    def _remove(self, leg_id: str) -> SimLeg | None:
        leg = self.legs.pop(leg_id, None)
        if leg is None:
            return None
        if leg.waits_for_kv:
            leg.waits_for_kv = False
            self.transfers.pop(leg.transfer_id, None)
            self.dropped.add(leg.transfer_id)
        if leg.receiver is not None:
            receiver = leg.receiver
            self.world.after(0.0, 0.05, lambda: receiver.settle(leg.transfer_id, "failed"))
        return leg

    def _start_prefill(self, action: StartPrefill) -> None:
        leg = self._add(action)
        leg.max_tokens = leg.position + 1
        leg.transfer_id = action.transfer_id
        receiver = leg.receiver = self.world.workers.get(action.receiver)
        if receiver is not None:
            self._later(0.0, 0.5, leg, lambda: receiver.open(leg.transfer_id))
        self._later(0.5, 2.0, leg, lambda: self._generate(leg))

    def _start_decode(self, action: StartDecode) -> None:
        leg = self._add(action)
        leg.transfer_id, leg.waits_for_kv = action.transfer_id, True
        if action.transfer_id in self.dropped:
            self._adopt(leg, SimTransfer("failed"))
            return
        transfer = self.transfers.setdefault(action.transfer_id, SimTransfer())
        transfer.claimed_by = leg
        if transfer.state != "arriving":
            self._adopt(leg, transfer)
            return
        self._later(1.5, 1.5, leg, lambda: self.settle(leg.transfer_id, "failed"))

    def _adopt(self, leg: SimLeg, transfer: SimTransfer) -> None:
        if not leg.waits_for_kv:
            return
        leg.waits_for_kv = False
        self.transfers.pop(leg.transfer_id, None)
        self.dropped.add(leg.transfer_id)
        whole = transfer.state == "whole"
        self.world.say_adopted(self, leg.leg_id, whole)
        self._later(0.01, 0.05 if whole else 1.0, leg, lambda: self._generate(leg))

    def _generate(self, leg: SimLeg) -> None:
        """One engine step of this leg: a token or a few."""
        world, tokens, finish = self.world, [], None
        if world.chance(world.faults.engine_errors):
            finish = Finish.ERROR
        for _ in range(0 if finish else world.random.randint(1, 3)):
            tokens.append(token_at(leg.spec.request_id, leg.position))
            leg.position += 1
            finish = leg.spec.finish_at(leg.position, self.model_len_tokens, leg.max_tokens)
            if finish is not None:
                break
        if finish is None:
            self._later(0.02, 0.3, leg, lambda: self._generate(leg))
        else:
            del self.legs[leg.leg_id]
            self._finish_sending(leg)
        world.say(self, leg.leg_id, tokens, finish)

    def _finish_sending(self, leg: SimLeg) -> None:
        receiver, world = leg.receiver, self.world
        if receiver is None:
            return
        state = "failed" if world.chance(world.faults.failed_transfers) else "whole"

        def arrive() -> None:
            # A worker that dies before its last frame is out leaves the transfer as it is.
            if self.alive:
                receiver.open(leg.transfer_id)
                receiver.settle(leg.transfer_id, state)

        world.after(0.0, 0.3, arrive)

    def _later(self, low_s: float, high_s: float, leg: SimLeg, do: Callable[[], None]) -> None:
        """Do it then, if the worker and the leg are still there."""
        self.world.after(low_s, high_s, lambda: do() if self.legs.get(leg.leg_id) is leg else None)
