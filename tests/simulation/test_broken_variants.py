"""The simulation finds bugs in scheduling: each variant breaks one rule and is caught within a few
schedules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest

from cluster.scheduler.life import (
    Action,
    DropTransfer,
    FailRequest,
    Finish,
    Life,
    Phase,
    StopAwaiting,
)
from cluster.scheduler.policies import splitwise
from cluster.scheduler.policies.splitwise import Splitwise
from cluster.scheduler.policy import Ask, Placement
from cluster.scheduler.scheduler import LOSSES_MAX, Scheduler, _Charge
from cluster.scheduler.view import ClusterView, PlacedLoad, WorkerKey, WorkerView
from tests.simulation.catching import SEEDS, assert_caught
from tests.simulation.world import simulate

# --- schedulers -----------------------------------------------------------------------------------


class KeepsCharges(Scheduler):
    def _refund(self, life: Life) -> None:
        self._charges.pop(life.ask.request_id, None)


class RefundsPrefillAtTheEndOnly(Scheduler):
    def _refund_prefill(self, charge: _Charge) -> None:
        pass

    def _refund(self, life: Life) -> None:
        charge = self._charges.get(life.ask.request_id)
        if charge is not None:
            super()._refund_prefill(charge)
        super()._refund(life)


class KeepsDrawnWorkers(Scheduler):
    """Those that prefilled for the prefill pool."""

    def _refund_prefill(self, charge: _Charge) -> None:
        charge.lends_prefill = False
        super()._refund_prefill(charge)


class HearsFormerLegs(Scheduler):
    def life_of_leg(self, leg_id: str) -> Life | None:
        return self.lives.get(leg_id.split(".")[0])

    def on_output(self, leg_id: str, token_ids: list[int], finish: Finish | None) -> list[Action]:
        life = self.life_of_leg(leg_id)
        if life is not None and life.leg is not None:
            leg_id = life.leg.leg_id
        return super().on_output(leg_id, token_ids, finish)


class ForgetsTheQueue(Scheduler):
    def _place_queued(self, tries: int | None = None) -> list[Action]:
        return []


class OverfillsWorkers(Scheduler):
    def _place(self, life: Life, keeps_promise: bool = False) -> list[Action] | None:
        most, self.view.requests_max = self.view.requests_max, 0
        placed = super()._place(life, keeps_promise)
        self.view.requests_max = most
        return placed


class GivesUpSilently(Scheduler):
    def on_tick(self, now_s: float) -> list[Action]:
        return [a for a in super().on_tick(now_s) if not isinstance(a, FailRequest)]


class AnswersThoseWhoLeft(Scheduler):
    def on_abort(self, request_id: str) -> list[Action]:
        return [*super().on_abort(request_id), FailRequest(request_id, "the client left")]


class LeavesRequestsOnLostWorkers(Scheduler):
    def on_worker_lost(self, key: WorkerKey, now_s: float) -> list[Action]:
        self.view.workers.pop(key, None)
        return []


class GivesUpAfterOneLoss(Scheduler):
    def _move(self, life: Life) -> list[Action]:
        life.losses = LOSSES_MAX
        return super()._move(life)


class KeepsLostPrefixes(Scheduler):
    def on_worker_lost(self, key: WorkerKey, now_s: float) -> list[Action]:
        actions = super().on_worker_lost(key, now_s)
        self.prefixes.add(key, 16)
        return actions


class KeepsOthersLoads(Scheduler):
    def on_others(self, placed: Mapping[WorkerKey, PlacedLoad]) -> None:
        super().on_others({**self._others, **placed})


class TakesOthersLoadsForItsOwn(Scheduler):
    def own_load(self) -> dict[WorkerKey, PlacedLoad]:
        loads = {key: worker.own.plus(worker.others) for key, worker in self.view.workers.items()}
        return {key: load for key, load in loads.items() if any(load)}


class KeepsLostWorkers(Scheduler):
    def on_worker_lost(self, key: WorkerKey, now_s: float) -> list[Action]:
        worker = self.view.workers[key]
        actions = super().on_worker_lost(key, now_s)
        self.view.workers[key] = worker
        return actions


class TakesDrainsForLosses(Scheduler):
    def on_drain_deadline(self, key: WorkerKey, now_s: float) -> list[Action]:
        for life in self.lives.values():
            life.losses += life.depends_on(key)
        return super().on_drain_deadline(key, now_s)


class LeavesRequestsOnDrainedWorkers(Scheduler):
    def on_drain_deadline(self, key: WorkerKey, now_s: float) -> list[Action]:
        return []


class LosesWhatMoved(Scheduler):
    def on_moved_out(self, leg_id: str, moved: bool, now_s: float) -> list[Action]:
        return []


class CountsMovesWhereTheyLeave(Scheduler):
    def _move_out(self, life: Life, receiver: WorkerKey) -> Action:
        return life.move_out(receiver, self.new_id())


class CountsLegsForItself(Scheduler):
    """As no other router and no restart knows of."""

    def _place(self, life: Life, keeps_promise: bool = False) -> list[Action] | None:
        self.new_id = lambda: "1"
        return super()._place(life, keeps_promise)


# --- policies -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PlacesOnDraining(Splitwise):
    def place(self, ask: Ask, view: ClusterView) -> Placement | None:
        everyone = {key: _changed(worker, draining=False) for key, worker in view.workers.items()}
        return Splitwise.place(self, ask, ClusterView(everyone))


@dataclass(frozen=True, slots=True)
class PairsModels(Splitwise):
    def place(self, ask: Ask, view: ClusterView) -> Placement | None:
        alike = {key: _changed(worker, model="any") for key, worker in view.workers.items()}
        return Splitwise.place(self, ask, ClusterView(alike))


@dataclass(frozen=True, slots=True)
class ForgetsResumedTokens(Splitwise):
    """They need room as the prompt does."""

    def place(self, ask: Ask, view: ClusterView) -> Placement | None:
        prompt_only = Ask(ask.request_id, ask.prompt_tokens, ask.max_tokens, 0, ask.can_hand_over)
        return Splitwise.place(self, prompt_only, view)


@dataclass(frozen=True, slots=True)
class ChargesWhatItPlaces(Splitwise):
    def place(self, ask: Ask, view: ClusterView) -> Placement | None:
        placement = Splitwise.place(self, ask, view)
        if placement is not None:
            view.workers[placement.decode].decode_tokens += ask.tokens_to_compute
        return placement


@dataclass(frozen=True, slots=True)
class LendsToItsOwnPool(Splitwise):
    def place(self, ask: Ask, view: ClusterView) -> Placement | None:
        placement = Splitwise.place(self, ask, view)
        return placement and replace(placement, lends_prefill=True)


def draws_the_last(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(splitwise, "_is_spare", lambda worker, pool: True)


def _changed(worker: WorkerView, **values: Any) -> WorkerView:
    changed = WorkerView(
        worker.key, worker.pool, worker.model, worker.max_model_len_tokens, worker.kv_tokens
    )
    changed.draining = worker.draining
    for name, value in values.items():
        setattr(changed, name, value)
    return changed


# --- lives ----------------------------------------------------------------------------------------


def resumes_without_the_last_token(patch: pytest.MonkeyPatch) -> None:
    start = Life.start

    def broken(self: Life, placement: Placement, id_suffix: str) -> Action:
        last = self.tokens.pop() if self.tokens else None
        try:
            return start(self, placement, id_suffix)
        finally:
            if last is not None:
                self.tokens.append(last)

    patch.setattr(Life, "start", broken)


def decodes_without_the_first_token(patch: pytest.MonkeyPatch) -> None:
    start_decode = Life._start_decode

    def broken(self: Life) -> list[Action]:
        tokens, self.tokens = self.tokens, []
        try:
            return start_decode(self)
        finally:
            self.tokens = tokens

    patch.setattr(Life, "_start_decode", broken)


def forgets_to_cancel(patch: pytest.MonkeyPatch) -> None:
    def broken(self: Life) -> list[Action]:
        actions = self._release_transfer() if self.leg else []
        self._end()
        return actions

    patch.setattr(Life, "abort", broken)


def forgets_to_drop(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Life, "_release_transfer", lambda self: [])


def always_drops(patch: pytest.MonkeyPatch) -> None:
    def broken(self: Life) -> list[Action]:
        if self.placement is None or not self.placement.hands_over:
            return []
        return [DropTransfer(self.placement.decode, self.transfer_id)]

    patch.setattr(Life, "_release_transfer", broken)


def needs_the_prefill_worker_only(patch: pytest.MonkeyPatch) -> None:
    def broken(self: Life, worker: WorkerKey) -> bool:
        return self.leg is not None and self.leg.worker == worker

    patch.setattr(Life, "depends_on", broken)


def takes_any_loss_for_its_sender_s(patch: pytest.MonkeyPatch) -> None:
    def broken(self: Life, worker: WorkerKey) -> list[Action]:
        if self.phase is not Phase.HANDING_OVER or self.placement is None:
            return []
        return [StopAwaiting(self.placement.decode, self.transfer_id)]

    patch.setattr(Life, "on_sender_lost", broken)


def stops_to_await_what_is_not_awaited_yet(patch: pytest.MonkeyPatch) -> None:
    def broken(self: Life, transfer_id: str, reason: str) -> list[Action]:
        return [self._stop_awaiting(reason)] if transfer_id == self.transfer_id else []

    patch.setattr(Life, "on_undelivered", broken)


def takes_an_early_stop_for_the_hand_over(patch: pytest.MonkeyPatch) -> None:
    on_output = Life.on_output

    def broken(
        self: Life, token_ids: list[int], finish: Finish | None, model_len_tokens: int
    ) -> list[Action]:
        if self.leg is not None and self.leg.prefills_only and finish is Finish.STOP:
            finish = Finish.LENGTH
        return on_output(self, token_ids, finish, model_len_tokens)

    patch.setattr(Life, "on_output", broken)


def takes_the_hand_over_for_the_end(patch: pytest.MonkeyPatch) -> None:
    on_output = Life.on_output

    def broken(
        self: Life, token_ids: list[int], finish: Finish | None, model_len_tokens: int
    ) -> list[Action]:
        return on_output(self, token_ids, finish, 0)

    patch.setattr(Life, "on_output", broken)


# --------------------------------------------------------------------------------------------------

SCHEDULERS: list[tuple[type[Scheduler], str]] = [
    (KeepsCharges, "load of"),
    (RefundsPrefillAtTheEndOnly, "load of"),
    (KeepsDrawnWorkers, "load of"),
    (HearsFormerLegs, "wrong token|finished: (abort|length) with"),
    (ForgetsTheQueue, "waits, although"),
    (OverfillsWorkers, "more than . requests"),
    (GivesUpSilently, "is forgotten"),
    (AnswersThoseWhoLeft, "after it left"),
    (LeavesRequestsOnLostWorkers, "lost its place|without a leg|which is gone"),
    (GivesUpAfterOneLoss, "fails after [01] losses"),
    (KeepsLostPrefixes, "blocks are known of"),
    (KeepsOthersLoads, "no progress: .* counts work on"),
    (TakesOthersLoadsForItsOwn, "no progress: .* counts work on"),
    (KeepsLostWorkers, "which is gone"),
    (TakesDrainsForLosses, "fails after"),
    (LeavesRequestsOnDrainedWorkers, "whose drain is over"),
    (LosesWhatMoved, "lost its place"),
    (CountsMovesWhereTheyLeave, "load of"),
    (CountsLegsForItself, "starts twice"),
]
POLICIES = [
    (PlacesOnDraining, "is draining"),
    (PairsModels, "pairs models"),
    (ForgetsResumedTokens, "do not fit"),
    (ChargesWhatItPlaces, "changed what the policy saw"),
    (LendsToItsOwnPool, "is lent to its own pool"),
]
LIVES: list[tuple[Callable[[pytest.MonkeyPatch], None], str]] = [
    (resumes_without_the_last_token, "goes on after"),
    (decodes_without_the_first_token, "goes on after 0 tokens"),
    (forgets_to_cancel, "runs on"),
    (forgets_to_drop, "was not dropped"),
    (always_drops, "is not open"),
    (needs_the_prefill_worker_only, "was not dropped|which is gone|is not open"),
    (takes_any_loss_for_its_sender_s, "its sender is there"),
    (stops_to_await_what_is_not_awaited_yet, "and nobody did"),
    (takes_an_early_stop_for_the_hand_over, r"with \d+ tokens|wrong token|no progress"),
    (takes_the_hand_over_for_the_end, "finished: length with 1 tokens"),
]


@pytest.mark.parametrize(("scheduler", "violation"), SCHEDULERS)
def test_broken_scheduler_is_caught(scheduler: type[Scheduler], violation: str) -> None:
    assert_caught(violation, make_scheduler=scheduler)


@pytest.mark.parametrize(("policy", "violation"), POLICIES)
def test_broken_policy_is_caught(policy: type[Splitwise], violation: str) -> None:
    assert_caught(violation, policy=policy())


def test_drawing_the_last_of_a_pool_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    draws_the_last(monkeypatch)
    assert_caught("the last of its pool")


@pytest.mark.parametrize(("breaks", "violation"), LIVES)
def test_broken_life_is_caught(
    breaks: Callable[[pytest.MonkeyPatch], None],
    violation: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    breaks(monkeypatch)
    assert_caught(violation)


def test_the_same_schedules_pass_unbroken() -> None:
    for seed in SEEDS:
        simulate(seed)
        simulate(seed, policy=Splitwise())
