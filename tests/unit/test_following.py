"""What a router does about the membership it has read."""

from __future__ import annotations

from dataclasses import replace

from cluster.membership import WorkerRecord, WorkerState
from cluster.scheduler.view import ClusterView, Pool, WorkerKey, WorkerView
from router.following import Leases, Starts, Steps, follow, key_of

READY = WorkerRecord("w", "i1", Pool.DECODE, WorkerState.READY)
DRAINING = WorkerRecord("w", "i1", Pool.DECODE, WorkerState.DRAINING, drain_until_unix_s=50.0)
NOTHING = Steps([], [], [])


def view_of(*records: WorkerRecord) -> ClusterView:
    views = [WorkerView(key_of(record), record.pool, "m", 100, 1000) for record in records]
    return ClusterView({view.key: view for view in views})


def test_connects_to_whoever_is_ready_once() -> None:
    assert follow([READY], view_of(), (), 0.0) == Steps([], [READY], [])
    assert follow([READY], view_of(), {key_of(READY)}, 0.0) == NOTHING
    assert follow([READY], view_of(READY), (), 0.0) == NOTHING


def test_a_worker_that_starts_is_no_member_yet() -> None:
    starting = WorkerRecord("w", "i1", Pool.DECODE, WorkerState.STARTING)
    assert follow([starting], view_of(), (), 0.0) == NOTHING
    assert follow([starting], view_of(READY), (), 0.0).lost == [key_of(READY)]


def test_a_worker_without_a_lease_is_lost() -> None:
    assert follow([], view_of(READY), (), 0.0) == Steps([key_of(READY)], [], [])


def test_a_new_start_takes_the_place_of_the_old() -> None:
    again = WorkerRecord("w", "i2", Pool.DECODE, WorkerState.READY)
    assert follow([again], view_of(READY), (), 0.0) == Steps([WorkerKey("w", "i1")], [again], [])


def test_drains_and_pools_are_taken_over() -> None:
    view = view_of(READY)
    worker = view.workers[key_of(READY)]
    assert follow([DRAINING], view, (), 49.0) == Steps([], [], [], {key_of(READY): 1.0})
    assert worker.draining and worker.pool is Pool.DECODE
    assert follow([DRAINING], view, (), 51.0) == Steps([], [], [key_of(READY)])
    prefill = WorkerRecord("w", "i1", Pool.PREFILL, WorkerState.READY)
    assert follow([prefill], view, (), 0.0) == NOTHING
    assert not worker.draining and worker.pool is Pool.PREFILL


def test_a_missing_record_tells_nothing_while_leases_are_not_trusted() -> None:
    assert follow([], view_of(READY), (), 0.0, leases_tell=False) == NOTHING
    again = WorkerRecord("w", "i2", Pool.DECODE, WorkerState.READY)
    steps = follow([again], view_of(READY), (), 0.0, leases_tell=False)
    assert steps == Steps([WorkerKey("w", "i1")], [again], [])


def test_leases_are_trusted_when_a_new_router_has_read_for_a_while() -> None:
    leases = Leases(grace_s=4.0)
    leases.on_read("a", 10.0)
    assert not leases.tell(13.9)
    leases.on_read("a", 11.0)
    assert leases.tell(14.0)


def test_leases_are_not_trusted_when_redis_began_anew() -> None:
    leases = Leases(grace_s=4.0)
    leases.on_read("a", 0.0)
    assert leases.tell(10.0)
    leases.on_read("b", 11.0)
    assert not leases.tell(14.9)
    leases.on_read("b", 14.9)
    assert leases.tell(15.0)


def test_leases_are_not_trusted_when_redis_was_out_of_reach() -> None:
    leases = Leases(grace_s=4.0)
    leases.on_read("a", 0.0)
    leases.on_failure()
    leases.on_read("a", 12.0)
    assert not leases.tell(15.9) and leases.tell(16.0)


def test_a_former_start_does_not_come_back() -> None:
    starts = Starts()
    former = replace(READY, started_unix_s=1.0)
    later = replace(READY, incarnation="i2", started_unix_s=2.0)
    assert starts.latest([former]) == [former]
    assert starts.latest([later]) == [later]
    assert starts.latest([former]) == []
    draining = replace(later, state=WorkerState.DRAINING)
    assert starts.latest([draining]) == [draining]


def test_starts_that_tell_no_time_follow_each_other() -> None:
    starts = Starts()
    again = replace(READY, incarnation="i2")
    assert [starts.latest([record]) for record in (READY, again, READY)] == [
        [READY],
        [again],
        [READY],
    ]
