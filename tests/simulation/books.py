"""What a router's clients have and what it was told, compared with what its scheduler does and
holds."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.membership import WorkerRecord, WorkerState
from cluster.scheduler.life import (
    Action,
    CancelLeg,
    DropTransfer,
    FailRequest,
    Finish,
    MoveOut,
    Phase,
    StartDecode,
    StartLocal,
    StartPrefill,
    StopAwaiting,
)
from cluster.scheduler.scheduler import LOSSES_MAX, Scheduler
from cluster.scheduler.view import WorkerKey, WorkerView
from router.following import key_of
from tests.simulation.requests import LONG_MODEL_LEN, SHORT_MODEL_LEN, Spec, token_at
from tests.simulation.violation import Violation

Start = StartPrefill | StartDecode | StartLocal


@dataclass(slots=True)
class Placed:
    prefill: WorkerKey
    decode: WorkerKey
    context_tokens: int
    """Prompt and resumed tokens."""
    leg_id: str
    leg_worker: WorkerKey
    lends: tuple[bool, bool]
    """Whether the prefill worker and the decode worker do the other pool's work with it."""
    transfer_id: str = ""
    """Until a decode leg claims it."""
    moving: bool = False
    """Its leg was told to stop and to send its KV to `decode`, and has not answered."""
    computing: bool = True
    """Its first leg has said nothing yet."""
    heard_at_s: float = 0.0
    """When the leg started, or last said something."""


@dataclass(slots=True)
class Client:
    spec: Spec
    tokens: list[int] = field(default_factory=list)
    ended: str = ""
    losses: int = 0
    queued_since_s: float = -1.0
    placed: Placed | None = None

    def deliver(self, tokens: list[int], finish: Finish | None) -> None:
        name = self.spec.request_id
        if self.ended:
            raise Violation(f"{name} gets {len(tokens)} tokens after it {self.ended}")
        for token in tokens:
            if token != token_at(self.spec.text, len(self.tokens)):
                raise Violation(f"{name} gets a wrong token at position {len(self.tokens)}")
            self.tokens.append(token)
        if finish is not None:
            self.end(f"finished: {finish}")

    def end(self, how: str) -> None:
        if self.ended:
            raise Violation(f"{self.spec.request_id} {how} after it {self.ended}")
        self.ended = how


