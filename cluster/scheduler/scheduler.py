"""The scheduler: all requests' lives, the workers' load, and the queue of those without a place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import InitVar, dataclass, field, replace

from cluster.scheduler.admission import Miss, meeting
from cluster.scheduler.life import (
    Action,
    CancelLeg,
    DropTransfer,
    Failure,
    Finish,
    Life,
    Phase,
    request_of,
)
from cluster.scheduler.moving import MoveCosts, leaving
from cluster.scheduler.policies.scored import OUTPUT_TOKENS
from cluster.scheduler.policy import Ask, Placement, PlacementPolicy
from cluster.scheduler.prefixes import PrefixIndex
from cluster.scheduler.queue import FairQueue
from cluster.scheduler.rates import Learned, Rates
from cluster.scheduler.view import NOTHING, ClusterView, PlacedLoad, WorkerKey, WorkerView

LOSSES_MAX = 4
"""Workers a request loses before it fails: one that kills workers must not kill them all."""
FADE_EVERY_S = 1.0
FILL_TRIES = 8
FILL_TRIES_TICK = 64
RESUMED_PRIORITY = -1


@dataclass(slots=True)
class _Charge:
    """What a request was added to its workers' load as."""

    prefill: WorkerKey | None
    decode: WorkerKey
    prompt_tokens: int
    decode_tokens: int
    lends_prefill: bool
    lends_decode: bool
    since_s: float
    """`prompt_tokens` is 0 for one that came with its KV from a draining worker."""
    adapter: str


