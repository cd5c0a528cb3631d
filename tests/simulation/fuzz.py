"""Random schedules for as long as wanted: `make fuzz`. `make fuzz SEED=123` replays one."""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import os
import random
import signal
import sys
import time
from collections import Counter

from tests.simulation.world import World, report, simulate

CHUNK = 100
"""Schedules that a process plays before it reports."""
SEEDS = 2**48


def play(seeds: list[int]) -> tuple[Counter[str], dict[int, str]]:
    """How often what happened, and what went wrong by seed."""
    counts: Counter[str] = Counter()
    failures: dict[int, str] = {}
    for seed in seeds:
        try:
            counts += simulate(seed)
        except AssertionError as error:
            failures[seed] = str(error)
    return counts, failures


def replay(seed: int) -> int:
    """Print all that happens in one schedule."""
    world = World(seed)
    try:
        world.run()
    except Exception as error:
        print(world.timeline.trace(sys.maxsize))
        print(f"seed {seed} fails: {type(error).__name__}: {error}")
        return 1
    print(world.timeline.trace(sys.maxsize))
    print(f"seed {seed} passes")
    return 0


def fuzz(for_s: float, jobs: int) -> int:
    """Play schedules until the time is over or Ctrl-C comes. Prints each that fails.

    Returns how many failed.
    """
    draw = random.SystemRandom()
    started_s = time.monotonic()
    counts: Counter[str] = Counter()
    played = failed = 0

    def ignore_interrupts() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    with concurrent.futures.ProcessPoolExecutor(
        jobs, multiprocessing.get_context("fork"), ignore_interrupts
    ) as pool:
        running: set[concurrent.futures.Future[tuple[Counter[str], dict[int, str]]]] = set()
        try:
            while time.monotonic() - started_s < for_s:
                while len(running) < jobs:
                    seeds = [draw.randrange(SEEDS) for _ in range(CHUNK)]
                    running.add(pool.submit(play, seeds))
                done, running = concurrent.futures.wait(
                    running, return_when=concurrent.futures.FIRST_COMPLETED
                )
                for future in done:
                    happened, failures = future.result()
                    counts += happened
                    played += CHUNK
                    failed += len(failures)
                    for failure in failures.values():
                        print(f"\n{failure}\n", flush=True)
                print(f"\r{played} schedules, {failed} failed", end="", flush=True)
        except KeyboardInterrupt:
            pass
    print(f"\n{played} schedules in {time.monotonic() - started_s:.0f} s, {failed} failed")
    print(report(counts))
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, help="play this schedule only, and print its events")
    parser.add_argument("--for-s", type=float, default=float("inf"), help="default: until Ctrl-C")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    if args.seed is not None:
        sys.exit(replay(args.seed))
    sys.exit(1 if fuzz(args.for_s, args.jobs) else 0)


if __name__ == "__main__":
    main()
