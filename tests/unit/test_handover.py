"""Whether a request is handed over."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.scheduler.handover import HandOverRule
from cluster.scheduler.policies import BUILT_IN, PolicyOptions, make_policy
from cluster.scheduler.policy import Ask
from cluster.scheduler.rates import Rates
from cluster.scheduler.view import ClusterView, Pool, WorkerKey, WorkerView

ALWAYS, CHEAPER = HandOverRule(), HandOverRule(when="cheaper")


def worker(pool: Pool, **values: Any) -> WorkerView:
    key = WorkerKey(pool, "i1")
    return WorkerView(key, pool, "m", 100_000, kv_tokens=100_000, **values)


def pair(**decode: Any) -> tuple[WorkerView, WorkerView]:
    fixed = {"kv_bytes_per_token": 1000, "inbox_bytes_max": 1 << 30}
    return worker(Pool.PREFILL), worker(Pool.DECODE, **{**fixed, **decode})


def seen(prefill_s: float, exposed_s: float) -> Rates:
    """Of a worker that computes 1,000 tokens and gets their KV in these times."""
    rates = Rates()
    for _ in range(100):
        rates.prefill.learn(1000, prefill_s)
        rates.exposed.learn(1_000_000, exposed_s)
    return rates


def test_an_ordinary_prompt_is_handed_over_to_an_idle_worker() -> None:
    assert ALWAYS.stays(1000, *pair()) == ""
    assert ALWAYS.stays(1000, *pair(rates=seen(prefill_s=0.1, exposed_s=10))) == ""


@pytest.mark.parametrize("rule", [ALWAYS, CHEAPER])
def test_a_full_inbox_gets_no_more(rule: HandOverRule) -> None:
    bound = {"inbox_bytes_max": 10_000_000, "decodes": 100}
    assert rule.stays(1000, *pair(reported_inbox_bytes=7_900_000, **bound)) == ""
    assert rule.stays(1000, *pair(reported_inbox_bytes=8_100_000, **bound)) == "inbox full"
    assert rule.stays(9100, *pair(**bound)) == "inbox full"


def test_cheaper_an_idle_decode_worker_computes_the_prompt_itself() -> None:
    rates = seen(prefill_s=0.1, exposed_s=0.01)
    assert CHEAPER.stays(1000, *pair(rates=rates)) == "cheaper local"
    assert CHEAPER.stays(1000, *pair(rates=rates, decodes=2)) == ""


def test_cheaper_queues_on_both_sides_count() -> None:
    rates = seen(prefill_s=0.1, exposed_s=0.01)
    prefill, decode = pair(rates=rates, decodes=2)
    prefill.rates, prefill.pending_prompt_tokens = rates, 5000
    assert CHEAPER.stays(1000, prefill, decode) == "cheaper local"
    decode.pending_prompt_tokens = 5000
    assert CHEAPER.stays(1000, prefill, decode) == ""


def test_cheaper_a_slow_network_is_avoided_until_it_is_forgotten() -> None:
    rates = seen(prefill_s=0.1, exposed_s=5)
    prefill, decode = pair(rates=rates, decodes=4)
    assert CHEAPER.stays(1000, prefill, decode) == "slow hand-off"
    for _ in range(300):
        rates.exposed.fade()
    assert CHEAPER.stays(1000, prefill, decode) == ""


def test_every_policy_keeps_to_the_rule() -> None:
    prefill, decode = pair(inbox_bytes_max=1000)
    view = ClusterView({w.key: w for w in (prefill, decode)})
    for name in BUILT_IN:
        placement = make_policy(name, PolicyOptions()).place(Ask("r", 100, 5), view)
        assert placement is not None and placement.reason == "inbox full", name
        assert placement.prefill == placement.decode == decode.key