@dataclass(slots=True)
class Scheduler:
    """`policy` places requests that don't bring their own. `new_id` makes the part of a leg's id
    that no other router or restart will make."""

    policy: PlacementPolicy
    new_id: Callable[[], str]
    queue_deadline_s: float = 30.0
    queued_max: int = 4096
    requests_max: InitVar[int] = 0
    """That a worker has at a time; others wait here. 0: no bound."""
    view: ClusterView = field(default_factory=ClusterView)
    prefixes: PrefixIndex = field(default_factory=PrefixIndex)
    lives: dict[str, Life] = field(default_factory=dict)
    _by_leg: dict[str, Life] = field(default_factory=dict)
    _charges: dict[str, _Charge] = field(default_factory=dict)
    _others: Mapping[WorkerKey, PlacedLoad] = field(default_factory=dict)
    """What other routers placed."""
    _queue: FairQueue = field(default_factory=FairQueue)
    _rates: Rates = field(default_factory=Rates)
    """All workers'."""
    _now_s: float = 0.0
    """The latest time heard of."""
    _faded_at_s: float = 0.0
    _kv_moves: Learned = field(default_factory=lambda: Learned(0.005, 1e-8))
    """What it takes to send a running request's KV, by bytes."""

    def __post_init__(self, requests_max: int) -> None:
        self.view.requests_max = requests_max

    @property
    def queued(self) -> int:
        """Requests that wait for a worker."""
        return len(self._queue)

    # --- requests -----------------------------------------------------------------------------

    def on_arrival(
        self, ask: Ask, now_s: float, policy: PlacementPolicy | None = None
    ) -> list[Action]:
        self._now_s = now_s
        life = self.lives[ask.request_id] = Life(ask, policy)
        if not (self.view.requests_max and self._queue):
            actions = self._place(life, ask.slo.promises)
            if actions is not None:
                return actions
        wait_s = self._queue.wait_s(ask.slo.priority, now_s)
        if len(self._queue) >= self.queued_max:
            reason = f"{self.queued_max} requests are waiting already"
            return self._forget(life, life.fail(reason, Failure.QUEUE_FULL, wait_s))
        if ask.slo.ttft_s is not None and wait_s > ask.slo.ttft_s:
            reason = f"it would wait {wait_s:.2f} s for a worker"
            miss = life.fail(reason, Failure.SLO, wait_s - ask.slo.ttft_s)
            return self._forget(life, miss)
        self._enqueue(life, ask.slo.priority)
        return self._fill()

    def on_output(self, leg_id: str, token_ids: list[int], finish: Finish | None) -> list[Action]:
        """A leg's output. Empty for a leg that is no longer the request's."""
        life = self._by_leg.get(leg_id)
        if life is None:
            return []
        assert life.placement is not None
        # Both workers are there while the first leg runs, and only its end asks for this.
        decodes_on = self.view.workers.get(life.placement.decode)
        model_len = decodes_on.max_model_len_tokens if decodes_on else 0
        was_prefilling = life.phase is Phase.PREFILLING
        actions = life.on_output(token_ids, finish, model_len)
        charge = self._charges[life.ask.request_id]
        if was_prefilling and life.phase is not Phase.PREFILLING:
            self._refund_prefill(charge)
        if decode := self.view.workers.get(charge.decode):
            decode.decode_tokens += len(token_ids)
            charge.decode_tokens += len(token_ids)
        if life.leg is None or life.leg.leg_id != leg_id:
            del self._by_leg[leg_id]
            if life.leg is not None:
                self._by_leg[life.leg.leg_id] = life
        if life.done:
            actions = self._forget(life, actions)
        return actions + self._fill() if self.view.requests_max else actions

    def life_of_leg(self, leg_id: str) -> Life | None:
        """None for a leg that is no longer its request's."""
        return self._by_leg.get(leg_id)

    def policy_of(self, life: Life) -> PlacementPolicy:
        return life.policy or self.policy

    def on_adopted(self, leg_id: str, handed_over: bool, exposed_s: float = 0.0) -> Life | None:
        """`exposed_s`: what the decode leg waited for its KV, or in vain."""
        life = self._by_leg.get(leg_id)
        if life is not None:
            life.on_adopted(handed_over)
            charge = self._charges[life.ask.request_id]
            decode = self.view.workers.get(charge.decode)
            if decode is not None and not handed_over:
                # However soon it has failed, it costs what is computed again.
                again = charge.prompt_tokens or charge.decode_tokens
                exposed_s += decode.rates.prefill.predict_s(again)
            if decode is not None and charge.prompt_tokens:
                kv_bytes = charge.prompt_tokens * decode.kv_bytes_per_token
                decode.rates.exposed.learn(kv_bytes, exposed_s)
            elif decode is not None:
                kv_bytes = charge.decode_tokens * decode.kv_bytes_per_token
                self._kv_moves.learn(kv_bytes, exposed_s)
        return life

    def on_abort(self, request_id: str) -> list[Action]:
        life = self.lives.get(request_id)
        return [] if life is None else self._forget(life, life.abort()) + self._fill()

    # --- workers ------------------------------------------------------------------------------

    def on_worker_up(self, worker: WorkerView) -> list[Action]:
        worker.rates = self._rates.of_one()
        self.view.workers[worker.key] = worker
        self.view.note_models()
        worker.count_others(self._others.get(worker.key, NOTHING))
        for life in self.lives.values():
            charge = self._charges.get(life.ask.request_id)
            if life.phase is Phase.MOVING and charge is not None and charge.decode == worker.key:
                # The connection to it broke, which what moves there does not depend on.
                self._charge_decode(worker, charge)
        if worker.block_tokens:
            self.prefixes.add(worker.key, worker.block_tokens)
        return self._place_queued()

    def on_worker_lost(self, key: WorkerKey, now_s: float) -> list[Action]:
        self._now_s = now_s
        self.view.workers.pop(key, None)
        self.view.note_models()
        self.prefixes.remove(key)
        actions: list[Action] = []
        for life in list(self.lives.values()):
            if life.depends_on(key):
                life.losses += 1
                actions.extend(self._move(life))
            else:
                actions.extend(life.on_sender_lost(key))
        return actions

    def on_drain_deadline(self, key: WorkerKey, now_s: float) -> list[Action]:
        """What still runs on a draining worker goes on elsewhere."""
        worker = self.view.workers.get(key)
        if worker is None or not worker.draining:
            return []
        self._now_s = now_s
        actions: list[Action] = []
        for life in [life for life in self.lives.values() if life.depends_on(key)]:
            actions.extend(self._move(life))
        return actions

    def on_adapter_loaded(self, key: WorkerKey, name: str) -> None:
        """Without a request for it."""
        if worker := self.view.workers.get(key):
            worker.adapters.use(name)
            worker.adapters.release(name)

    def on_adapter_removed(self, name: str) -> None:
        for worker in self.view.workers.values():
            worker.adapters.drop(name)

    def on_draining(self, key: WorkerKey, left_s: float, now_s: float) -> list[Action]:
        """What a draining worker's requests are to do, `left_s` before its deadline. To be asked
        again and again."""
        worker = self.view.workers.get(key)
        if worker is None or not worker.draining:
            return []
        if left_s <= 0:
            return self.on_drain_deadline(key, now_s)
        costs: dict[str, MoveCosts] = {}
        for request_id, life in self.lives.items():
            there = life.leg is not None and life.leg.worker == key
            if there and life.phase is Phase.DECODING and life.ask.can_hand_over:
                placement = self._elsewhere(life, worker)
                if placement is not None:
                    costs[request_id] = self._move_costs(life, worker, placement)
        actions: list[Action] = []
        for life in map(self.lives.__getitem__, leaving(left_s, costs)):
            # Asked again, for those that have left before count where they went.
            placement = self._elsewhere(life, worker)
            if placement is not None:
                actions.append(self._move_out(life, placement.decode))
        return actions

    def on_moved_out(self, leg_id: str, moved: bool, now_s: float) -> list[Action]:
        """A leg has stopped, with its KV on the way; or it has nothing to move and runs on."""
        life = self._by_leg.get(leg_id)
        if life is None or life.phase is not Phase.MOVING:
            return []
        assert life.placement is not None
        receiver = self.view.workers.get(life.placement.decode)
        context_tokens = life.remaining().tokens_to_compute
        # It went on while it was told to stop, and may have outgrown the receiver.
        if moved and receiver is not None and context_tokens < receiver.max_model_len_tokens:
            del self._by_leg[leg_id]
            actions = life.on_moved_out()
            assert life.leg is not None
            self._by_leg[life.leg.leg_id] = life
            return actions
        self._now_s = now_s
        actions = self._move(life)
        # Nobody has to be told to stop what has stopped.
        return [a for a in actions if not isinstance(a, CancelLeg)] if moved else actions

    def on_undelivered(self, transfer_id: str, reason: str) -> list[Action]:
        """A worker could not deliver a transfer: of a request that may be another router's."""
        life = self.lives.get(request_of(transfer_id))
        return [] if life is None else life.on_undelivered(transfer_id, reason)

    def on_load(
        self, key: WorkerKey, running: int, waiting: int, kv_usage: float, inbox_bytes: int = 0
    ) -> None:
        worker = self.view.workers.get(key)
        if worker is not None:
            worker.reported_running = running
            worker.reported_waiting = waiting
            worker.reported_kv_usage = kv_usage
            worker.reported_inbox_bytes = inbox_bytes

    def on_step(self, key: WorkerKey, now_s: float, legs: Mapping[str, int | None]) -> None:
        """A worker's engine step is done: what it tells of the worker's speed. To be told before
        the step's outputs. `legs`: those that it has an output of, with the prompt tokens that were
        computed for it, if that is known and this is its first output."""
        self._now_s = now_s
        worker = self.view.workers.get(key)
        if worker is None:
            return
        prefilled, since_s = 0, now_s
        for leg_id, computed_tokens in legs.items() if worker.prefills else ():
            life = self._by_leg.get(leg_id)
            if life is None or life.phase is not Phase.PREFILLING:
                continue
            charge = self._charges[life.ask.request_id]
            tokens = charge.prompt_tokens if computed_tokens is None else computed_tokens
            prefilled, since_s = prefilled + tokens, min(since_s, charge.since_s)
        worker.rates.saw_step(now_s, legs, prefilled, since_s)

    def on_others(self, placed: Mapping[WorkerKey, PlacedLoad]) -> None:
        """What all other routers together have on the workers."""
        self._others = placed
        for key, worker in self.view.workers.items():
            worker.count_others(placed.get(key, NOTHING))

    def own_load(self) -> dict[WorkerKey, PlacedLoad]:
        """What this router has on the workers, without those where it has nothing."""
        loads = {key: worker.own for key, worker in self.view.workers.items()}
        return {key: load for key, load in loads.items() if any(load)}

    def on_tick(self, now_s: float) -> list[Action]:
        """Place what waits, for a worker may have stopped draining. Give up on what waited too
        long."""
        if now_s - self._faded_at_s >= FADE_EVERY_S:
            self._faded_at_s = now_s
            for rates in (self._rates, *(worker.rates for worker in self.view.workers.values())):
                rates.exposed.fade()
        self._now_s = now_s
        actions = self._place_queued(FILL_TRIES_TICK if self.view.requests_max else None)
        for request_id in self._queue.waiting_longer_than(self.queue_deadline_s, now_s):
            life = self.lives[request_id]
            reason = f"no worker could take it for {self.queue_deadline_s:g} s"
            actions.extend(self._forget(life, life.fail(reason, Failure.NO_WORKER)))
        return actions

    # --- inside -------------------------------------------------------------------------------

    def _ask(self, life: Life) -> Ask:
        """With what workers hold of it already."""
        ask = life.remaining()
        if ask.blocks is not None and (held := self.prefixes.held_tokens(ask.blocks)):
            return replace(ask, held_tokens=held)
        return ask

    def _place(self, life: Life, keeps_promise: bool = False) -> list[Action] | None:
        """None: it has to wait. `keeps_promise`: rather than miss its targets, it fails."""
        if self.view.is_crowded(life.remaining().tokens_to_compute):
            return None
        ask = self._ask(life)
        placement = self.policy_of(life).place(ask, self.view)
        if placement is None:
            return None
        if keeps_promise:
            met = meeting(ask, placement, self.view)
            if isinstance(met, Miss):
                miss = life.fail(met.reason, Failure.SLO, met.retry_after_s)
                return self._forget(life, miss)
            placement = met
        if ask.held_tokens:
            placement = self._use_held(ask, placement)
        actions = [life.start(placement, self.new_id())]
        assert life.leg is not None
        self._by_leg[life.leg.leg_id] = life
        prefill, decode = (self.view.workers[k] for k in (placement.prefill, placement.decode))
        tokens = ask.tokens_to_compute
        prefill.pending_prompt_tokens += tokens
        prefill.prefills += 1
        prefill.lent += placement.lends_prefill
        if prefill is decode:
            prefill.pending_local_tokens += tokens
        if ask.adapter:
            prefill.adapters.use(ask.adapter)
        charge = self._charges[ask.request_id] = _Charge(
            prefill=prefill.key,
            decode=decode.key,
            prompt_tokens=tokens,
            decode_tokens=tokens,
            lends_prefill=placement.lends_prefill,
            lends_decode=placement.lends_decode,
            since_s=self._now_s,
            adapter=ask.adapter,
        )
        self._charge_decode(decode, charge)
        return actions

    def _use_held(self, ask: Ask, placement: Placement) -> Placement:
        assert ask.blocks is not None and ask.held_tokens is not None
        for key in {placement.prefill, placement.decode}:
            self.prefixes.use(key, ask.blocks, ask.held_tokens.get(key, 0))
        held = ask.held_tokens.get(placement.decode, 0)
        return replace(placement, decode_cached_tokens=held)

    def _enqueue(self, life: Life, priority: int) -> None:
        tokens = life.ask.tokens_to_compute + min(life.tokens_left, OUTPUT_TOKENS)
        self._queue.add(life.ask.request_id, self._now_s, priority, life.ask.tenant, max(1, tokens))

    def _place_queued(self, tries: int | None = None) -> list[Action]:
        """As many as there is room for. `tries`: give up when so many in a row find none."""
        actions: list[Action] = []
        failed = 0
        for request_id in self._queue.in_order(self._now_s):
            placed = self._place(self.lives[request_id])
            if placed is not None:
                self._queue.take(request_id, self._now_s)
                actions.extend(placed)
                failed = 0
            elif (failed := failed + 1) == tries:
                break
        return actions

    def _fill(self) -> list[Action]:
        """A worker that was full may have room."""
        if not self.view.requests_max or not self._queue:
            return []
        return self._place_queued(tries=FILL_TRIES)

    def _to_nobody(self, action: Action) -> bool:
        """What was to be said to a lost worker."""
        if isinstance(action, CancelLeg | DropTransfer):
            return action.worker not in self.view.workers
        return False

    def _elsewhere(self, life: Life, worker: WorkerView) -> Placement | None:
        """Where it would be placed now, if its worker's KV is right there."""
        placement = self.policy_of(life).place(self._ask(life), self.view)
        if placement is None or self.view.workers[placement.decode].model != worker.model:
            return None
        return placement

    def _move_costs(self, life: Life, worker: WorkerView, placement: Placement) -> MoveCosts:
        tokens = life.ask.prompt_tokens + len(life.tokens)
        prefill = self.view.workers[placement.prefill]
        again = self._ask(life).tokens_to_compute_on(prefill)
        step_s = worker.rates.step.predict_s(worker.decodes)
        return MoveCosts(
            kv_s=self._kv_moves.predict_s(tokens * worker.kv_bytes_per_token),
            recompute_s=prefill.prefill_wait_s + prefill.rates.prefill.predict_s(again),
            ends_s=life.tokens_left * step_s,
        )

    def _move_out(self, life: Life, receiver: WorkerKey) -> Action:
        """Its load counts at the receiver from now on, for nobody is placed where it leaves."""
        self._refund(life)
        charge = self._charges[life.ask.request_id] = _Charge(
            prefill=None,
            decode=receiver,
            prompt_tokens=0,
            decode_tokens=life.ask.prompt_tokens + len(life.tokens),
            lends_prefill=False,
            lends_decode=False,
            since_s=self._now_s,
            adapter=life.ask.adapter,
        )
        self._charge_decode(self.view.workers[receiver], charge)
        return life.move_out(receiver, self.new_id())

    def _move(self, life: Life) -> list[Action]:
        assert life.leg is not None
        self._by_leg.pop(life.leg.leg_id, None)
        self._refund(life)
        if life.losses >= LOSSES_MAX:
            reason = f"it lost its worker {life.losses} times"
            return self._forget(life, life.fail(reason))
        actions = [action for action in life.unplace() if not self._to_nobody(action)]
        placed = self._place(life)
        if placed is None:
            # Before all others: its client has been served already.
            self._enqueue(life, RESUMED_PRIORITY)
        return actions + (placed or [])

    def _forget(self, life: Life, actions: list[Action]) -> list[Action]:
        self._refund(life)
        self.lives.pop(life.ask.request_id, None)
        self._by_leg.pop(life.last_leg_id, None)
        self._queue.remove(life.ask.request_id)
        return [action for action in actions if not self._to_nobody(action)]

    @staticmethod
    def _charge_decode(worker: WorkerView, charge: _Charge) -> None:
        worker.decode_tokens += charge.decode_tokens
        worker.decodes += 1
        worker.lent += charge.lends_decode
        if charge.adapter:
            worker.adapters.use(charge.adapter)

    def _refund(self, life: Life) -> None:
        charge = self._charges.pop(life.ask.request_id, None)
        if charge is None:
            return
        self._refund_prefill(charge)
        if worker := self.view.workers.get(charge.decode):
            worker.decode_tokens -= charge.decode_tokens
            worker.decodes -= 1
            worker.lent -= charge.lends_decode
            worker.adapters.release(charge.adapter)

    def _refund_prefill(self, charge: _Charge) -> None:
        if charge.prefill is not None and (worker := self.view.workers.get(charge.prefill)):
            worker.pending_prompt_tokens -= charge.prompt_tokens
            worker.prefills -= 1
            worker.lent -= charge.lends_prefill
            worker.adapters.release(charge.adapter)
            if charge.prefill == charge.decode:
                worker.pending_local_tokens -= charge.prompt_tokens
        charge.prefill = None
