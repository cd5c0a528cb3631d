"""Policies by name, and those that are there to compare with."""

from __future__ import annotations

import importlib.metadata
import random
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import pytest

from cluster.scheduler.handover import HandOverRule
from cluster.scheduler.policies import (
    BUILT_IN,
    DEFAULT,
    GROUP,
    BadPolicy,
    Policies,
    PolicyOptions,
    make_policy,
    policy_names,
)
from cluster.scheduler.policies.baselines import PowerOfTwo, Random, RoundRobin
from cluster.scheduler.policies.guarded import Guarded
from cluster.scheduler.policies.splitwise import Splitwise
from cluster.scheduler.policy import Ask, Placement, PlacementPolicy
from cluster.scheduler.view import ClusterView, Pool, WorkerKey, WorkerView

ASK = Ask("r1", prompt_tokens=100, max_tokens=50)


def worker(name: str, pool: Pool, **values: Any) -> WorkerView:
    fixed = {"model": "m", "max_model_len_tokens": 1000, "kv_tokens": 10_000}
    return WorkerView(WorkerKey(name, "i1"), pool, **{**fixed, **values})


def view(*workers: WorkerView) -> ClusterView:
    return ClusterView({w.key: w for w in workers})


def cluster() -> ClusterView:
    return view(
        *(worker(f"p{i}", Pool.PREFILL) for i in range(3)),
        *(worker(f"d{i}", Pool.DECODE) for i in range(4)),
    )


def names(placement: Placement | None) -> tuple[str, str]:
    assert placement is not None
    return placement.prefill.worker_id, placement.decode.worker_id


def every_policy(local_prompt_tokens: int = 0) -> list[PlacementPolicy]:
    options = PolicyOptions(local_prompt_tokens, rng=random.Random(1))
    return [make_policy(name, options) for name in BUILT_IN]


# --- by name --------------------------------------------------------------------------------------


class EntryPoints(list[importlib.metadata.EntryPoint]):
    """What is installed, for `importlib.metadata.entry_points`."""

    def __call__(self, group: str, name: str = "") -> list[importlib.metadata.EntryPoint]:
        return [p for p in self if p.group == group and name in ("", p.name)]

    def add(self, name: str, value: str) -> None:
        self.append(importlib.metadata.EntryPoint(name, value, GROUP))


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> EntryPoints:
    points = EntryPoints()
    monkeypatch.setattr("importlib.metadata.entry_points", points)
    return points


def fixed_policy(options: PolicyOptions) -> PlacementPolicy:
    return Splitwise(HandOverRule(options.local_prompt_tokens + 7))


made = Counter[str]()


def broken_policy(options: PolicyOptions) -> PlacementPolicy:
    made["broken"] += 1
    raise ValueError("no weights")


def test_own_policies_take_their_options() -> None:
    options = PolicyOptions(local_prompt_tokens=3, queue_threshold_tokens=5)
    assert make_policy(DEFAULT, options) == Splitwise(HandOverRule(3), 5)
    for name in BUILT_IN:
        assert make_policy(name, options).rule == HandOverRule(3)  # type: ignore[attr-defined]


def test_an_unknown_name_is_answered_with_those_known(installed: EntryPoints) -> None:
    installed.add("nearest", "x:y")
    with pytest.raises(BadPolicy) as refused:
        make_policy("best", PolicyOptions())
    assert str(refused.value) == (
        "no policy is called 'best': there are splitwise, round_robin, random, power_of_two, "
        "prefix_aware, predicted_latency, nearest"
    )


def test_a_package_adds_a_policy(installed: EntryPoints) -> None:
    installed.add("nearest", f"{__name__}:fixed_policy")
    assert policy_names() == [*BUILT_IN, "nearest"]
    assert make_policy("nearest", PolicyOptions(1)) == Guarded(
        Splitwise(HandOverRule(8)), Splitwise(HandOverRule(1))
    )


def test_a_package_cannot_replace_a_policy(installed: EntryPoints) -> None:
    installed.add("splitwise", f"{__name__}:broken_policy")
    assert policy_names() == [*BUILT_IN]
    assert make_policy("splitwise", PolicyOptions()) == Splitwise()


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("nowhere_at_all:make", "cannot be made: ModuleNotFoundError"),
        (f"{__name__}:nothing", "cannot be made: AttributeError"),
        (f"{__name__}:broken_policy", "cannot be made: ValueError: no weights"),
    ],
)
def test_a_policy_that_cannot_be_made_is_named(
    installed: EntryPoints, value: str, said: str
) -> None:
    installed.add("nearest", value)
    with pytest.raises(BadPolicy, match=said) as refused:
        make_policy("nearest", PolicyOptions())
    assert value in str(refused.value) and "\n" not in str(refused.value)


def test_two_packages_with_one_name_are_both_named(installed: EntryPoints) -> None:
    installed.add("nearest", "one:make")
    installed.add("nearest", "two:make")
    with pytest.raises(BadPolicy, match="one:make and two:make"):
        make_policy("nearest", PolicyOptions())


def test_a_policy_is_made_once() -> None:
    policies = Policies(PolicyOptions())
    assert policies.get("round_robin") is policies.get("round_robin")
    with pytest.raises(BadPolicy):
        policies.get("best")


def test_what_is_installed_is_looked_up_once(installed: EntryPoints) -> None:
    """A client's header must not make the router search the disk, or import a module, again."""
    installed.add("nearest", f"{__name__}:broken_policy")
    policies = Policies(PolicyOptions())
    made.clear()
    for _ in range(3):
        with pytest.raises(BadPolicy, match="no weights"):
            policies.get("nearest")
    assert made["broken"] == 1
    installed.clear()
    with pytest.raises(BadPolicy, match="latency, nearest"):
        policies.get("best")


