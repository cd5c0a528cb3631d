"""Where a request goes: the shortest queues, and the cases in which nothing is handed over."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.scheduler.handover import HandOverRule
from cluster.scheduler.policies.splitwise import Splitwise
from cluster.scheduler.policy import Ask, Placement
from cluster.scheduler.view import ClusterView, Pool, WorkerKey, WorkerView

ASK = Ask("r1", prompt_tokens=100, max_tokens=50)
POLICY = Splitwise()


def worker(name: str, pool: Pool, **values: Any) -> WorkerView:
    fixed = {"model": "m", "max_model_len_tokens": 1000, "kv_tokens": 10_000}
    return WorkerView(WorkerKey(name, "i1"), pool, **{**fixed, **values})


def prefill(name: str, **values: Any) -> WorkerView:
    return worker(name, Pool.PREFILL, **values)


def decode(name: str, **values: Any) -> WorkerView:
    return worker(name, Pool.DECODE, **values)


def placed(*workers: WorkerView, ask: Ask = ASK, policy: Splitwise = POLICY) -> Placement:
    placement = policy.place(ask, ClusterView({w.key: w for w in workers}))
    assert placement is not None
    return placement


def names(placement: Placement) -> tuple[str, str]:
    return placement.prefill.worker_id, placement.decode.worker_id


def test_prefills_where_the_fewest_prompt_tokens_wait() -> None:
    busy = prefill("p1", pending_prompt_tokens=500, prefills=1)
    many = prefill("p2", pending_prompt_tokens=400, prefills=9)
    placement = placed(busy, many, decode("d1"))
    assert names(placement) == ("p2", "d1")
    assert placement.reason == "shortest queues"


def test_equal_prompt_tokens_go_by_prefills_then_by_memory() -> None:
    assert names(placed(prefill("p1", prefills=2), prefill("p2", prefills=1), decode("d1"))) == (
        "p2",
        "d1",
    )
    full = prefill("p1", reported_kv_usage=0.5)
    assert names(placed(full, prefill("p2"), decode("d1"))) == ("p2", "d1")


def test_decodes_where_the_most_memory_is_free() -> None:
    full = decode("d1", reported_kv_usage=0.9)
    many = decode("d2", decode_tokens=5_000, decodes=50)
    assert names(placed(prefill("p1"), full, many)) == ("p1", "d2")


def test_decodes_where_the_inbox_has_more_room() -> None:
    full = decode("d1", inbox_bytes_max=1000, reported_inbox_bytes=700)
    other = decode("d2", inbox_bytes_max=1000, reported_inbox_bytes=500, reported_kv_usage=0.6)
    assert names(placed(prefill("p1"), full, other))[1] == "d2"
    full.reported_inbox_bytes = 500
    assert names(placed(prefill("p1"), full, other))[1] == "d1"


def test_promised_memory_counts_as_used_memory_does() -> None:
    promised = decode("d1", decode_tokens=3_000, pending_prompt_tokens=3_000)
    assert promised.kv_load == pytest.approx(0.6)
    assert names(placed(prefill("p1"), promised, decode("d2", reported_kv_usage=0.55))) == (
        "p1",
        "d2",
    )


def test_within_a_tenth_of_memory_the_fewer_running_tokens_decide() -> None:
    more = decode("d1", reported_kv_usage=0.21, decode_tokens=900)
    fewer = decode("d2", reported_kv_usage=0.29, decode_tokens=800)
    assert names(placed(prefill("p1"), more, fewer)) == ("p1", "d2")


def test_ties_are_broken_by_key_whatever_the_order() -> None:
    workers = [prefill("p1"), prefill("p2"), decode("d1"), decode("d2")]
    assert names(placed(*workers)) == names(placed(*reversed(workers))) == ("p1", "d1")


def test_an_older_incarnation_is_another_worker() -> None:
    old = replace(prefill("p1"), key=WorkerKey("p1", "i0"), pending_prompt_tokens=10)
    assert placed(old, prefill("p1"), decode("d1")).prefill == WorkerKey("p1", "i1")


@pytest.mark.parametrize("pool", Pool)
def test_an_empty_pool_borrows_from_the_other(pool: Pool) -> None:
    busy, idle = worker("w1", pool, pending_prompt_tokens=9), worker("w2", pool)
    # By prompt tokens it is w2; for decode they are alike, and the key decides.
    assert names(placed(busy, idle)) == ("w2", "w1")


@pytest.mark.parametrize("pool", Pool)
def test_one_worker_does_it_all(pool: Pool) -> None:
    placement = placed(worker("w1", pool))
    assert names(placement) == ("w1", "w1")
    assert placement.reason == "one worker only"
    assert not placement.hands_over


def test_kv_never_goes_to_another_model() -> None:
    placement = placed(prefill("p1"), decode("d1", model="n"))
    assert names(placement) == ("p1", "p1")
    assert placement.reason == "no decode worker of its kind"
    full = decode("d2", reported_kv_usage=0.95)
    assert names(placed(prefill("p1"), decode("d1", model="n"), full)) == ("p1", "d2")


def test_a_draining_worker_gets_nothing() -> None:
    idle = prefill("p1", draining=True), decode("d1", draining=True)
    busy = prefill("p2", pending_prompt_tokens=900), decode("d2", reported_kv_usage=0.9)
    assert names(placed(*idle, *busy)) == ("p2", "d2")
    # A pool of which all drain is empty.
    assert names(placed(*idle, decode("d2"))) == ("d2", "d2")
    assert POLICY.place(ASK, ClusterView({w.key: w for w in idle})) is None


def test_a_prompt_too_long_for_a_worker_goes_to_another() -> None:
    short = prefill("p1", max_model_len_tokens=100), decode("d1", max_model_len_tokens=100)
    assert names(placed(*short, prefill("p2"), decode("d2"))) == ("p2", "d2")
    assert POLICY.place(ASK, ClusterView({w.key: w for w in short})) is None
    assert names(placed(*short, ask=replace(ASK, prompt_tokens=99))) == ("p1", "d1")


def test_resumed_tokens_need_room_as_the_prompt_does() -> None:
    ask = replace(ASK, resumed_tokens=60)
    short = prefill("p1", max_model_len_tokens=160), decode("d1", max_model_len_tokens=160)
    assert names(placed(*short, prefill("p2"), decode("d2"), ask=ask)) == ("p2", "d2")
    assert names(placed(*short, ask=replace(ask, resumed_tokens=59))) == ("p1", "d1")


def test_no_workers_no_place() -> None:
    assert POLICY.place(ASK, ClusterView()) is None


@pytest.mark.parametrize(
    ("ask", "reason"),
    [
        (replace(ASK, max_tokens=1), "one token only"),
        (replace(ASK, can_hand_over=False), "nothing to hand over"),
    ],
)
def test_what_has_no_decode_phase_stays_where_it_prefills(ask: Ask, reason: str) -> None:
    placement = placed(prefill("p1"), decode("d1"), ask=ask)
    assert names(placement) == ("p1", "p1")
    assert placement.reason == reason
    assert not placement.hands_over


def test_a_short_prompt_goes_straight_to_decode() -> None:
    policy = Splitwise(HandOverRule(100))
    placement = placed(prefill("p1"), decode("d1"), policy=policy)
    assert names(placement) == ("d1", "d1")
    assert placement.reason == "short prompt"
    for long in (replace(ASK, prompt_tokens=101), replace(ASK, resumed_tokens=1)):
        assert names(placed(prefill("p1"), decode("d1"), ask=long, policy=policy)) == ("p1", "d1")


def test_placing_changes_nothing() -> None:
    view = ClusterView({w.key: w for w in (prefill("p1"), decode("d1"))})
    before = [replace(w) for w in view.workers.values()]
    POLICY.place(ASK, view)
    assert list(view.workers.values()) == before


# --- the mixed pool -------------------------------------------------------------------------------


@pytest.fixture
def crowded() -> list[WorkerView]:
    """The prefill pool's queues are at the threshold."""
    return [
        prefill("p1", pending_prompt_tokens=450, prefills=1),
        prefill("p2", pending_prompt_tokens=480, prefills=1),
    ]


