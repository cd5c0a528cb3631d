"""LoRA adapters: which worker holds which, and that requests for one are kept together."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

from cluster.scheduler.adapters import Adapters
from cluster.scheduler.life import Finish
from cluster.scheduler.policies import BUILT_IN, PolicyOptions, make_policy
from cluster.scheduler.policies.splitwise import Splitwise
from cluster.scheduler.policy import Ask
from cluster.scheduler.scheduler import Scheduler
from cluster.scheduler.together import LOAD_TOKENS
from cluster.scheduler.view import Pool, WorkerKey, WorkerView

ASK = Ask("r", prompt_tokens=1000, max_tokens=50, adapter="a")
NAMES = ("p0", "p1", "d0", "d1", "d2")


def cluster(policy: str = "splitwise", most: int = 2, at_once: int = 0) -> Scheduler:
    ids = itertools.count(1)
    scheduler = Scheduler(make_policy(policy, PolicyOptions()), new_id=lambda: str(next(ids)))
    for name in NAMES:
        pool = Pool.PREFILL if name.startswith("p") else Pool.DECODE
        view = WorkerView(WorkerKey(name, "i1"), pool, "m", 10_000, kv_tokens=20_000)
        view.adapters = Adapters(most, at_once)
        scheduler.on_worker_up(view)
    return scheduler


def worker(scheduler: Scheduler, name: str) -> WorkerView:
    return scheduler.view.workers[WorkerKey(name, "i1")]


def place(scheduler: Scheduler, name: str, **values: Any) -> tuple[str, str]:
    scheduler.on_arrival(replace(ASK, request_id=name, **values), 0.0)
    placement = scheduler.lives[name].placement
    assert placement is not None
    return placement.prefill.worker_id, placement.decode.worker_id


def prefilled(scheduler: Scheduler, name: str) -> None:
    scheduler.on_output(scheduler.lives[name].last_leg_id, [1], Finish.LENGTH)


def test_a_worker_drops_the_adapter_used_longest_ago() -> None:
    adapters = Adapters(2)
    for name in ("a", "b", "c"):
        adapters.use(name)
    # All are in use: the worker drops none.
    assert all(map(adapters.holds, "abc"))
    adapters.release("b")
    adapters.release("a")
    adapters.use("c")
    assert not adapters.holds("a") and adapters.holds("b")
    adapters.drop("b")
    adapters.release("b")
    assert not adapters.holds("b") and adapters.holds("c")


def test_a_worker_runs_only_so_many_at_once() -> None:
    adapters = Adapters(4, 1)
    assert adapters.has_place("a")
    adapters.use("a")
    assert adapters.has_place("a") and not adapters.has_place("b")
    adapters.release("a")
    assert adapters.has_place("b") and adapters.holds("a")


def test_requests_for_an_adapter_decode_together() -> None:
    for policy in BUILT_IN:
        scheduler = cluster(policy)
        places = set()
        for i in range(6):
            places.add(place(scheduler, f"r{i}"))
            prefilled(scheduler, f"r{i}")
        assert len({decode for _, decode in places}) == 1, policy
        assert len({prefill for prefill, _ in places}) == 1, policy


def test_of_those_that_hold_it_the_fullest_with_room_is_taken() -> None:
    scheduler = cluster()
    for name, decodes in (("d0", 2), ("d1", 5), ("d2", 9)):
        worker(scheduler, name).adapters.use("a")
        worker(scheduler, name).decodes = decodes
    worker(scheduler, "d2").reported_kv_usage = 0.95
    assert place(scheduler, "r0")[1] == "d1"
    # Others go where there is least to do.
    assert place(scheduler, "r1", adapter="")[1] == "d0"


def test_with_no_room_on_any_that_hold_it_it_is_loaded_once_more() -> None:
    scheduler = cluster()
    worker(scheduler, "d2").adapters.use("a")
    worker(scheduler, "d2").reported_kv_usage = 0.95
    assert place(scheduler, "r0")[1] == "d0"
    assert worker(scheduler, "d0").adapters.holds("a")


def test_a_batch_with_no_place_for_another_adapter_is_left() -> None:
    scheduler = cluster(at_once=1)
    worker(scheduler, "d0").adapters.use("b")
    assert place(scheduler, "r0")[1] == "d1"
    # With none free, it waits in a worker rather than here.
    for name in NAMES:
        worker(scheduler, name).adapters.use("b")
    assert place(scheduler, "r1", adapter="c")[1] in NAMES


def test_a_prompt_does_not_wait_longer_than_loading_takes() -> None:
    scheduler = cluster()
    worker(scheduler, "p1").adapters.use("a")
    worker(scheduler, "p1").pending_prompt_tokens = LOAD_TOKENS
    assert place(scheduler, "r0")[0] == "p1"
    scheduler.on_abort("r0")
    worker(scheduler, "p1").pending_prompt_tokens = LOAD_TOKENS + 1
    assert place(scheduler, "r1")[0] == "p0"


def test_what_requests_use_is_given_back() -> None:
    scheduler = cluster(at_once=1)
    prefill, decode = place(scheduler, "r0")
    assert not worker(scheduler, prefill).adapters.has_place("b")
    prefilled(scheduler, "r0")
    assert worker(scheduler, prefill).adapters.has_place("b")
    assert not worker(scheduler, decode).adapters.has_place("b")
    scheduler.on_output(scheduler.lives["r0"].last_leg_id, [1], Finish.STOP)
    assert worker(scheduler, decode).adapters.has_place("b")
    assert worker(scheduler, decode).adapters.holds("a")


def test_adapters_loaded_and_removed_by_hand() -> None:
    scheduler = cluster()
    scheduler.on_adapter_loaded(WorkerKey("d2", "i1"), "a")
    assert place(scheduler, "r0")[1] == "d2"
    scheduler.on_adapter_removed("a")
    assert not any(worker(scheduler, name).adapters.holds("a") for name in NAMES)


def test_an_adapter_held_elsewhere_does_not_stop_placing() -> None:
    """Pools with a single worker, and none of a pool."""
    for names in (("p0",), ("d0",), ("p0", "d0")):
        ids = itertools.count(1)
        scheduler = Scheduler(Splitwise(), new_id=lambda ids=ids: str(next(ids)))  # type: ignore[misc]
        for name in names:
            pool = Pool.PREFILL if name.startswith("p") else Pool.DECODE
            scheduler.on_worker_up(
                WorkerView(WorkerKey(name, "i1"), pool, "m", 10_000, kv_tokens=20_000)
            )
        for i in range(3):
            assert set(place(scheduler, f"r{i}")) <= set(names)