@dataclass
class Wrong:
    """A package's policy with an error in it."""

    placement: Placement | None = None

    def place(self, ask: Ask, view: ClusterView) -> Placement | None:
        if self.placement is None:
            raise ZeroDivisionError
        return self.placement


P0, D0, D9 = (WorkerKey(name, "i1") for name in ("p0", "d0", "d9"))


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (Wrong(), "ZeroDivisionError"),
        (Wrong(Placement(P0, WorkerKey("gone", "i1"), "")), "KeyError"),
        (Wrong(Placement(P0, D9, "")), "ValueError"),
        (Wrong(Placement(P0, WorkerKey("d8", "i1"), "")), "ValueError"),
        (Wrong(Placement(WorkerKey("p8", "i1"), D0, "")), "ValueError"),
        (Wrong(("p0", "d0")), "AttributeError"),  # type: ignore[arg-type]
    ],
)
def test_a_policy_that_fails_takes_no_request_with_it(wrong: Wrong, error: str) -> None:
    policy = Guarded(wrong, Splitwise())
    seen = view(
        *cluster().workers.values(),
        worker("d9", Pool.DECODE, model="n"),
        worker("d8", Pool.DECODE, draining=True),
        worker("p8", Pool.PREFILL, max_model_len_tokens=100),
    )
    assert policy.place(ASK, seen) == Placement(P0, D0, f"policy failed: {error}")
    assert policy.place(ASK, view()) is None
    right = Placement(P0, D0, "right")
    assert Guarded(Wrong(right), Splitwise()).place(ASK, seen) == right


# --- what all have in common ----------------------------------------------------------------------


def test_every_policy_keeps_the_common_rules() -> None:
    for policy in every_policy():
        for ask in (replace(ASK, max_tokens=1), replace(ASK, can_hand_over=False)):
            placement = policy.place(ask, cluster())
            assert placement is not None and not placement.hands_over
            assert placement.prefill.worker_id.startswith("p")
        for _ in range(20):
            prefill, decode = names(policy.place(ASK, cluster()))
            assert (prefill[0], decode[0]) == ("p", "d")
        assert policy.place(ASK, view()) is None
        assert policy.place(replace(ASK, prompt_tokens=1000), cluster()) is None
        alone = policy.place(ASK, view(worker("p0", Pool.PREFILL)))
        assert alone is not None and alone.reason == "one worker only"


def test_every_policy_keeps_to_workers_that_take_it() -> None:
    good = [worker("p0", Pool.PREFILL), worker("d0", Pool.DECODE)]
    bad = [
        worker("p1", Pool.PREFILL, draining=True),
        worker("p2", Pool.PREFILL, max_model_len_tokens=100),
        worker("d1", Pool.DECODE, draining=True),
        worker("d2", Pool.DECODE, max_model_len_tokens=100),
        worker("d3", Pool.DECODE, model="n"),
    ]
    for policy in every_policy():
        for _ in range(20):
            assert names(policy.place(ASK, view(*bad, *good))) == ("p0", "d0")


def test_every_policy_sends_short_prompts_to_decode() -> None:
    for policy in every_policy(local_prompt_tokens=100):
        placement = policy.place(ASK, cluster())
        assert placement is not None and not placement.hands_over
        assert placement.decode.worker_id.startswith("d")
        assert placement.reason == "short prompt"


def test_every_policy_borrows_a_worker_of_the_model() -> None:
    workers = [worker("p0", Pool.PREFILL), worker("p1", Pool.PREFILL)]
    foreign = worker("d0", Pool.DECODE, model="n")
    for policy in every_policy():
        pairs = {names(policy.place(ASK, view(*workers, foreign))) for _ in range(50)}
        assert pairs <= {("p0", "p1"), ("p1", "p0")}


# --- one by one -----------------------------------------------------------------------------------


def test_round_robin_takes_turns_in_each_pool() -> None:
    policy = RoundRobin()
    pairs = [names(policy.place(ASK, cluster())) for _ in range(12)]
    assert pairs[:5] == [("p0", "d0"), ("p1", "d1"), ("p2", "d2"), ("p0", "d3"), ("p1", "d0")]
    assert len(set(pairs)) == 12
    placement = policy.place(ASK, cluster())
    assert placement is not None and placement.reason == "round robin"


def test_random_takes_every_worker_and_repeats_with_its_seed() -> None:
    def pairs(seed: int) -> list[tuple[str, str]]:
        policy = Random(random.Random(seed))
        return [names(policy.place(ASK, cluster())) for _ in range(200)]

    assert pairs(1) == pairs(1) != pairs(2)
    assert len(set(pairs(1))) == 12


def test_power_of_two_never_takes_the_longest_queue() -> None:
    busy = [
        worker("p0", Pool.PREFILL, pending_prompt_tokens=900),
        worker("p1", Pool.PREFILL, pending_prompt_tokens=500),
        worker("p2", Pool.PREFILL, pending_prompt_tokens=100),
        worker("d0", Pool.DECODE, decode_tokens=9000),
        worker("d1", Pool.DECODE),
    ]
    policy = PowerOfTwo(random.Random(1))
    pairs = Counter(names(policy.place(ASK, view(*busy))) for _ in range(300))
    prefills = Counter[str]()
    for (prefill, decode), times in pairs.items():
        assert decode == "d1"
        prefills[prefill] += times
    assert prefills["p0"] == 0 and prefills["p2"] > prefills["p1"] > 50


def test_a_mixed_worker_keeps_its_label_for_simple_policies() -> None:
    mixed = worker("d0", Pool.DECODE, lent=1)
    for policy in every_policy()[1:]:
        assert names(policy.place(ASK, view(worker("p0", Pool.PREFILL), mixed))) == ("p0", "d0")
