"""A router says what it has taken while it is behind, and once more when it no longer is."""

from __future__ import annotations

import asyncio

from router.keeping_up import BEHIND_S, TURNS, KeepingUp


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def work(self) -> None:
        """Of the front end, on the loop."""
        self.now_s += 2 * BEHIND_S


async def pass_on(keeping_up: KeepingUp, clock: Clock, number: int, slowly: bool) -> None:
    keeping_up.on_batch(number)
    if slowly:
        asyncio.get_running_loop().call_soon(clock.work)
    for _ in range(TURNS + 1):
        await asyncio.sleep(0)


async def test_one_that_keeps_up_says_nothing() -> None:
    clock, told = Clock(), list[tuple[int, bool]]()
    keeping_up = KeepingUp(lambda *what: told.append(what), clock)
    for number in range(1, 5):
        await pass_on(keeping_up, clock, number, slowly=False)
        # Between batches there is time enough.
        clock.work()
    assert told == []


async def test_one_that_is_behind_tells_each_batch_when_it_is_passed_on() -> None:
    clock, told = Clock(), list[tuple[int, bool]]()
    keeping_up = KeepingUp(lambda *what: told.append(what), clock)
    keeping_up.on_batch(1)
    asyncio.get_running_loop().call_soon(clock.work)
    for _ in range(TURNS - 1):
        await asyncio.sleep(0)
        assert told == []
    for _ in range(2):
        await asyncio.sleep(0)
    assert told == [(1, True)]
    await pass_on(keeping_up, clock, 2, slowly=True)
    await pass_on(keeping_up, clock, 3, slowly=False)
    await pass_on(keeping_up, clock, 4, slowly=False)
    assert told == [(1, True), (2, True), (3, False)]
