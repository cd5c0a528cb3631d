"""Thousands of random schedules: clients that leave, processes that die, freeze or are cut off,
streams that break, messages and KV that are lost, repeated, late or overtaken.

`BATON_SCHEDULES` sets how many are played, `-s` shows how often what happened; `make fuzz SEED=...`
replays one.
"""

from __future__ import annotations

import os
from collections import Counter

import pytest

from cluster.scheduler.life import Phase
from cluster.scheduler.policies import BUILT_IN
from tests.simulation.faults import NO_FAULTS
from tests.simulation.world import World, report, simulate

SCHEDULES = int(os.environ.get("BATON_SCHEDULES", "10000"))
BATCHES = 10
ALL_BATCHES_MIN = 1000
"""In a batch of so many, everything happens."""

NEEDING = (Phase.PREFILLING, Phase.HANDING_OVER, Phase.DECODING)
HAPPENINGS = (
    *("kill", "kill machine", "freeze", "thaw", "cut", "cut off", "uncut", "break", "router ends"),
    *("supersede", "superseded"),
    *("Redis ends", "Redis forgets", "drain", "drained", "evacuate", "pool", "leave", "draw"),
    *(f"cut {ends}" for ends in ("router-worker", "worker-worker", "redis-worker", "redis-router")),
    *("message lost", "message repeated", "message overtaken", "gap", "ignored twin"),
    *("KV lost", "KV repeated", "KV overtaken", "late output", "adopted", "recomputed", "swept"),
    *("MoveOut", "moved", "undelivered"),
    *("StartPrefill", "StartDecode", "StartLocal", "CancelLeg", "DropTransfer", "FailRequest"),
    "StopAwaiting",
    *(f"{what} {phase}" for what in ("output", "lost while", "moved while") for phase in NEEDING),
    *(f"{what} {p}" for what in ("left while", "router ended while") for p in (*NEEDING, "queued")),
)


@pytest.mark.parametrize("batch", range(BATCHES))
def test_random_schedules(batch: int) -> None:
    counts: Counter[str] = Counter()
    seeds = range(batch, SCHEDULES, BATCHES)
    for seed in seeds:
        counts += simulate(seed)
    print(f"\n{report(counts)}")
    if len(seeds) >= ALL_BATCHES_MIN:
        # A simulation in which nothing goes wrong any more would pass too.
        assert [name for name in HAPPENINGS if counts[name] == 0] == []


@pytest.mark.parametrize("policy_name", BUILT_IN)
def test_without_faults_nothing_fails(policy_name: str) -> None:
    for seed in range(100):
        # With a bound, some would wait for longer than they may.
        counts = simulate(seed, faults=NO_FAULTS, policy_name=policy_name, requests_max=0)
        assert not counts["FailRequest"] and not counts["late output"] and not counts["recomputed"]


def test_a_seed_replays_its_schedule() -> None:
    first, second, other = World(7), World(7), World(8)
    for world in (first, second, other):
        world.run()
    assert first.timeline.trace(1_000_000) == second.timeline.trace(1_000_000)
    assert first.timeline.trace(1_000_000) != other.timeline.trace(1_000_000)
