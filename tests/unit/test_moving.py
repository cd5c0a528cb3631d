"""Requests that leave a draining worker: when, which way, and that nothing is held afterwards."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.scheduler.life import (
    CancelLeg,
    Deliver,
    DropTransfer,
    Finish,
    MoveOut,
    Phase,
    StartDecode,
    StartLocal,
    StopAwaiting,
)
from cluster.scheduler.moving import MARGIN_S, SLOWER, MoveCosts, leaving
from cluster.scheduler.scheduler import Scheduler
from cluster.scheduler.view import Pool, WorkerKey
from tests.unit.test_scheduler import ASK, D2, IDLE, D, P, add, assert_idle, load, pair

D3 = WorkerKey("d3", "i1")
NEVER_S = 1e9
CHEAP = MoveCosts(kv_s=1, recompute_s=10, ends_s=NEVER_S)


# --- when, and which ------------------------------------------------------------------------------


def test_they_stay_as_long_as_there_is_time() -> None:
    costs = {"a": CHEAP, "b": CHEAP}
    due_s = MARGIN_S + SLOWER * 2
    assert leaving(due_s + 0.1, costs) == []
    assert leaving(due_s, costs) == ["a", "b"]


def test_what_is_cheaper_to_compute_again_stays_until_the_deadline() -> None:
    costs = {"a": CHEAP, "b": MoveCosts(kv_s=1, recompute_s=0.9, ends_s=NEVER_S)}
    assert leaving(2, costs) == ["a"]


def test_what_ends_in_time_stays() -> None:
    costs = {"a": CHEAP, "b": MoveCosts(kv_s=1, recompute_s=10, ends_s=1.9)}
    assert leaving(2, costs) == ["a"]


def test_what_saves_most_goes_first_and_no_more_than_there_is_time_for() -> None:
    costs = {
        "little": MoveCosts(kv_s=1, recompute_s=1.5, ends_s=NEVER_S),
        "much": MoveCosts(kv_s=1, recompute_s=9, ends_s=NEVER_S),
        "long": MoveCosts(kv_s=3, recompute_s=20, ends_s=NEVER_S),
    }
    assert leaving(2.5, costs) == ["much", "little"]


# --- a request that moves -------------------------------------------------------------------------


def decoding_on_d(bytes_per_token: int = 1) -> Scheduler:
    """At its second token, with another decode worker there; and its own drains."""
    scheduler = pair()
    scheduler.on_arrival(ASK, 0.0)
    scheduler.on_output("r.1p.1", [7], Finish.LENGTH)
    scheduler.on_output("r.1p.1.d", [8], None)
    add(scheduler, D2, Pool.DECODE)
    for worker in scheduler.view.workers.values():
        worker.kv_bytes_per_token = bytes_per_token
        worker.rates.step.learn(1, 1000)
    scheduler.view.workers[D].draining = True
    return scheduler


MOVE = MoveOut("r", "r.1p.1.d", D, D2, "r.1m.2")


def moving() -> Scheduler:
    scheduler = decoding_on_d()
    assert scheduler.on_draining(D, 60, 1.0) == []
    assert scheduler.on_draining(D, 1, 1.0) == [MOVE]
    assert scheduler.on_draining(D, 0.5, 1.5) == []
    return scheduler


def test_it_goes_on_elsewhere_after_all_that_it_said() -> None:
    scheduler = moving()
    assert load(scheduler, D) == IDLE
    assert load(scheduler, D2) == (0, 0, 102, 1)
    assert scheduler.on_output("r.1p.1.d", [9], None) == [Deliver("r", None)]
    assert scheduler.lives["r"].phase is Phase.MOVING
    assert scheduler.on_moved_out("r.1p.1.d", True, 2.0) == [
        StartDecode("r", "r.1m.2.d", D2, D, "r.1m.2", (7, 8, 9))
    ]
    assert load(scheduler, D2) == (0, 0, 103, 1)
    assert scheduler.on_output("r.1p.1.d", [], Finish.ABORT) == []
    # Without a word if it has come.
    assert scheduler.on_worker_lost(D, 3.0) == [StopAwaiting(D2, "r.1m.2")]
    scheduler.on_adopted("r.1m.2.d", True, 0.01)
    assert scheduler.on_output("r.1m.2.d", [10, 11], Finish.LENGTH) == [Deliver("r", Finish.LENGTH)]
    assert_idle(scheduler)


def test_what_moves_and_is_not_delivered_is_not_awaited() -> None:
    scheduler = moving()
    assert scheduler.on_undelivered("r.1p.1", "late") == []
    # Not every error has words.
    assert scheduler.on_undelivered("r.1m.2", "") == []
    why = "its sender could not deliver it: "
    assert scheduler.on_moved_out("r.1p.1.d", True, 2.0) == [
        StartDecode("r", "r.1m.2.d", D2, D, "r.1m.2", (7, 8)),
        StopAwaiting(D2, "r.1m.2", why),
    ]


def test_those_that_leave_together_go_to_different_workers() -> None:
    scheduler = decoding_on_d()
    scheduler.view.workers[D].draining = False
    scheduler.view.workers[D2].draining = True
    scheduler.on_arrival(replace(ASK, request_id="s"), 0.0)
    scheduler.on_output("s.1p.2", [7], Finish.LENGTH)
    scheduler.on_output("s.1p.2.d", [8], None)
    scheduler.view.workers[D].draining, scheduler.view.workers[D2].draining = True, False
    add(scheduler, D3, Pool.DECODE)
    moves = scheduler.on_draining(D, 1, 1.0)
    assert {move.receiver for move in moves if isinstance(move, MoveOut)} == {D2, D3}


def test_dear_kv_is_computed_again_at_the_deadline() -> None:
    scheduler = decoding_on_d(bytes_per_token=1 << 40)
    assert scheduler.on_draining(D, 0.1, 1.0) == []
    cancel, *placed = scheduler.on_draining(D, -0.1, 1.0)
    assert cancel == CancelLeg("r.1p.1.d", D)
    assert placed and scheduler.lives["r"].tokens == [7, 8]


def test_what_was_measured_decides() -> None:
    scheduler = decoding_on_d(bytes_per_token=1000)
    for _ in range(50):
        scheduler._kv_moves.learn(102_000, 60)
    assert scheduler.on_draining(D, 1, 1.0) == []


def test_it_may_end_before_it_has_moved() -> None:
    scheduler = moving()
    assert scheduler.on_output("r.1p.1.d", [9], Finish.STOP) == [
        Deliver("r", Finish.STOP),
        DropTransfer(D2, "r.1m.2"),
    ]
    assert scheduler.on_moved_out("r.1p.1.d", False, 2.0) == []
    assert_idle(scheduler)


def test_its_client_may_leave_while_it_moves() -> None:
    scheduler = moving()
    assert scheduler.on_abort("r") == [
        CancelLeg("r.1p.1.d", D),
        DropTransfer(D2, "r.1m.2"),
    ]
    assert_idle(scheduler)


def test_its_worker_may_die_while_it_moves() -> None:
    scheduler = moving()
    drop, *placed = scheduler.on_worker_lost(D, 2.0)
    assert drop == DropTransfer(D2, "r.1m.2")
    assert placed and scheduler.lives["r"].tokens == [7, 8]
    assert load(scheduler, D2)[3] == 1


@pytest.mark.parametrize("moved", [True, False])
def test_its_receiver_may_die_while_it_moves(moved: bool) -> None:
    scheduler = moving()
    assert scheduler.on_worker_lost(D2, 2.0) == []
    actions = scheduler.on_moved_out("r.1p.1.d", moved, 2.0)
    assert actions[-1] == StartLocal("r", "r.2p.3", P, (7, 8))
    assert actions[:-1] == ([] if moved else [CancelLeg("r.1p.1.d", D)])


@pytest.mark.parametrize("outgrown_by_tokens", [0, 1])
def test_what_outgrows_its_receiver_on_the_way_goes_on_at_another(outgrown_by_tokens: int) -> None:
    scheduler = moving()
    scheduler.view.workers[D2].max_model_len_tokens = 104 - outgrown_by_tokens
    assert scheduler.on_output("r.1p.1.d", [9], None) == [Deliver("r", None)]
    actions = scheduler.on_moved_out("r.1p.1.d", True, 2.0)
    if not outgrown_by_tokens:
        assert actions == [StartDecode("r", "r.1m.2.d", D2, D, "r.1m.2", (7, 8, 9))]
        return
    assert actions == [DropTransfer(D2, "r.1m.2"), StartLocal("r", "r.2p.3", P, (7, 8, 9))]
    assert load(scheduler, D2) == IDLE


def test_what_moves_to_a_worker_whose_connection_broke_counts_there_again() -> None:
    scheduler = moving()
    assert scheduler.on_worker_lost(D2, 2.0) == []
    add(scheduler, D2, Pool.DECODE)
    assert load(scheduler, D2) == (0, 0, 102, 1)
    assert scheduler.on_moved_out("r.1p.1.d", True, 2.0) == [
        StartDecode("r", "r.1m.2.d", D2, D, "r.1m.2", (7, 8))
    ]
    scheduler.on_output("r.1m.2.d", [9], Finish.STOP)
    assert_idle(scheduler)


def test_a_worker_that_has_nothing_to_move_has_it_computed_elsewhere() -> None:
    scheduler = moving()
    actions = scheduler.on_moved_out("r.1p.1.d", False, 2.0)
    assert actions[:2] == [CancelLeg("r.1p.1.d", D), DropTransfer(D2, "r.1m.2")]
    assert scheduler.lives["r"].attempts == 2
    assert load(scheduler, D) == IDLE


def test_the_deadline_ends_a_move_that_hangs() -> None:
    scheduler = moving()
    actions = scheduler.on_draining(D, -0.1, 2.0)
    assert actions[:2] == [CancelLeg("r.1p.1.d", D), DropTransfer(D2, "r.1m.2")]
    assert scheduler.on_moved_out("r.1p.1.d", True, 2.0) == []


def test_kv_goes_only_to_workers_of_the_same_model() -> None:
    scheduler = decoding_on_d()
    for key in (P, D2):
        scheduler.view.workers[key].model = "another"
    assert scheduler.on_draining(D, 1, 1.0) == []


def test_a_worker_that_does_not_drain_is_left_alone() -> None:
    scheduler = decoding_on_d()
    scheduler.view.workers[D].draining = False
    assert scheduler.on_draining(D, 1, 1.0) == scheduler.on_draining(D, -1, 1.0) == []
    assert scheduler.on_draining(WorkerKey("gone", "x"), 1, 1.0) == []