SMALL = Splitwise(queue_threshold_tokens=500)


def test_a_long_prefill_queue_draws_a_decode_worker(crowded: list[WorkerView]) -> None:
    busy = decode("d1", reported_kv_usage=0.5)
    placement = placed(*crowded, busy, decode("d2"), policy=SMALL)
    assert names(placement) == ("d2", "d1")
    assert placement.reason == "drawn from the decode pool"
    assert (placement.lends_prefill, placement.lends_decode) == (True, False)


def test_the_mixed_pool_comes_before_drawing_another(crowded: list[WorkerView]) -> None:
    mixed = decode("d1", lent=1, pending_prompt_tokens=300, prefills=1)
    pure = decode("d2"), decode("d3")
    placement = placed(*crowded, mixed, *pure, policy=SMALL)
    assert names(placement) == ("d1", "d2")
    assert placement.reason == "mixed pool" and placement.lends_prefill
    # Its own queue is long as well: the next one.
    mixed.pending_prompt_tokens = 401
    assert names(placed(*crowded, mixed, *pure, policy=SMALL)) == ("d2", "d3")


def test_an_empty_queue_is_never_long() -> None:
    policy = Splitwise(queue_threshold_tokens=50)
    assert names(placed(prefill("p1"), decode("d1"), decode("d2"), policy=policy)) == ("p1", "d1")


def test_up_to_the_threshold_a_queue_is_not_long(crowded: list[WorkerView]) -> None:
    crowded[0].pending_prompt_tokens = 400
    pair = names(placed(*crowded, decode("d1"), decode("d2"), policy=SMALL))
    assert pair == ("p1", "d1")


def test_the_last_of_a_pool_is_not_drawn(crowded: list[WorkerView]) -> None:
    foreign, draining = decode("d2", model="n"), decode("d3", draining=True)
    mixed = decode("d4", lent=1, pending_prompt_tokens=600, prefills=1)
    placement = placed(*crowded, decode("d1"), foreign, draining, mixed, policy=SMALL)
    assert names(placement) == ("p1", "d1")
    assert placement.reason == "all queues are long" and not placement.lends_prefill
    # The shortest of all that do this kind of work, and that may be a mixed one.
    mixed.pending_prompt_tokens = 449
    placement = placed(*crowded, decode("d1"), foreign, mixed, policy=SMALL)
    assert names(placement) == ("d4", "d1") and placement.lends_prefill


