"""Promises, bounds on workers, and the queue before them."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.scheduler.life import FailRequest, Failure, Finish, Phase, StartLocal, StartPrefill
from cluster.scheduler.policies import BUILT_IN, PolicyOptions, make_policy
from cluster.scheduler.policies.baselines import RoundRobin
from cluster.scheduler.policies.splitwise import Splitwise
from cluster.scheduler.policy import Ask, PlacementPolicy
from cluster.scheduler.scheduler import RESUMED_PRIORITY, Scheduler
from cluster.scheduler.slo import SloClass
from cluster.scheduler.view import PlacedLoad, Pool, WorkerKey, WorkerView

P, P2, D, D2 = (WorkerKey(name, "i1") for name in ("p", "p2", "d", "d2"))
ASK = Ask("r", prompt_tokens=1000, max_tokens=50)
FAST = SloClass("fast", ttft_s=0.5)
SMOOTH = SloClass("smooth", tpot_s=0.05)


def cluster(*keys: WorkerKey, policy: PlacementPolicy | None = None, **values: Any) -> Scheduler:
    ids = itertools.count(1)
    scheduler = Scheduler(policy or Splitwise(), new_id=lambda: str(next(ids)), **values)
    for key in keys:
        pool = Pool.PREFILL if key.worker_id.startswith("p") else Pool.DECODE
        scheduler.on_worker_up(WorkerView(key, pool, "m", 10_000, kv_tokens=1_000_000))
    return scheduler


def teach(scheduler: Scheduler, key: WorkerKey, prefill_s: float, step_s: float = 0.01) -> None:
    """Prompts of 1,000 tokens, and steps."""
    rates = scheduler.view.workers[key].rates
    for _ in range(100):
        for size in (1000, 2000, 4000):
            rates.prefill.learn(size, prefill_s * size / 1000)
        for batch in range(1, 9):
            rates.step.learn(batch, step_s * batch)


def failed(actions: list[Any]) -> FailRequest:
    (action,) = actions
    assert isinstance(action, FailRequest)
    return action


def place(scheduler: Scheduler, name: str, slo: SloClass, **values: Any) -> list[Any]:
    return list(scheduler.on_arrival(replace(ASK, request_id=name, slo=slo, **values), 0.0))


# --- promises -------------------------------------------------------------------------------------


def test_a_first_token_that_would_be_late_is_refused_at_once() -> None:
    scheduler = cluster(P, D)
    teach(scheduler, P, prefill_s=0.2)
    for i in range(2):
        assert isinstance(place(scheduler, f"r{i}", FAST)[0], StartPrefill)
    refused = failed(place(scheduler, "r2", FAST))
    assert refused.failure is Failure.SLO and 0.05 < refused.retry_after_s < 0.2
    assert "r2" not in scheduler.lives
    # Those that were promised nothing, or less, still come in.
    assert isinstance(place(scheduler, "r3", SloClass())[0], StartPrefill)
    assert isinstance(place(scheduler, "r4", SloClass("slow", ttft_s=5))[0], StartPrefill)


def test_tokens_that_would_come_too_slowly_are_refused() -> None:
    scheduler = cluster(P, D)
    teach(scheduler, D, prefill_s=0.2, step_s=0.015)
    for i in range(3):
        assert isinstance(place(scheduler, f"r{i}", SMOOTH)[0], StartPrefill)
    refused = failed(place(scheduler, "r3", SMOOTH))
    assert refused.failure is Failure.SLO and refused.retry_after_s > 0


def test_an_idle_worker_refuses_nothing() -> None:
    scheduler = cluster(P, D)
    teach(scheduler, P, prefill_s=100)
    teach(scheduler, D, prefill_s=100, step_s=100)
    assert isinstance(place(scheduler, "r0", replace(FAST, tpot_s=0.05))[0], StartPrefill)


def test_a_placement_that_keeps_the_promise_is_taken_instead() -> None:
    scheduler = cluster(P, P2, D, policy=RoundRobin())
    teach(scheduler, P, prefill_s=0.2)
    teach(scheduler, P2, prefill_s=0.2)
    for i in range(4):
        place(scheduler, f"r{i}", SloClass())
    scheduler.on_abort("r1")
    scheduler.on_abort("r3")
    # It would be the first worker's turn, where two wait.
    assert place(scheduler, "r4", FAST)[0].worker == P2
    placement = scheduler.lives["r4"].placement
    assert placement is not None and placement.reason == "meets its targets"


def test_what_was_taken_is_kept_whatever_happens() -> None:
    scheduler = cluster(P, D, D2)
    for key in (P, D, D2):
        teach(scheduler, key, prefill_s=0.4)
    place(scheduler, "r0", FAST)
    for i in range(5):
        place(scheduler, f"other{i}", SloClass())
    moved = scheduler.on_worker_lost(scheduler.lives["r0"].placement.decode, 1.0)  # type: ignore[union-attr]
    assert not any(isinstance(action, FailRequest) for action in moved)
    assert "r0" in scheduler.lives


def test_one_that_would_wait_too_long_in_the_queue_is_refused() -> None:
    scheduler = cluster(P, D, requests_max=1)
    for i in range(30):
        scheduler.on_arrival(replace(ASK, request_id=f"r{i}", max_tokens=1), 0.0)
    for i in range(20):
        leg = scheduler.lives[f"r{i}"].last_leg_id
        scheduler.on_step(P, i + 1.0, {leg: None})
        scheduler.on_output(leg, [1], Finish.STOP)
    refused = failed(scheduler.on_arrival(replace(ASK, request_id="fast", slo=FAST), 20.0))
    assert refused.failure is Failure.SLO and 5 < refused.retry_after_s < 10
    assert scheduler.on_arrival(replace(ASK, request_id="any"), 20.0) == []


def test_after_a_spell_of_long_answers_promises_are_made_again() -> None:
    """Virtual time: one place, and a request with a target whenever a short answer has begun."""
    scheduler = cluster(P, D, requests_max=1)
    names = itertools.count()

    def arrive(now_s: float, slo: SloClass) -> bool:
        ask = replace(ASK, request_id=f"r{next(names)}", max_tokens=1, slo=slo)
        actions = scheduler.on_arrival(ask, now_s)
        return not any(isinstance(action, FailRequest) for action in actions)

    def end(now_s: float) -> None:
        (running,) = [life for life in scheduler.lives.values() if life.leg is not None]
        scheduler.on_step(P, now_s, {running.last_leg_id: None})
        scheduler.on_output(running.last_leg_id, [1], Finish.STOP)

    for _ in range(21):
        arrive(0.0, SloClass())
    for i in range(21):
        end(20.0 * (i + 1))
    assert scheduler.queued == 0
    taken = []
    for i in range(150):
        now_s = 500.0 + i
        arrive(now_s, SloClass())
        taken.append([arrive(now_s, FAST), arrive(now_s, FAST)])
        while scheduler.lives:
            now_s += 0.1
            end(now_s)
    # At first none, for a while, and then all that the short answers leave time for.
    assert taken[0] == [False, False]
    assert taken[-1] == [True, True]


# --- bounds ---------------------------------------------------------------------------------------


def test_a_full_queue_refuses() -> None:
    scheduler = cluster(queued_max=2)
    for i in range(2):
        assert place(scheduler, f"r{i}", SloClass()) == []
    assert failed(place(scheduler, "r2", SloClass())).failure is Failure.QUEUE_FULL
    assert scheduler.queued == 2
    (late, *_) = scheduler.on_tick(31.0)
    assert isinstance(late, FailRequest) and late.failure is Failure.NO_WORKER


def test_full_workers_get_nothing_until_they_have_room() -> None:
    scheduler = cluster(P, D, requests_max=2)
    for i in range(4):
        scheduler.on_arrival(replace(ASK, request_id=f"r{i}"), 0.0)
    assert scheduler.queued == 2
    first = scheduler.lives["r0"].last_leg_id
    # Its prefill is done, but its place where it decodes is not free.
    scheduler.on_output(first, [1], Finish.LENGTH)
    assert scheduler.queued == 2
    started = scheduler.on_output(scheduler.lives["r0"].last_leg_id, [2], Finish.STOP)
    assert [a.request_id for a in started if isinstance(a, StartPrefill)] == ["r2"]
    started = scheduler.on_abort("r1")
    assert [a.request_id for a in started if isinstance(a, StartPrefill)] == ["r3"]
    assert scheduler.queued == 0


def test_a_crowded_pool_does_not_crowd_the_other() -> None:
    scheduler = cluster(P, P2, D, requests_max=2)
    for i in range(4):
        scheduler.on_arrival(replace(ASK, request_id=f"r{i}"), 0.0)
    assert scheduler.queued == 2
    assert scheduler.view.workers[P].decodes == scheduler.view.workers[P2].decodes == 0


def test_a_newcomer_does_not_overtake_those_that_wait() -> None:
    scheduler = cluster(P, D, requests_max=1)
    for i in range(3):
        scheduler.on_arrival(replace(ASK, request_id=f"r{i}"), 0.0)
    started = scheduler.on_abort("r0")
    assert [a.request_id for a in started if isinstance(a, StartPrefill)] == ["r1"]
    # What another router had there has ended: one newcomer sets off the one that waits.
    scheduler.on_others({P: PlacedLoad(prefills=1)})
    scheduler.on_abort("r1")
    scheduler.on_others({})
    started = scheduler.on_arrival(replace(ASK, request_id="r3"), 0.0)
    assert [a.request_id for a in started if isinstance(a, StartPrefill)] == ["r2"]


def test_a_request_that_lost_its_worker_comes_first() -> None:
    scheduler = cluster(P, D, D2, requests_max=1)
    scheduler.on_arrival(replace(ASK, request_id="r0"), 0.0)
    scheduler.on_output(scheduler.lives["r0"].last_leg_id, [1], Finish.LENGTH)
    scheduler.on_arrival(replace(ASK, request_id="r1"), 0.0)
    scheduler.on_arrival(replace(ASK, request_id="r2"), 0.0)
    lost = scheduler.lives["r0"].placement.decode  # type: ignore[union-attr]
    scheduler.on_worker_lost(lost, 1.0)
    assert scheduler.lives["r0"].phase is Phase.QUEUED and RESUMED_PRIORITY < 0
    started = scheduler.on_abort("r1")
    assert [a.request_id for a in started if isinstance(a, StartPrefill | StartLocal)] == ["r0"]


@settings(deadline=None)
@given(
    st.integers(1, 3),
    st.sampled_from(sorted(BUILT_IN)),
    st.lists(
        st.tuples(st.sampled_from(["arrive", "step", "end", "abort", "lose"]), st.integers(0, 50)),
        max_size=60,
    ),
)
def test_no_worker_ever_has_more_than_its_bound(
    most: int, policy: str, events: list[tuple[str, int]]
) -> None:
    made = make_policy(policy, PolicyOptions())
    scheduler = cluster(P, P2, D, D2, policy=made, requests_max=most, queued_max=10)
    names = itertools.count()
    for number, (event, choice) in enumerate(events):
        lives = list(scheduler.lives.values())
        running = [life for life in lives if life.leg is not None]
        now_s = float(number)
        if event == "arrive":
            tenant = f"t{choice % 3}"
            ask = replace(
                ASK,
                request_id=f"r{next(names)}",
                tenant=tenant,
                max_tokens=1 + choice % 3,
                slo=SloClass(priority=choice % 4),
            )
            scheduler.on_arrival(ask, now_s)
        elif event == "lose" and len(scheduler.view.workers) > 2:
            keys = sorted(scheduler.view.workers)
            scheduler.on_worker_lost(keys[choice % len(keys)], now_s)
        elif event == "abort" and lives:
            scheduler.on_abort(lives[choice % len(lives)].ask.request_id)
        elif running:
            life = running[choice % len(running)]
            finish = Finish.STOP if event == "end" else Finish.LENGTH
            scheduler.on_output(life.last_leg_id, [1], finish)
        for worker in scheduler.view.workers.values():
            assert worker.prefills <= most and worker.decodes <= most
        assert scheduler.queued <= 10 + sum(life.attempts > 0 for life in scheduler.lives.values())
    # Whoever is left gets its place, in the end.
    for _ in range(200):
        running = [life for life in scheduler.lives.values() if life.leg is not None]
        if not running:
            break
        scheduler.on_output(running[0].last_leg_id, [1], Finish.STOP)
    assert not scheduler.lives and scheduler.queued == 0


def test_queued_requests_start_fairly_and_by_priority() -> None:
    scheduler = cluster(P, D, requests_max=1)
    batch, chat = SloClass("batch", priority=1), SloClass("chat")
    scheduler.on_arrival(replace(ASK, request_id="now"), 0.0)
    for i in range(3):
        scheduler.on_arrival(replace(ASK, request_id=f"b{i}", slo=batch, tenant="b"), 0.0)
    for i in range(3):
        scheduler.on_arrival(replace(ASK, request_id=f"many{i}", slo=chat, tenant="many"), 0.0)
    scheduler.on_arrival(replace(ASK, request_id="one", slo=chat, tenant="one"), 0.0)
    started = []
    for _ in range(7):
        (running,) = [life for life in scheduler.lives.values() if life.leg is not None]
        actions = scheduler.on_abort(running.ask.request_id)
        started += [a.request_id for a in actions if isinstance(a, StartPrefill)]
    assert started == ["many0", "one", "many1", "many2", "b0", "b1", "b2"]


def test_an_api_key_class_must_be_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    from cluster.config import BadConfig, load_config

    monkeypatch.chdir(tmp_path)
    classes = {"chat": {"ttft_ms": 250, "priority": 2}}
    digest = hashlib.sha256(b"KEY").hexdigest()
    config = load_config({"slo_classes": classes, "api_key_classes": {digest: "chat"}})
    assert config.slo_classes["chat"].seconds() == {"ttft_s": 0.25, "tpot_s": None, "priority": 2}
    with pytest.raises(BadConfig, match="api_key_classes names 'batch'"):
        load_config({"slo_classes": classes, "api_key_classes": {digest: "batch"}})
    for wrong in ("sk-secret", digest.upper(), digest[1:], f"{digest}\n", ""):
        with pytest.raises(BadConfig, match=r"class 'chat' is not .* `printf %s KEY") as error:
            load_config({"slo_classes": classes, "api_key_classes": {wrong: "chat"}})
        assert "secret" not in str(error.value)
