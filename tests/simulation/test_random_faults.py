"""Thousands of random schedules: clients that leave, workers that die, links that break.

`BATON_SCHEDULES` sets how many are played, `BATON_SEED` replays one and prints its events.
"""

from __future__ import annotations

import os
from collections import Counter

import pytest

from cluster.scheduler.policies import BUILT_IN
from tests.simulation.world import NO_FAULTS, World, simulate

SCHEDULES = int(os.environ.get("BATON_SCHEDULES", "3000"))
SEED = os.environ.get("BATON_SEED")
BATCHES = 10

HAPPENINGS = (
    *("kill", "break", "drain", "pool", "lost", "leave", "late", "adopted", "recomputed", "draw"),
    *("StartPrefill", "StartDecode", "StartLocal", "CancelLeg", "DropTransfer", "FailRequest"),
)


@pytest.mark.skipif(SEED is not None, reason="BATON_SEED asks for one schedule")
@pytest.mark.parametrize("batch", range(BATCHES))
def test_random_schedules(batch: int) -> None:
    counts: Counter[str] = Counter()
    for seed in range(batch, SCHEDULES, BATCHES):
        counts += simulate(seed)
    if SCHEDULES >= 1000:
        # A simulation in which nothing goes wrong any more would pass too.
        assert [name for name in HAPPENINGS if counts[name] == 0] == []


@pytest.mark.skipif(SEED is None, reason="only with BATON_SEED")
def test_one_schedule() -> None:
    world = World(int(SEED or 0))
    try:
        world.run()
    finally:
        print(f"\n{world.trace(1_000_000)}")


@pytest.mark.skipif(SEED is not None, reason="BATON_SEED asks for one schedule")
@pytest.mark.parametrize("policy_name", BUILT_IN)
def test_without_faults_nothing_fails(policy_name: str) -> None:
    for seed in range(100):
        counts = simulate(seed, faults=NO_FAULTS, policy_name=policy_name)
        assert not counts["FailRequest"] and not counts["late"] and not counts["recomputed"]


def test_a_seed_replays_its_schedule() -> None:
    first, second = World(7), World(7)
    first.run()
    second.run()
    assert first.trace(1_000_000) == second.trace(1_000_000)
    assert first.trace(1_000_000) != World(8).trace(1_000_000)