class Books:
    """Kept beside the scheduler: every action is checked as it is carried out, and the scheduler's
    state after each event.

    Raises, in every method:
        Violation
    """

    def __init__(self, scheduler: Scheduler, legs_seen: set[str]) -> None:
        self.scheduler = scheduler
        self.clients: dict[str, Client] = {}
        self._legs_seen = legs_seen
        """Of all routers: no two legs have one id."""
        self._models: dict[WorkerKey, str] = {}
        """Of the workers that the router is connected to."""
        self._draining: set[WorkerKey] = set()
        self.undelivered: set[str] = set()
        """Transfers of which their senders have said so."""

    def check_action(self, action: Action, now_s: float) -> None:
        match action:
            case StartPrefill() | StartDecode() | StartLocal():
                self._check_start(action, now_s)
            case MoveOut():
                self._check_move(action)
            case CancelLeg():
                self._check_cancel(action)
            case DropTransfer():
                self._check_drop(action)
            case StopAwaiting():
                self._check_stop(action)
            case FailRequest():
                self._check_fail(action, now_s)

    def on_output(self, request_id: str, finish: Finish | None) -> None:
        """The request's leg has said something."""
        placed = self.clients[request_id].placed
        if placed is not None:
            placed.computing = False
            if finish is not None:
                placed.leg_id = ""

    def on_progress(self, leg_id: str, now_s: float) -> None:
        for client in self.clients.values():
            if client.placed is not None and client.placed.leg_id == leg_id:
                client.placed.heard_at_s = now_s

    def on_moved_out(self, leg_id: str, moved: bool) -> None:
        """It has stopped, or it will not move."""
        for client in self.clients.values():
            if client.placed is not None and client.placed.leg_id == leg_id:
                client.placed.moving = False
                if moved:
                    client.placed.leg_id = ""

    def on_records(self, records: list[WorkerRecord]) -> None:
        """The router has read the membership."""
        self._draining = {key_of(r) for r in records if r.state is WorkerState.DRAINING}

    def on_worker_up(self, view: WorkerView) -> None:
        self._models[view.key] = view.model

    def on_worker_lost(self, key: WorkerKey) -> None:
        del self._models[key]
        for client in self.clients.values():
            placed = client.placed
            if placed is None:
                continue
            awaited = placed.transfer_id and placed.decode == key and not placed.moving
            if placed.leg_worker == key or awaited:
                client.losses += 1
            # What moves there goes on, and is claimed if the router meets the worker again in time.
            if placed.decode == key and not placed.moving:
                placed.transfer_id = ""
            if placed.leg_worker == key:
                placed.leg_id = ""

    def unended(self) -> list[str]:
        return [name for name, client in self.clients.items() if not client.ended]

    def _check_start(self, action: Start, now_s: float) -> None:
        client = self.clients[action.request_id]
        receiver = action.receiver if isinstance(action, StartPrefill) else action.worker
        if client.ended:
            raise Violation(f"{action.leg_id} starts after its request {client.ended}")
        if action.leg_id in self._legs_seen:
            raise Violation(f"{action.leg_id} starts twice")
        self._legs_seen.add(action.leg_id)
        if list(action.resume_tokens) != client.tokens:
            raise Violation(
                f"{action.leg_id} goes on after {len(action.resume_tokens)} tokens, "
                f"the client has {len(client.tokens)}"
            )
        if client.placed is not None and client.placed.leg_id:
            raise Violation(f"{action.leg_id} starts beside {client.placed.leg_id}")
        for key in {action.worker, receiver}:
            self._check_worker(action, key)
        if isinstance(action, StartDecode):
            self._check_claim(action, client, now_s)
            return
        if client.placed is not None and self._is_to_be_dropped(client.placed):
            raise Violation(f"{client.placed.transfer_id} was not dropped")
        context = client.spec.prompt_tokens + len(client.tokens)
        client.queued_since_s = -1.0
        placement = self.scheduler.lives[action.request_id].placement
        lends = (placement.lends_prefill, placement.lends_decode) if placement else (False, False)
        client.placed = Placed(
            action.worker, receiver, context, action.leg_id, action.worker, lends, heard_at_s=now_s
        )
        if isinstance(action, StartPrefill):
            if receiver == action.worker:
                raise Violation(f"{action.leg_id} hands over to its own worker")
            client.placed.transfer_id = action.transfer_id

    def _check_worker(self, action: Start | MoveOut, key: WorkerKey) -> None:
        if key not in self._models:
            raise Violation(f"{action.leg_id} is placed on {key}, which is gone")
        if key in self._draining and not isinstance(action, StartDecode):
            raise Violation(f"{action.leg_id} is placed on {key}, which is draining")
        model = self._models[action.worker]
        if self._models[key] != model:
            raise Violation(f"{action.leg_id} pairs models {model} and {self._models[key]}")
        view = self.scheduler.view.workers[key]
        client = self.clients[action.request_id]
        context = client.spec.prompt_tokens + len(client.tokens)
        if context >= view.max_model_len_tokens:
            raise Violation(f"{action.leg_id}: {context} tokens do not fit {key}")

    @staticmethod
    def _check_claim(action: StartDecode, client: Client, now_s: float) -> None:
        placed = client.placed
        if placed is None or placed.transfer_id != action.transfer_id:
            raise Violation(f"{action.leg_id} claims {action.transfer_id}, which is not open")
        if (placed.prefill, placed.decode) != (action.sender, action.worker):
            raise Violation(f"{action.leg_id} is not where its request was placed")
        placed.transfer_id = ""
        placed.leg_id, placed.leg_worker = action.leg_id, action.worker
        placed.heard_at_s = now_s

    def _check_move(self, action: MoveOut) -> None:
        placed = self.clients[action.request_id].placed
        if placed is None or (placed.leg_id, placed.leg_worker) != (action.leg_id, action.worker):
            raise Violation(f"{action.leg_id} is to move, and does not run there")
        if placed.transfer_id or placed.computing:
            raise Violation(f"{action.leg_id} is to move, and has no KV yet")
        if action.worker not in self._draining:
            raise Violation(f"{action.leg_id} is to leave {action.worker}, which does not drain")
        self._check_worker(action, action.receiver)
        placed.prefill, placed.decode = action.worker, action.receiver
        placed.transfer_id, placed.lends, placed.moving = action.transfer_id, (False, False), True

    def _check_cancel(self, action: CancelLeg) -> None:
        for client in self.clients.values():
            if client.placed is not None and client.placed.leg_id == action.leg_id:
                client.placed.leg_id = ""
                return
        raise Violation(f"{action.leg_id} is cancelled, and does not run")

    def _check_drop(self, action: DropTransfer) -> None:
        for client in self.clients.values():
            if client.placed is not None and client.placed.transfer_id == action.transfer_id:
                if client.placed.decode != action.worker:
                    raise Violation(f"{action.transfer_id} is dropped at {action.worker}")
                client.placed.transfer_id = ""
                return
        raise Violation(f"{action.transfer_id} is dropped, and is not open")

    def _check_stop(self, action: StopAwaiting) -> None:
        for client in self.clients.values():
            placed = client.placed
            if placed is not None and placed.leg_id == f"{action.transfer_id}.d":
                failed = action.transfer_id in self.undelivered
                lost = placed.prefill not in self._models
                if placed.decode != action.worker or not (failed or lost):
                    raise Violation(f"{action.transfer_id} is not awaited, but its sender is there")
                return
        raise Violation(f"{action.transfer_id} is not awaited any more, and nobody did")

    def _check_fail(self, action: FailRequest, now_s: float) -> None:
        client = self.clients[action.request_id]
        client.end(f"failed: {action.reason}")
        waited_s = now_s - client.queued_since_s if client.queued_since_s >= 0 else 0.0
        if client.losses < LOSSES_MAX and waited_s <= self.scheduler.queue_deadline_s:
            raise Violation(
                f"{action.request_id} fails after {client.losses} losses, {waited_s:.1f} s queued"
            )

    def check_queue(self) -> None:
        """Nobody waits for a worker that is there and has room."""
        view = self.scheduler.view
        for request_id, life in self.scheduler.lives.items():
            ask = life.remaining()
            if life.phase is Phase.QUEUED and not view.is_crowded(ask.tokens_to_compute):
                policy = self.scheduler.policy_of(life)
                placement = policy.place(ask, view)
                if placement is not None:
                    raise Violation(f"{request_id} waits, although {placement.prefill} is there")

    def check_evacuated(self, key: WorkerKey) -> None:
        """Nobody needs a worker whose drain is over."""
        for request_id, client in self.clients.items():
            placed = client.placed
            if placed is None or client.ended:
                continue
            if placed.leg_worker == key or (placed.computing and placed.decode == key):
                raise Violation(f"{request_id} stays on {key}, whose drain is over")

    def check_loads(self, now_s: float) -> None:
        """The scheduler's state against the world's."""
        scheduler = self.scheduler
        # Each in the order of PlacedLoad.
        loads = {key: [*view.others] for key, view in scheduler.view.workers.items()}
        running = queued = 0
        for request_id, client in self.clients.items():
            placed = client.placed
            if client.ended or (placed is not None and not placed.leg_id):
                self._check_left(request_id, client)
                client.placed = placed = None
            if client.ended:
                continue
            life = scheduler.lives.get(request_id)
            if life is None:
                raise Violation(f"{request_id} is forgotten")
            if placed is None:
                queued += 1
                if life.phase is not Phase.QUEUED:
                    raise Violation(f"{request_id} is {life.phase} without a leg")
                if client.queued_since_s < 0:
                    client.queued_since_s = now_s
                continue
            running += 1
            needed = [placed.decode, *([placed.prefill] if placed.computing else [])]
            if placed.moving:
                needed = [placed.leg_worker]
            if any(key not in loads for key in needed):
                raise Violation(f"{request_id} still needs one of {needed}, which is gone")
            if placed.computing:
                load = loads[placed.prefill]
                load[0] += placed.context_tokens
                load[1] += placed.context_tokens if placed.prefill == placed.decode else 0
                load[2] += 1
                load[5] += placed.lends[0]
            if placed.moving and placed.decode not in loads:
                continue
            load = loads[placed.decode]
            load[3] += 1
            load[4] += client.spec.prompt_tokens + len(client.tokens)
            load[5] += placed.lends[1]
        sizes = (len(scheduler._by_leg), len(scheduler._charges), scheduler.queued)
        if sizes != (running, running, queued):
            raise Violation(
                f"{running} requests run and {queued} wait, legs, charges and queue hold {sizes}"
            )
        if strangers := scheduler.prefixes._blocks.keys() - scheduler.view.workers.keys():
            raise Violation(f"blocks are known of {strangers}, which is gone")
        for key, view in scheduler.view.workers.items():
            held = [view.pending_prompt_tokens, view.pending_local_tokens, view.prefills]
            held += [view.decodes, view.decode_tokens, view.lent]
            most, own = scheduler.view.requests_max, view.own
            if most and max(own.prefills, own.decodes) > most:
                raise Violation(f"{key} has {own}, more than {most} requests")
            if held != loads[key]:
                raise Violation(f"load of {key} is {held}, it should be {loads[key]}")

    def _is_to_be_dropped(self, placed: Placed) -> bool:
        """A worker that the router has lost does so by itself."""
        return bool(placed.transfer_id) and placed.decode in self._models

    def _check_left(self, request_id: str, client: Client) -> None:
        """What an ended or unplaced request leaves behind: nothing."""
        placed = client.placed
        if placed is None:
            return
        how = client.ended or "lost its place"
        if placed.leg_id:
            raise Violation(f"{request_id} {how}, and {placed.leg_id} runs on")
        if self._is_to_be_dropped(placed):
            raise Violation(f"{request_id} {how}, and {placed.transfer_id} was not dropped")

    def check_end(self, router_lives: bool) -> None:
        if self.unended():
            raise Violation(f"{self.unended()} never ended")
        for client in self.clients.values():
            self._check_whole(client)
        if not router_lives:
            return
        if self.scheduler.lives or self.scheduler._by_leg or self.scheduler._charges:
            raise Violation("the scheduler still holds requests")
        mixed = [str(view.key) for view in self.scheduler.view.workers.values() if view.mixed]
        if mixed:
            raise Violation(f"{mixed} never return to their pools")

    @staticmethod
    def _check_whole(client: Client) -> None:
        """A finished request has the tokens that one worker would have given it."""
        spec, tokens = client.spec, len(client.tokens)
        stopped, full = tokens == spec.stops_after, tokens == spec.max_tokens
        at_model_len = spec.prompt_tokens + tokens in (LONG_MODEL_LEN, SHORT_MODEL_LEN)
        right = {
            f"finished: {Finish.STOP}": stopped,
            f"finished: {Finish.LENGTH}": not stopped and (full or at_model_len),
            f"finished: {Finish.ABORT}": False,
        }
        if tokens > min(spec.stops_after, spec.max_tokens) or not right.get(client.ended, True):
            raise Violation(f"{spec} {client.ended} with {tokens} tokens")