def test_a_full_decode_worker_is_not_drawn(crowded: list[WorkerView]) -> None:
    full = decode("d1", reported_kv_usage=0.95), decode("d2", reported_kv_usage=0.95)
    placement = placed(*crowded, *full, policy=SMALL)
    assert placement.prefill.worker_id == "p1"


def test_full_decode_memory_draws_a_prefill_worker() -> None:
    full = decode("d1", reported_kv_usage=0.9)
    placement = placed(prefill("p1"), prefill("p2"), full)
    assert names(placement) == ("p1", "p2")
    assert placement.reason == "drawn from the prefill pool"
    assert (placement.lends_prefill, placement.lends_decode) == (False, True)
    # The last one is not.
    placement = placed(prefill("p1"), full)
    assert names(placement) == ("p1", "d1") and not placement.lends_decode


def test_decode_memory_is_full_when_the_prompt_would_make_it_so() -> None:
    workers = prefill("p1"), prefill("p2"), decode("d1", decode_tokens=8_900)
    assert names(placed(*workers)) == ("p1", "d1")
    assert names(placed(*workers, ask=replace(ASK, prompt_tokens=101))) == ("p1", "p2")


def test_a_mixed_worker_still_does_its_own_work_if_the_others_cannot() -> None:
    mixed = prefill("p1", lent=1, decodes=1, decode_tokens=100)
    placement = placed(mixed, prefill("p2", pending_prompt_tokens=500), decode("d1"), policy=SMALL)
    assert names(placement) == ("p1", "d1")
    assert placement.reason == "mixed pool" and not placement.lends_prefill


def test_one_mixed_worker_may_do_all_of_a_request() -> None:
    full = decode("d1", reported_kv_usage=0.95)
    busy = prefill("p1", pending_prompt_tokens=500)
    placement = placed(busy, full, decode("d2", lent=1), policy=SMALL)
    assert names(placement) == ("d2", "d2")
    assert (placement.lends_prefill, placement.lends_decode) == (True, False)


def test_a_local_prompt_is_in_memory_once() -> None:
    local = decode("d1", decode_tokens=3_000, pending_prompt_tokens=3_000)
    assert local.kv_load == pytest.approx(0.6)
    local.pending_local_tokens = 3_000
    assert local.kv_load == pytest.approx(0.3)


def test_a_foreign_decode_pool_is_as_good_as_none() -> None:
    foreign = decode("d1", model="n")
    placement = placed(prefill("p1"), prefill("p2"), foreign)
    assert names(placement) == ("p1", "p2") and placement.lends_decode
    # A mixed one first.
    mixed = prefill("p2", lent=1)
    assert names(placed(prefill("p1"), mixed, prefill("p3"), foreign)) == ("p1", "p2")


def test_a_full_prefill_worker_is_not_drawn() -> None:
    full = [prefill("p1", reported_kv_usage=0.95), prefill("p2", reported_kv_usage=0.95)]
    placement = placed(*full, decode("d1", reported_kv_usage=0.99))
    assert names(placement) == ("p1", "d1")
    assert placement.reason == "all queues are long" and not placement.lends_decode


def test_a_worker_drawn_for_the_prompt_may_decode_it_too(crowded: list[WorkerView]) -> None:
    full = decode("d1", reported_kv_usage=0.95)
    placement = placed(*crowded, full, decode("d2"), policy=SMALL)
    assert names(placement) == ("d2", "d2")
    assert placement.reason == "drawn from the decode pool"


def test_a_mixed_worker_of_another_model_gets_no_kv() -> None:
    foreign = decode("d1", model="n", lent=1)
    assert names(placed(prefill("p1"), prefill("p2"), foreign)) == ("p1", "p2")


def test_local_work_on_a_drawn_worker_makes_it_mixed(crowded: list[WorkerView]) -> None:
    single = placed(
        *crowded, decode("d1"), decode("d2"), ask=replace(ASK, max_tokens=1), policy=SMALL
    )
    assert names(single) == ("d1", "d1") and single.lends_prefill
    short = placed(
        *(prefill("p1"), prefill("p2"), decode("d1", reported_kv_usage=0.95)),
        policy=Splitwise(HandOverRule(100)),
    )
    assert names(short) == ("p1", "p1") and short.lends_decode


@given(st.integers(0, 5000), st.integers(0, 5000), st.integers(0, 2000), st.floats(0, 1))
def test_memory_tenths_are_those_of_the_load(
    decode_tokens: int, pending: int, kv_tokens: int, reported: float
) -> None:
    view = decode("d1", decode_tokens=decode_tokens, reported_kv_usage=reported)
    view.pending_prompt_tokens, view.kv_tokens = pending, kv_tokens
    assert view.memory_tenths - 1e-6 <= view.kv_load * 10 <= view.memory_tenths + 1 + 1e-6
