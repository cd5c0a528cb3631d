"""Policies that take the least cost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from cluster.scheduler.policies.scored import PredictedLatency, PrefixAware
from cluster.scheduler.policy import Ask, Placement, PlacementPolicy
from cluster.scheduler.rates import Rates
from cluster.scheduler.view import ClusterView, Pool, WorkerKey, WorkerView

ASK = Ask("r", prompt_tokens=1000, max_tokens=100)


def worker(name: str, **values: Any) -> WorkerView:
    pool = Pool.PREFILL if name.startswith("p") else Pool.DECODE
    fixed = {"kv_bytes_per_token": 1000, "block_tokens": 16}
    return WorkerView(WorkerKey(name, "i1"), pool, "m", 10_000, 100_000, **{**fixed, **values})


def placed(policy: PlacementPolicy, *workers: WorkerView, **held: int) -> Placement:
    ask = replace(ASK, held_tokens={WorkerKey(name, "i1"): tokens for name, tokens in held.items()})
    placement = policy.place(ask, ClusterView({w.key: w for w in workers}))
    assert placement is not None
    return placement


def names(placement: Placement) -> tuple[str, str]:
    return placement.prefill.worker_id, placement.decode.worker_id


def seen(prefill_s: float = 0.1, step_s: float = 0.05, exposed_s: float = 0.01) -> Rates:
    """Prompts of 1,000 tokens, steps of any size, and the KV of those prompts."""
    rates = Rates()
    for _ in range(200):
        rates.prefill.learn(1000, prefill_s)
        rates.exposed.learn(1_000_000, exposed_s)
        for batch in (1, 2, 4, 8):
            rates.step.learn(batch, step_s)
    return rates


# --- prefix_aware ---------------------------------------------------------------------------------


def test_prefix_aware_goes_where_the_prefix_is() -> None:
    workers = [worker(name) for name in ("p0", "p1", "d0", "d1")]
    assert names(placed(PrefixAware(), *workers)) == ("p0", "d0")
    assert names(placed(PrefixAware(), *workers, p1=512, d1=512)) == ("p1", "d1")


def test_prefix_aware_leaves_a_crowd() -> None:
    workers = [
        *(worker("p0"), worker("p1", pending_prompt_tokens=500)),
        *(worker("d0"), worker("d1", decode_tokens=500)),
    ]
    assert names(placed(PrefixAware(), *workers, p1=512, d1=512)) == ("p1", "d1")
    assert names(placed(PrefixAware(), *workers, p1=496, d1=496)) == ("p0", "d0")


def test_prefix_aware_leaves_a_full_worker() -> None:
    full = worker("d1", reported_kv_usage=0.95)
    assert names(placed(PrefixAware(), worker("p0"), worker("d0"), full, d1=960)) == ("p0", "d0")
    assert names(placed(PrefixAware(), worker("p0"), full)) == ("p0", "d1")


# --- predicted_latency ----------------------------------------------------------------------------


def test_predicted_latency_prefers_the_faster_worker() -> None:
    fast, slow = seen(), seen(prefill_s=1, step_s=0.5)
    workers = [
        *(worker("p0", rates=slow), worker("p1", rates=fast)),
        *(worker("d0", rates=slow), worker("d1", rates=fast)),
    ]
    assert names(placed(PredictedLatency(), *workers)) == ("p1", "d1")


def test_predicted_latency_a_queue_makes_a_fast_worker_slow() -> None:
    fast, slow = seen(), seen(prefill_s=1)
    waiting = worker("p1", rates=fast, pending_prompt_tokens=20_000)
    assert names(placed(PredictedLatency(), worker("p0", rates=slow), waiting, worker("d0")))[
        0
    ] == ("p0")


def test_predicted_latency_a_cached_prompt_makes_a_slow_worker_fast() -> None:
    workers = [worker("p0", rates=seen()), worker("p1", rates=seen(prefill_s=0.4)), worker("d0")]
    assert names(placed(PredictedLatency(), *workers))[0] == "p0"
    assert names(placed(PredictedLatency(), *workers, p1=960))[0] == "p1"


def test_predicted_latency_minds_the_batch_and_the_network() -> None:
    crowded = [worker("p0"), worker("d0", decodes=40), worker("d1", decodes=2)]
    assert names(placed(PredictedLatency(), *crowded))[1] == "d1"
    far = [worker("p0"), worker("d0", rates=seen(exposed_s=5)), worker("d1", rates=seen())]
    assert names(placed(PredictedLatency(), *far))[1] == "d1"
