"""A request's life: queued, prefilling, handing over, decoding, done.

A *leg* is one stay at one worker; its id is new each time, so whatever a former leg still says can
be told apart and ignored.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from cluster.scheduler.policy import Ask, Placement, PlacementPolicy
from cluster.scheduler.view import WorkerKey

MOVED = "moved"
"""The reason of a placement that takes running requests' KV along."""


class Phase(enum.StrEnum):
    QUEUED = "queued"
    PREFILLING = "prefilling"
    HANDING_OVER = "handing_over"
    DECODING = "decoding"
    MOVING = "moving"
    """Still decoding, but told to stop and to send its KV."""
    DONE = "done"


class Path(enum.StrEnum):
    """How a request's prompt got its KV on the worker that decoded it."""

    HANDED_OVER = "handed_over"
    KEPT_LOCAL = "kept_local"
    RECOMPUTED = "recomputed"


class Failure(enum.StrEnum):
    """Why a request fails, if not by an engine's error."""

    LOST = "lost"
    """Its workers, too often."""
    NO_WORKER = "no_worker"
    QUEUE_FULL = "queue_full"
    SLO = "slo"
    """It would have missed what its class is promised."""
    INVALID = "invalid"
    """No worker can be sent it."""
    STOPPING = "stopping"
    """The router ends."""


