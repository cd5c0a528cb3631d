"""Whether a request is handed over."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cluster.scheduler.handover import HandOverRule, inbox_tokens_max
from cluster.scheduler.policies import BUILT_IN, PolicyOptions, make_policy
from cluster.scheduler.policy import Ask
from cluster.scheduler.rates import Rates
from cluster.scheduler.view import ClusterView, Pool, WorkerKey, WorkerView

ASK = Ask("r", prompt_tokens=1000, max_tokens=50)
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
    assert ALWAYS.stays(ASK, *pair()) == ""
    assert ALWAYS.stays(ASK, *pair(rates=seen(prefill_s=0.1, exposed_s=10))) == ""


@pytest.mark.parametrize("rule", [ALWAYS, CHEAPER])
def test_a_full_inbox_gets_no_more(rule: HandOverRule) -> None:
    bound = {"inbox_bytes_max": 10_000_000, "decodes": 100}
    assert rule.stays(ASK, *pair(reported_inbox_bytes=7_900_000, **bound)) == ""
    assert rule.stays(ASK, *pair(reported_inbox_bytes=8_100_000, **bound)) == "inbox full"
    long = replace(ASK, prompt_tokens=9100)
    assert rule.stays(long, *pair(**bound)) == "larger than the inbox"


def test_a_prompt_that_even_an_empty_inbox_does_not_take_is_told_apart() -> None:
    assert inbox_tokens_max(10_000_000, 1000) == 9000
    empty = pair(inbox_bytes_max=10_000_000)
    assert ALWAYS.stays(replace(ASK, prompt_tokens=9000), *empty) == ""
    assert ALWAYS.stays(replace(ASK, prompt_tokens=9001), *empty) == "larger than the inbox"
    used = pair(inbox_bytes_max=10_000_000, reported_inbox_bytes=1)
    assert ALWAYS.stays(replace(ASK, prompt_tokens=9000), *used) == "inbox full"
    assert ALWAYS.stays(replace(ASK, prompt_tokens=9001), *used) == "larger than the inbox"


def test_cheaper_an_idle_decode_worker_computes_the_prompt_itself() -> None:
    rates = seen(prefill_s=0.1, exposed_s=0.01)
    assert CHEAPER.stays(ASK, *pair(rates=rates)) == "cheaper local"
    assert CHEAPER.stays(ASK, *pair(rates=rates, decodes=2)) == ""


def test_cheaper_queues_on_both_sides_count() -> None:
    rates = seen(prefill_s=0.1, exposed_s=0.01)
    prefill, decode = pair(rates=rates, decodes=2)
    prefill.rates, prefill.pending_prompt_tokens = rates, 5000
    assert CHEAPER.stays(ASK, prefill, decode) == "cheaper local"
    decode.pending_prompt_tokens = 5000
    assert CHEAPER.stays(ASK, prefill, decode) == ""


def test_cheaper_a_slow_network_is_avoided_until_it_is_forgotten() -> None:
    rates = seen(prefill_s=0.1, exposed_s=5)
    prefill, decode = pair(rates=rates, decodes=4)
    assert CHEAPER.stays(ASK, prefill, decode) == "slow hand-off"
    for _ in range(300):
        rates.exposed.fade()
    assert CHEAPER.stays(ASK, prefill, decode) == ""


def test_a_prompt_that_the_decode_worker_holds_stays() -> None:
    prefill, decode = pair(block_tokens=16, decodes=100)
    for held, stays in ((0, ""), (976, ""), (984, "prefix held"), (992, "prefix held")):
        assert ALWAYS.stays(replace(ASK, held_tokens={decode.key: held}), prefill, decode) == stays
    there = replace(ASK, held_tokens={prefill.key: 992})
    assert ALWAYS.stays(there, prefill, decode) == ""
    some = replace(ASK, held_tokens={decode.key: 960})
    assert HandOverRule(40).stays(some, prefill, decode) == "prefix held"


def test_cheaper_what_is_held_is_not_computed() -> None:
    rates = seen(prefill_s=1, exposed_s=0.01)
    prefill, decode = pair(rates=rates, decodes=2, block_tokens=16)
    prefill.rates = rates
    assert CHEAPER.stays(ASK, prefill, decode) == ""
    held = replace(ASK, held_tokens={decode.key: 800})
    assert CHEAPER.stays(held, prefill, decode) == "cheaper local"
    both = replace(ASK, held_tokens={decode.key: 800, prefill.key: 800})
    assert CHEAPER.stays(both, prefill, decode) == ""


def test_every_policy_keeps_to_the_rule() -> None:
    prefill, decode = pair(inbox_bytes_max=1000)
    view = ClusterView({w.key: w for w in (prefill, decode)})
    for name in BUILT_IN:
        placement = make_policy(name, PolicyOptions()).place(Ask("r", 100, 5), view)
        assert placement is not None and placement.reason == "larger than the inbox", name
        assert placement.prefill == placement.decode == decode.key
