"""All requests' lives together: load, queue, lost workers, and what former legs still say."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from cluster.scheduler.life import (
    CancelLeg,
    Deliver,
    DropTransfer,
    FailRequest,
    Failure,
    Finish,
    Phase,
    StartDecode,
    StartLocal,
    StartPrefill,
    StopAwaiting,
)
from cluster.scheduler.policies.splitwise import Splitwise
from cluster.scheduler.policy import Ask, Placement
from cluster.scheduler.scheduler import LOSSES_MAX, Scheduler
from cluster.scheduler.view import ClusterView, Pool, WorkerKey, WorkerView

P, D, D2 = WorkerKey("p", "i1"), WorkerKey("d", "i1"), WorkerKey("d2", "i1")
ASK = Ask("r", prompt_tokens=100, max_tokens=5)
IDLE = (0, 0, 0, 0)


def empty() -> Scheduler:
    ids = itertools.count(1)
    return Scheduler(Splitwise(), new_id=lambda: str(next(ids)))


def add(scheduler: Scheduler, key: WorkerKey, pool: Pool, model_len: int = 1000) -> list[object]:
    return list(scheduler.on_worker_up(WorkerView(key, pool, "m", model_len, kv_tokens=10_000)))


def pair() -> Scheduler:
    scheduler = empty()
    add(scheduler, P, Pool.PREFILL)
    add(scheduler, D, Pool.DECODE)
    return scheduler


def load(scheduler: Scheduler, key: WorkerKey) -> tuple[int, int, int, int]:
    """Pending prompt tokens, prefills, decode tokens, decodes."""
    worker = scheduler.view.workers[key]
    return (
        worker.pending_prompt_tokens,
        worker.prefills,
        worker.decode_tokens,
        worker.decodes,
    )


def assert_idle(scheduler: Scheduler) -> None:
    assert not scheduler.lives and not scheduler.queued
    assert not scheduler._by_leg and not scheduler._charges
    assert all(load(scheduler, key) == IDLE for key in scheduler.view.workers)


def test_a_request_from_arrival_to_end() -> None:
    scheduler = pair()
    assert scheduler.on_arrival(ASK, 0.0) == [StartPrefill("r", "r.1p.1", P, D, "r.1p.1")]
    assert load(scheduler, P) == (100, 1, 0, 0)
    assert load(scheduler, D) == (0, 0, 100, 1)
    assert scheduler.on_output("r.1p.1", [7], Finish.LENGTH) == [
        Deliver("r", None),
        StartDecode("r", "r.1p.1.d", D, P, "r.1p.1", (7,)),
    ]
    assert load(scheduler, P) == IDLE
    assert load(scheduler, D) == (0, 0, 101, 1)
    assert scheduler.on_output("r.1p.1.d", [8, 9], None) == [Deliver("r", None)]
    assert load(scheduler, D) == (0, 0, 103, 1)
    assert scheduler.on_output("r.1p.1.d", [10], Finish.STOP) == [Deliver("r", Finish.STOP)]
    assert_idle(scheduler)


def test_workers_of_another_model_may_come_and_go() -> None:
    scheduler, foreign = pair(), WorkerKey("decode-9", "1")

    def decodes_on(number: int) -> WorkerKey:
        (started,) = scheduler.on_arrival(replace(ASK, request_id=f"r{number}"), 0.0)
        assert isinstance(started, StartPrefill)
        return started.receiver

    assert decodes_on(1) == D
    # With nothing to do, it has the shortest queue.
    scheduler.on_worker_up(WorkerView(foreign, Pool.DECODE, "n", 1000, kv_tokens=10_000))
    assert decodes_on(2) == D
    scheduler.on_worker_lost(foreign, 0.0)
    add(scheduler, foreign, Pool.DECODE)
    assert decodes_on(3) == foreign


def test_local_work_is_prompt_load_until_its_first_token() -> None:
    scheduler = empty()
    add(scheduler, D, Pool.DECODE)
    scheduler.on_arrival(ASK, 0.0)
    assert load(scheduler, D) == (100, 1, 100, 1)
    scheduler.on_output("r.1p.1", [7], None)
    assert load(scheduler, D) == (0, 0, 101, 1)


def test_resumed_local_work_is_prompt_load_until_its_first_token() -> None:
    scheduler = pair()
    scheduler.on_arrival(ASK, 0.0)
    scheduler.on_output("r.1p.1", [7], Finish.LENGTH)
    assert scheduler.on_worker_lost(D, 1.0) == [StartLocal("r", "r.2p.2", P, (7,))]
    assert load(scheduler, P) == (101, 1, 101, 1)
    scheduler.on_output("r.2p.2", [8], None)
    assert load(scheduler, P) == (0, 0, 102, 1)
    scheduler.on_output("r.2p.2", [9], Finish.STOP)
    assert_idle(scheduler)


@pytest.mark.parametrize("finish", Finish)
@pytest.mark.parametrize("tokens", [0, 1, 2])
def test_any_end_leaves_no_load(finish: Finish, tokens: int) -> None:
    scheduler = pair()
    scheduler.on_arrival(replace(ASK, max_tokens=3), 0.0)
    leg = "r.1p.1"
    for i in range(tokens):
        scheduler.on_output(leg, [i], Finish.LENGTH if i == 0 else None)
        leg = "r.1p.1.d"
    if tokens == 0 and finish is Finish.LENGTH:
        scheduler.on_abort("r")
    else:
        scheduler.on_output(leg, [9], finish)
    assert_idle(scheduler)


@pytest.mark.parametrize("tokens", [0, 1, 2])
def test_an_abort_leaves_no_load(tokens: int) -> None:
    scheduler = pair()
    scheduler.on_arrival(ASK, 0.0)
    running = CancelLeg("r.1p.1", P)
    for i in range(tokens):
        scheduler.on_output(running.leg_id, [i], None if i else Finish.LENGTH)
        running = CancelLeg("r.1p.1.d", D)
    assert scheduler.on_abort("r")[0] == running
    assert_idle(scheduler)
    assert scheduler.on_abort("r") == []


def test_what_a_former_leg_says_is_ignored() -> None:
    scheduler = pair()
    scheduler.on_arrival(ASK, 0.0)
    scheduler.on_output("r.1p.1", [7], Finish.LENGTH)
    # The prefill leg is over, whatever it may still say.
    assert scheduler.on_output("r.1p.1", [8], Finish.STOP) == []
    assert scheduler.on_adopted("r.1p.1", True) is None
    scheduler.on_worker_lost(D, 1.0)
    assert scheduler.on_output("r.1p.1.d", [8], None) == []
    scheduler.on_abort("r")
    assert scheduler.on_output("r.2p.2", [8], Finish.ABORT) == []
    assert scheduler.life_of_leg("r.2p.2") is None
    assert_idle(scheduler)


def test_losing_the_decode_worker_while_prefilling_starts_over() -> None:
    scheduler = pair()
    scheduler.on_arrival(ASK, 0.0)
    add(scheduler, D2, Pool.DECODE)
    assert scheduler.on_worker_lost(D, 1.0) == [
        CancelLeg("r.1p.1", P),
        StartPrefill("r", "r.2p.2", P, D2, "r.2p.2"),
    ]
    assert load(scheduler, P) == (100, 1, 0, 0)
    assert load(scheduler, D2) == (0, 0, 100, 1)


def test_losing_the_prefill_worker_while_prefilling_drops_the_transfer() -> None:
    scheduler = pair()
    scheduler.on_arrival(ASK, 0.0)
    assert scheduler.on_worker_lost(P, 1.0) == [
        DropTransfer(D, "r.1p.1"),
        StartLocal("r", "r.2p.2", D),
    ]


def test_losing_the_prefill_worker_while_handing_over_stops_the_wait_for_its_kv() -> None:
    scheduler = pair()
    scheduler.on_arrival(ASK, 0.0)
    scheduler.on_output("r.1p.1", [7], Finish.LENGTH)
    assert scheduler.on_worker_lost(P, 1.0) == [StopAwaiting(D, "r.1p.1")]
    assert scheduler.on_output("r.1p.1.d", [8], Finish.STOP) == [Deliver("r", Finish.STOP)]
    assert_idle(scheduler)


NOT_AWAITED = StopAwaiting(D, "r.1p.1", "its sender could not deliver it: nobody answers")


@pytest.mark.parametrize("told", ["while it computes", "later"])
def test_kv_that_its_sender_cannot_deliver_is_not_awaited(told: str) -> None:
    scheduler = pair()
    scheduler.on_arrival(ASK, 0.0)
    begins = [Deliver("r", None), StartDecode("r", "r.1p.1.d", D, P, "r.1p.1", (7,))]
    if told == "later":
        assert scheduler.on_output("r.1p.1", [7], Finish.LENGTH) == begins
        assert scheduler.on_undelivered("r.1p.1", "nobody answers") == [NOT_AWAITED]
    else:
        assert scheduler.on_undelivered("r.1p.1", "nobody answers") == []
        # Behind the leg that would wait for it.
        assert scheduler.on_output("r.1p.1", [7], Finish.LENGTH) == [*begins, NOT_AWAITED]
    scheduler.on_adopted("r.1p.1.d", False)
    assert scheduler.on_output("r.1p.1.d", [8], None) == [Deliver("r", None)]
    # Another part of it.
    assert scheduler.on_undelivered("r.1p.1", "the transfer is over") == []
    assert scheduler.on_output("r.1p.1.d", [9], Finish.STOP) == [Deliver("r", Finish.STOP)]
    assert_idle(scheduler)


def test_a_transfer_that_is_no_requests_any_more_may_be_undelivered() -> None:
    scheduler = pair()
    assert scheduler.on_undelivered("s.1p.1", "another router's") == []
    scheduler.on_arrival(ASK, 0.0)
    scheduler.on_undelivered("r.1p.1", "nobody answers")
    add(scheduler, D2, Pool.DECODE)
    scheduler.on_worker_lost(D, 1.0)
    assert scheduler.on_undelivered("r.1p.1", "the prefill was aborted") == []
    assert scheduler.on_output("r.2p.2", [7], Finish.LENGTH) == [
        Deliver("r", None),
        StartDecode("r", "r.2p.2.d", D2, P, "r.2p.2", (7,)),
    ]
    assert scheduler.on_undelivered("r.1p.1", "the prefill was aborted") == []
    scheduler.on_abort("r")
    assert scheduler.on_undelivered("r.2p.2", "the prefill was aborted") == []
    assert_idle(scheduler)


def test_losing_the_prefill_worker_after_the_hand_over_changes_nothing() -> None:
    scheduler = pair()
    scheduler.on_arrival(ASK, 0.0)
    scheduler.on_output("r.1p.1", [7], Finish.LENGTH)
    scheduler.on_output("r.1p.1.d", [8], None)
    assert scheduler.on_worker_lost(P, 1.0) == []


def test_a_request_fails_when_it_lost_its_worker_too_often() -> None:
    scheduler = empty()
    for attempt in range(1, LOSSES_MAX + 1):
        key = WorkerKey("w", f"i{attempt}")
        add(scheduler, key, Pool.DECODE)
        if attempt == 1:
            scheduler.on_arrival(ASK, 0.0)
        actions = scheduler.on_worker_lost(key, 1.0)
        assert actions == [] or attempt == LOSSES_MAX
    assert actions == [FailRequest("r", f"it lost its worker {LOSSES_MAX} times")]
    assert_idle(scheduler)


def test_draining_workers_take_none_of_the_losses_a_request_may_have() -> None:
    scheduler = empty()
    drains = 2 * LOSSES_MAX
    for i in range(drains + 1):
        add(scheduler, WorkerKey("w", f"i{i}"), Pool.DECODE)
    scheduler.on_arrival(ASK, 0.0)
    for i in range(drains):
        key = WorkerKey("w", f"i{i}")
        scheduler.view.workers[key].draining = True
        actions = scheduler.on_drain_deadline(key, 1.0)
        assert not any(isinstance(a, FailRequest) for a in actions)
        scheduler.on_worker_lost(key, 2.0)
    assert scheduler.lives["r"].losses == 0
    scheduler.on_abort("r")
    assert_idle(scheduler)


def test_a_worker_that_comes_back_starts_with_no_load() -> None:
    scheduler = pair()
    scheduler.on_arrival(ASK, 0.0)
    scheduler.on_worker_lost(D, 1.0)
    add(scheduler, D, Pool.DECODE)
    assert load(scheduler, D) == IDLE
    scheduler.on_abort("r")
    assert_idle(scheduler)


def test_the_queue_is_first_come_first_served() -> None:
    scheduler = empty()
    for name in ("a", "b"):
        assert scheduler.on_arrival(replace(ASK, request_id=name), 0.0) == []
    assert scheduler.queued == 2
    started = [action.request_id for action in add(scheduler, D, Pool.DECODE)]  # type: ignore[attr-defined]
    assert started == ["a", "b"]
    assert scheduler.queued == 0


def test_a_worker_that_stops_draining_takes_what_waits() -> None:
    scheduler = empty()
    add(scheduler, D, Pool.DECODE)
    scheduler.view.workers[D].draining = True
    assert scheduler.on_arrival(ASK, 0.0) == []
    assert scheduler.on_tick(1.0) == []
    scheduler.view.workers[D].draining = False
    assert scheduler.on_tick(2.0) == [StartLocal("r", "r.1p.1", D)]


def test_waiting_has_an_end() -> None:
    scheduler = empty()
    scheduler.on_arrival(ASK, 0.0)
    scheduler.on_arrival(replace(ASK, request_id="later"), 10.0)
    assert scheduler.on_tick(30.0) == []
    assert scheduler.on_tick(30.1) == [
        FailRequest("r", "no worker could take it for 30 s", Failure.NO_WORKER)
    ]
    assert scheduler.queued == 1


def test_who_leaves_the_queue_takes_no_room_in_it() -> None:
    scheduler = empty()
    scheduler.queued_max = 1
    scheduler.on_arrival(ASK, 0.0)
    full = scheduler.on_arrival(replace(ASK, request_id="second"), 0.0)
    assert full == [FailRequest("second", "1 requests are waiting already", Failure.QUEUE_FULL)]
    assert scheduler.on_abort("r") == []
    assert scheduler.queued == 0
    assert scheduler.on_arrival(replace(ASK, request_id="third"), 0.0) == []
    assert scheduler.lives["third"].phase is Phase.QUEUED


def test_a_prompt_that_fits_nowhere_waits_for_a_worker_that_takes_it() -> None:
    scheduler = empty()
    add(scheduler, D, Pool.DECODE, model_len=50)
    assert scheduler.on_arrival(ASK, 0.0) == []
    assert add(scheduler, P, Pool.PREFILL) == [StartLocal("r", "r.1p.1", P)]


@pytest.mark.parametrize(("prefill_len", "decode_len"), [(101, 1000), (1000, 101)])
def test_the_decode_workers_length_decides_whether_to_go_on(
    prefill_len: int, decode_len: int
) -> None:
    scheduler = empty()
    add(scheduler, P, Pool.PREFILL, prefill_len)
    add(scheduler, D, Pool.DECODE, decode_len)
    scheduler.on_arrival(ASK, 0.0)
    goes_on = scheduler.on_output("r.1p.1", [7], Finish.LENGTH)[0] == Deliver("r", None)
    assert goes_on is (decode_len > 101)


def test_reported_load_is_kept_and_a_strangers_ignored() -> None:
    scheduler = pair()
    scheduler.on_load(D, running=3, waiting=2, kv_usage=0.5)
    worker = scheduler.view.workers[D]
    assert (worker.reported_running, worker.reported_waiting, worker.kv_load) == (3, 2, 0.5)
    scheduler.on_load(D2, running=3, waiting=2, kv_usage=0.5)
    assert D2 not in scheduler.view.workers


def test_a_local_prompt_is_in_memory_once() -> None:
    scheduler = empty()
    add(scheduler, D, Pool.DECODE)
    worker = scheduler.view.workers[D]
    scheduler.on_arrival(ASK, 0.0)
    assert worker.kv_load == 100 / 10_000
    scheduler.on_output("r.1p.1", [7], None)
    assert worker.kv_load == 101 / 10_000
    scheduler.on_abort("r")
    assert worker.kv_load == 0 and worker.pending_local_tokens == 0


def mixing(threshold_tokens: int = 150) -> Scheduler:
    """A prefill worker that has a prompt already, and two decode workers."""
    scheduler = pair()
    add(scheduler, D2, Pool.DECODE)
    scheduler.policy = Splitwise(queue_threshold_tokens=threshold_tokens)
    scheduler.on_arrival(replace(ASK, request_id="first"), 0.0)
    return scheduler


def test_a_drawn_worker_returns_when_its_prompts_are_done() -> None:
    scheduler = mixing()
    d, d2 = scheduler.view.workers[D], scheduler.view.workers[D2]
    (start,) = scheduler.on_arrival(ASK, 0.0)
    assert start == StartPrefill("r", "r.1p.2", D2, D, "r.1p.2")
    assert d2.mixed and not d.mixed and d2.pool is Pool.DECODE
    scheduler.on_output("r.1p.2", [7], Finish.LENGTH)
    assert not d2.mixed
    scheduler.on_abort("r")
    scheduler.on_abort("first")
    assert_idle(scheduler)


@pytest.mark.parametrize("how", ["abort", "lost"])
def test_a_drawn_worker_returns_when_its_request_is_gone(how: str) -> None:
    scheduler = mixing()
    scheduler.on_arrival(ASK, 0.0)
    assert scheduler.view.workers[D2].mixed
    if how == "abort":
        scheduler.on_abort("r")
    else:
        # The decode worker is lost, and the drawn one is the last of its pool.
        scheduler.on_worker_lost(D, 1.0)
        assert scheduler.lives["r"].placement is not None
        assert not scheduler.lives["r"].placement.lends_prefill
    assert not scheduler.view.workers[D2].mixed


def test_a_prefill_worker_is_mixed_until_the_requests_it_decodes_are_done() -> None:
    scheduler = pair()
    p2 = WorkerKey("p2", "i1")
    add(scheduler, p2, Pool.PREFILL)
    scheduler.on_load(D, 9, 9, 0.95)
    scheduler.on_arrival(ASK, 0.0)
    assert scheduler.view.workers[p2].mixed
    scheduler.on_output("r.1p.1", [7], Finish.LENGTH)
    assert scheduler.view.workers[p2].mixed
    scheduler.on_output("r.1p.1.d", [8], Finish.STOP)
    assert not scheduler.view.workers[p2].mixed
    assert_idle(scheduler)


class ToOne:
    """Everything to one worker."""

    def __init__(self, key: WorkerKey) -> None:
        self.key = key

    def place(self, ask: Ask, view: ClusterView) -> Placement | None:
        return Placement(self.key, self.key, "the only way") if self.key in view.workers else None


def test_a_request_may_bring_its_own_policy() -> None:
    scheduler = pair()
    assert scheduler.on_arrival(ASK, 0.0, ToOne(D)) == [StartLocal("r", "r.1p.1", D)]
    # It keeps it: when its worker is lost, and while it waits.
    assert scheduler.on_worker_lost(D, 1.0) == []
    assert scheduler.queued == 1
    assert add(scheduler, D2, Pool.DECODE) == []
    assert add(scheduler, D, Pool.DECODE) == [StartLocal("r", "r.2p.2", D)]
    other = replace(ASK, request_id="other")
    assert scheduler.on_arrival(other, 2.0)[0].worker == P  # type: ignore[union-attr]


# --- what is learned of the workers ---------------------------------------------------------------


def predicted(scheduler: Scheduler, key: WorkerKey) -> tuple[float, float, float]:
    """Of a prompt of 100 tokens, a step of one request, and a hand-off of 100 kB."""
    rates = scheduler.view.workers[key].rates
    return (
        rates.prefill.predict_s(100),
        rates.step.predict_s(1),
        rates.exposed.predict_s(100_000),
    )


def test_workers_show_how_fast_they_are() -> None:
    scheduler = pair()
    scheduler.view.workers[D].kv_bytes_per_token = 1000
    for i in range(100):
        at_s, first, then = 100.0 * i, f"r.1p.{i + 1}", f"r.1p.{i + 1}.d"
        scheduler.on_arrival(ASK, at_s)
        scheduler.on_step(P, at_s + 3, {first: None})
        scheduler.on_output(first, [7], Finish.LENGTH)
        scheduler.on_adopted(then, True, exposed_s=0.5)
        for step in range(3):
            scheduler.on_step(D, at_s + 10 + 2 * step, {then: None})
            scheduler.on_output(then, [8], Finish.STOP if step == 2 else None)
    assert predicted(scheduler, P)[0] == pytest.approx(3, rel=0.1)
    assert predicted(scheduler, D)[1:] == pytest.approx((2, 0.5), rel=0.1)
    # One that is new is taken to be like them.
    add(scheduler, D2, Pool.DECODE)
    assert predicted(scheduler, D2) == pytest.approx((3, 2, 0.5), rel=0.1)
    for second in range(1000):
        scheduler.on_tick(20_000.0 + second)
    assert predicted(scheduler, D)[2] < 0.05


def test_a_hand_off_that_fails_at_once_does_not_look_cheap() -> None:
    scheduler = pair()
    scheduler.view.workers[D].kv_bytes_per_token = 1000
    for i in range(100):
        first, then = f"r.1p.{i + 1}", f"r.1p.{i + 1}.d"
        scheduler.on_arrival(ASK, 100.0 * i)
        scheduler.on_output(first, [7], Finish.LENGTH)
        scheduler.on_adopted(then, False, exposed_s=0.001)
        scheduler.on_output(then, [8], Finish.STOP)
    prefill_s, _, exposed_s = predicted(scheduler, D)
    assert exposed_s == pytest.approx(prefill_s + 0.001, rel=0.1)


def test_a_cached_prompt_shows_only_what_was_computed_of_it() -> None:
    scheduler = pair()
    for i in range(100):
        scheduler.on_arrival(ASK, 100.0 * i)
        scheduler.on_step(P, 100.0 * i + 3, {f"r.1p.{i + 1}": 10})
        scheduler.on_abort("r")
    assert scheduler.view.workers[P].rates.prefill.predict_s(10) == pytest.approx(3, rel=0.1)
