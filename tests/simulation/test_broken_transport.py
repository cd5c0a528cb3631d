"""The simulation finds bugs in how routers follow the membership, in streams and in the inbox: each
variant breaks one rule and is caught within a few schedules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from cluster.arrivals import Arrivals
from cluster.handoff_failure import HandoffFailure
from cluster.membership import WorkerRecord
from cluster.scheduler.view import ClusterView, WorkerView
from router.following import Leases, Steps, follow
from tests.simulation import router
from tests.simulation.catching import assert_caught
from tests.simulation.faults import NO_FAULTS
from tests.simulation.network import Stream
from tests.simulation.router import SimRouter
from tests.simulation.worker import SimWorker
from workers.kv import incoming
from workers.kv.inbox import Inbox
from workers.kv.incoming import Incoming, TransferState

Patch = pytest.MonkeyPatch

# --- routers and the membership -------------------------------------------------------------------


def follows(patch: Patch, change: Callable[[Steps], Steps]) -> None:
    def broken(records: list[WorkerRecord], view: ClusterView, *others: Any) -> Steps:
        return change(follow(records, view, *others))

    patch.setattr(router, "follow", broken)


def keeps_workers_without_a_lease(patch: Patch) -> None:
    follows(patch, lambda steps: Steps([], steps.connect, steps.evacuate))


def lets_former_starts_back(patch: Patch) -> None:
    patch.setattr(WorkerRecord, "is_superseded_by", lambda self, other: False)


def connects_only_once(patch: Patch) -> None:
    known: set[str] = set()

    def change(steps: Steps) -> Steps:
        new = [r for r in steps.connect if r.incarnation not in known]
        known.update(r.incarnation for r in new)
        return Steps(steps.lost, new, steps.evacuate)

    follows(patch, change)


def follows_no_drains(patch: Patch) -> None:
    def broken(records: list[WorkerRecord], view: ClusterView, *others: Any) -> Steps:
        steps = follow(records, view, *others)
        for worker in view.workers.values():
            worker.draining = False
        return Steps(steps.lost, steps.connect, [])

    patch.setattr(router, "follow", broken)


def connects_to_draining_workers_as_to_others(patch: Patch) -> None:
    def broken(*values: Any, draining: bool, **others: Any) -> WorkerView:
        return WorkerView(*values, **others)

    patch.setattr(router, "WorkerView", broken)


def believes_an_empty_redis(patch: Patch) -> None:
    patch.setattr(Leases, "tell", lambda self, now_s: True)


def keeps_workers_whose_stream_ended(patch: Patch) -> None:
    lose = SimRouter.lose

    def broken(self: SimRouter, stream: Stream, reason: str) -> None:
        if "lease" in reason:
            lose(self, stream, reason)

    patch.setattr(SimRouter, "lose", broken)


# --- streams --------------------------------------------------------------------------------------


def takes_repeated_messages(patch: Patch) -> None:
    is_new = Arrivals.is_new
    patch.setattr(Arrivals, "is_new", lambda self, number: is_new(self, number) or True)


def misses_gaps(patch: Patch) -> None:
    def broken(self: Arrivals, number: int) -> bool:
        new = number > self.last
        self.last = max(self.last, number)
        return new

    patch.setattr(Arrivals, "is_new", broken)


def goes_on_after_the_stream(patch: Patch) -> None:
    patch.setattr(SimWorker, "end_stream", lambda self, stream: None)


# --- the inbox ------------------------------------------------------------------------------------


def adopts_in_part(patch: Patch) -> None:
    take_kv = Incoming.take_kv

    def broken(self: Incoming, frame: Any, now_s: float) -> str:
        reason = take_kv(self, frame, now_s)
        if not reason:
            self.state = TransferState.WHOLE
        return reason

    patch.setattr(Incoming, "take_kv", broken)


def takes_repeated_frames(patch: Patch) -> None:
    patch.setattr(incoming, "_overlap", lambda a, b: False)


def adopts_after_a_failure(patch: Patch) -> None:
    fail = Inbox._fail

    def broken(self: Inbox, transfer: Any, reason: str, failure: HandoffFailure) -> None:
        if transfer.open is None:
            fail(self, transfer, reason, failure)
        else:
            transfer.state = TransferState.WHOLE

    patch.setattr(Inbox, "_fail", broken)


def tells_nobody(patch: Patch) -> None:
    patch.setattr(Inbox, "fail", lambda self, *how: None)
    patch.setattr(Inbox, "sweep", lambda self: [])


def never_sweeps(patch: Patch) -> None:
    patch.setattr(Inbox, "sweep", lambda self: [])


def opens_adopted_transfers_again(patch: Patch) -> None:
    take = Inbox.take

    def broken(self: Inbox, transfer_id: str) -> Any:
        frames = take(self, transfer_id)
        self._over.pop(transfer_id, None)
        return frames

    patch.setattr(Inbox, "take", broken)


def keeps_the_bytes_of_what_was_adopted(patch: Patch) -> None:
    take = Inbox.take

    def broken(self: Inbox, transfer_id: str) -> Any:
        held = self._bytes
        frames = take(self, transfer_id)
        self._bytes = held
        return frames

    patch.setattr(Inbox, "take", broken)


# --------------------------------------------------------------------------------------------------

VARIANTS: list[tuple[Callable[[Patch], None], str]] = [
    (keeps_workers_without_a_lease, "which is silent"),
    (believes_an_empty_redis, "which keeps its lease"),
    (lets_former_starts_back, "which keeps its lease|does not use"),
    (connects_only_once, "does not use"),
    (follows_no_drains, "is draining"),
    (connects_to_draining_workers_as_to_others, "is draining"),
    (keeps_workers_whose_stream_ended, "which ended"),
    (takes_repeated_messages, "wrong token|starts twice|after it finished|with .* tokens"),
    (misses_gaps, "wrong token|is stuck|with .* tokens"),
    (goes_on_after_the_stream, "runs for nobody"),
    (adopts_in_part, "adopts .* of .* tokens"),
    (adopts_after_a_failure, "adopts .* of .* tokens"),
    (tells_nobody, "is stuck"),
    (never_sweeps, "no progress: .* KV of"),
    (opens_adopted_transfers_again, "held it again"),
    (keeps_the_bytes_of_what_was_adopted, "no progress: .* KV of 0 in"),
]


@pytest.mark.parametrize(("breaks", "violation"), VARIANTS)
def test_broken_variant_is_caught(
    breaks: Callable[[Patch], None], violation: str, monkeypatch: Patch
) -> None:
    breaks(monkeypatch)
    assert_caught(violation)


def test_an_inbox_that_takes_repeated_frames_is_caught(monkeypatch: Patch) -> None:
    takes_repeated_frames(monkeypatch)
    # One frame has to be lost and another of its size repeated.
    faults = replace(NO_FAULTS, kv_lost=0.1, kv_repeated=0.3)
    assert_caught("adopts .* of .* tokens", faults=faults)