class Finish(enum.StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


# --- actions --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StartPrefill:
    """Compute the prompt and one token, pushing the KV to the decode worker."""

    request_id: str
    leg_id: str
    worker: WorkerKey
    receiver: WorkerKey
    transfer_id: str
    resume_tokens: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class StartDecode:
    """Go on after `resume_tokens`, adopting the transfer's KV."""

    request_id: str
    leg_id: str
    worker: WorkerKey
    sender: WorkerKey
    transfer_id: str
    resume_tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StartLocal:
    """Do all of it, or all that is left, on one worker."""

    request_id: str
    leg_id: str
    worker: WorkerKey
    resume_tokens: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class MoveOut:
    """Stop after the step that runs, pushing the KV to the receiver. The rest starts there with a
    StartDecode, when the worker has told that it stopped."""

    request_id: str
    leg_id: str
    worker: WorkerKey
    receiver: WorkerKey
    transfer_id: str


@dataclass(frozen=True, slots=True)
class CancelLeg:
    leg_id: str
    worker: WorkerKey


@dataclass(frozen=True, slots=True)
class DropTransfer:
    worker: WorkerKey
    transfer_id: str


@dataclass(frozen=True, slots=True)
class StopAwaiting:
    """Who sends a transfer is lost, or cannot send it: what has not come of it is recomputed. The
    connection from there may take longer to break, if it is a machine that is gone; or there is
    none, and the receiver has never heard of the transfer."""

    worker: WorkerKey
    transfer_id: str
    reason: str = "its sender is lost"


@dataclass(frozen=True, slots=True)
class Deliver:
    """Pass a leg's output on to the client, as the request's last if `finish` is set."""

    request_id: str
    finish: Finish | None


@dataclass(frozen=True, slots=True)
class FailRequest:
    request_id: str
    reason: str
    failure: Failure = Failure.LOST
    retry_after_s: float = 0.0
    """When it might be taken."""


Action = (
    StartPrefill
    | StartDecode
    | StartLocal
    | MoveOut
    | CancelLeg
    | DropTransfer
    | StopAwaiting
    | Deliver
    | FailRequest
)


def request_of(transfer_id: str) -> str:
    """The id of the request that a life has given this transfer to."""
    return transfer_id.rsplit(".", 2)[0]


# --- state ----------------------------------------------------------------------------------------


@dataclass(slots=True)
class Leg:
    leg_id: str
    worker: WorkerKey
    prefills_only: bool
    """Its LENGTH after one token is the hand-over, not the request's end."""


@dataclass(slots=True)
class Life:
    ask: Ask
    policy: PlacementPolicy | None = None
    """Its own, if it brought one."""
    phase: Phase = Phase.QUEUED
    path: Path = Path.KEPT_LOCAL
    placement: Placement | None = None
    leg: Leg | None = None
    last_leg_id: str = ""
    transfer_id: str = ""
    undelivered: str | None = None
    """Why the transfer was not delivered, if its sender has said so before the decode leg."""
    handoff_ended: bool = False
    """The transfer's decode leg has told how it came."""
    tokens: list[int] = field(default_factory=list)
    """Output tokens the client has."""
    attempts: int = 0
    """Placements so far."""
    losses: int = 0
    """Of them, those that ended with a worker: draining ones are not lost."""
    _more: Deliver = field(init=False)
    """Made once, for it is what becomes of most outputs."""

    def __post_init__(self) -> None:
        self._more = Deliver(self.ask.request_id, None)

    @property
    def done(self) -> bool:
        return self.phase is Phase.DONE

    @property
    def tokens_left(self) -> int:
        return self.ask.max_tokens - len(self.tokens)

    def remaining(self) -> Ask:
        """The ask as it stands after the tokens the client has."""
        if not self.tokens:
            return self.ask
        return Ask(
            request_id=self.ask.request_id,
            prompt_tokens=self.ask.prompt_tokens,
            max_tokens=self.tokens_left,
            resumed_tokens=len(self.tokens),
            can_hand_over=self.ask.can_hand_over,
            adapter=self.ask.adapter,
            slo=self.ask.slo,
            tenant=self.ask.tenant,
            blocks=self.ask.blocks,
        )

    def start(self, placement: Placement, id_suffix: str) -> Action:
        """The first leg under a new placement."""
        self.attempts += 1
        self.placement = placement
        leg_id = f"{self.ask.request_id}.{self.attempts}p.{id_suffix}"
        resume = tuple(self.tokens)
        self._begin(Leg(leg_id, placement.prefill, prefills_only=placement.hands_over))
        self.phase = Phase.PREFILLING
        if not placement.hands_over:
            self.path = Path.RECOMPUTED if resume else Path.KEPT_LOCAL
            return StartLocal(self.ask.request_id, leg_id, placement.prefill, resume)
        self.path = Path.HANDED_OVER
        self._open_transfer(leg_id)
        return StartPrefill(
            self.ask.request_id,
            leg_id,
            placement.prefill,
            placement.decode,
            self.transfer_id,
            resume,
        )

    def on_output(
        self, token_ids: list[int], finish: Finish | None, model_len_tokens: int
    ) -> list[Action]:
        """The current leg said something."""
        assert self.leg is not None
        self.tokens.extend(token_ids)
        if finish is None:
            waited = self.phase in (Phase.PREFILLING, Phase.HANDING_OVER)
            if waited and token_ids and not self.leg.prefills_only:
                self.phase = Phase.DECODING
            return [self._more]
        context_tokens = self.ask.prompt_tokens + len(self.tokens)
        hands_over = (
            self.leg.prefills_only
            and finish is Finish.LENGTH
            and self.tokens_left > 0
            and context_tokens < model_len_tokens
        )
        if hands_over:
            return [Deliver(self.ask.request_id, None), *self._start_decode()]
        actions: list[Action] = [Deliver(self.ask.request_id, finish)]
        actions.extend(self._release_transfer())
        self._end()
        return actions

    def on_adopted(self, handed_over: bool) -> None:
        self.path = Path.HANDED_OVER if handed_over else Path.RECOMPUTED
        self.handoff_ended = True

    def move_out(self, receiver: WorkerKey, id_suffix: str) -> MoveOut:
        """Its worker will be gone before it ends: let its KV go to another one."""
        assert self.leg is not None and self.phase is Phase.DECODING
        self._open_transfer(f"{self.ask.request_id}.{self.attempts}m.{id_suffix}")
        self.placement = Placement(self.leg.worker, receiver, MOVED)
        self.phase = Phase.MOVING
        return MoveOut(
            self.ask.request_id, self.leg.leg_id, self.leg.worker, receiver, self.transfer_id
        )

    def on_moved_out(self) -> list[Action]:
        """Its leg has stopped, and its KV is on the way."""
        assert self.phase is Phase.MOVING
        return self._start_decode()

    def abort(self) -> list[Action]:
        """The client has left, or has what it wanted."""
        actions: list[Action] = []
        if self.leg is not None:
            actions.append(CancelLeg(self.leg.leg_id, self.leg.worker))
            actions.extend(self._release_transfer())
        self._end()
        return actions

    def fail(
        self, reason: str, failure: Failure = Failure.LOST, retry_after_s: float = 0.0
    ) -> list[Action]:
        actions = self.abort()
        actions.append(FailRequest(self.ask.request_id, reason, failure, retry_after_s))
        return actions

    def unplace(self) -> list[Action]:
        """A worker it needed is gone: back to the queue, with what the client has."""
        assert self.placement is not None
        actions: list[Action] = []
        if self.leg is not None:
            actions.append(CancelLeg(self.leg.leg_id, self.leg.worker))
            actions.extend(self._release_transfer())
        self.leg, self.placement, self.transfer_id = None, None, ""
        self.phase = Phase.QUEUED
        return actions

    def depends_on(self, worker: WorkerKey) -> bool:
        """Whether losing this worker stops the request. The prefill worker owes nothing once the
        decode leg has begun: if the KV did not arrive whole, the decode worker recomputes it."""
        if self.leg is None or self.placement is None:
            return False
        return self.leg.worker == worker or (
            self.phase is Phase.PREFILLING and self.placement.decode == worker
        )

    def on_sender_lost(self, worker: WorkerKey) -> list[Action]:
        """A worker is lost that the request does not depend on."""
        placement = self.placement
        if self.phase is Phase.HANDING_OVER and placement and placement.prefill == worker:
            return [StopAwaiting(placement.decode, self.transfer_id)]
        return []

    def on_undelivered(self, transfer_id: str, reason: str) -> list[Action]:
        """A sender could not deliver what it was to send."""
        if transfer_id != self.transfer_id:
            return []
        if self.phase in (Phase.PREFILLING, Phase.MOVING):
            self.undelivered = reason
        elif self.phase is Phase.HANDING_OVER:
            return [self._stop_awaiting(reason)]
        return []

    def _open_transfer(self, transfer_id: str) -> None:
        self.transfer_id, self.undelivered, self.handoff_ended = transfer_id, None, False

    def _stop_awaiting(self, reason: str) -> StopAwaiting:
        assert self.placement is not None
        why = f"its sender could not deliver it: {reason}"
        return StopAwaiting(self.placement.decode, self.transfer_id, why)

    def _start_decode(self) -> list[Action]:
        assert self.placement is not None
        leg_id = f"{self.transfer_id}.d"
        self._begin(Leg(leg_id, self.placement.decode, prefills_only=False))
        self.phase = Phase.HANDING_OVER
        start = StartDecode(
            self.ask.request_id,
            leg_id,
            self.placement.decode,
            self.placement.prefill,
            self.transfer_id,
            tuple(self.tokens),
        )
        # A worker knows only of a leg that it has what not to wait for.
        if self.undelivered is None:
            return [start]
        return [start, self._stop_awaiting(self.undelivered)]

    def _release_transfer(self) -> list[Action]:
        """The decode worker frees a transfer by itself once the decode leg has come to it."""
        waits = self.phase in (Phase.PREFILLING, Phase.MOVING)
        if waits and self.placement and self.placement.hands_over:
            return [DropTransfer(self.placement.decode, self.transfer_id)]
        return []

    def _begin(self, leg: Leg) -> None:
        self.leg, self.last_leg_id = leg, leg.leg_id

    def _end(self) -> None:
        self.phase, self.leg = Phase.DONE, None
