"""What waits goes in one batch; to a receiver that is behind, when it has taken the last one."""

from __future__ import annotations

import asyncio

import pytest

from cluster import outgoing as outgoing_module
from cluster.outgoing import BATCH_MAX, WAITING_MAX, Outgoing

LONG_S = 30.0
"""That no test waits."""


async def taken(outgoing: Outgoing[int]) -> tuple[int, list[int]] | None:
    """What may go now."""
    try:
        return await asyncio.wait_for(outgoing.take(), 0.01)
    except TimeoutError:
        return None


@pytest.fixture(autouse=True)
def never_without_being_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outgoing_module, "GATHER_S", LONG_S)


async def test_a_message_goes_at_once() -> None:
    outgoing = Outgoing[int]()
    taking = asyncio.create_task(outgoing.take())
    await asyncio.sleep(0)
    assert not taking.done()
    outgoing.put(7)
    assert await taking == (1, [7])
    outgoing.put(8)
    assert await outgoing.take() == (2, [8])


async def test_what_waits_goes_in_one_batch_in_order() -> None:
    outgoing = Outgoing[int]()
    for number in range(BATCH_MAX + 3):
        outgoing.put(number)
    assert await outgoing.take() == (1, list(range(BATCH_MAX)))
    assert await outgoing.take() == (2, list(range(BATCH_MAX, BATCH_MAX + 3)))
    assert await taken(outgoing) is None


async def test_one_that_is_behind_gets_the_next_when_all_is_taken() -> None:
    outgoing = Outgoing[int]()
    for number in range(3):
        outgoing.put(number)
        await outgoing.take()
    # Of three under way, one is taken.
    outgoing.on_taken(1, gather=True)
    outgoing.put(3)
    outgoing.put(4)
    assert await taken(outgoing) is None
    outgoing.on_taken(2, gather=True)
    assert await taken(outgoing) is None
    outgoing.on_taken(3, gather=True)
    assert await taken(outgoing) == (4, [3, 4])
    outgoing.put(5)
    assert await taken(outgoing) is None
    outgoing.on_taken(4, gather=True)
    assert await taken(outgoing) == (5, [5])
    # Nothing is under way: at once.
    outgoing.on_taken(5, gather=True)
    outgoing.put(6)
    assert await taken(outgoing) == (6, [6])


async def test_one_that_keeps_up_again_is_not_waited_for() -> None:
    outgoing = Outgoing[int]()
    outgoing.put(0)
    await outgoing.take()
    outgoing.on_taken(0, gather=True)
    outgoing.put(1)
    assert await taken(outgoing) is None
    outgoing.on_taken(0, gather=False)
    assert await taken(outgoing) == (2, [1])
    outgoing.put(2)
    assert await taken(outgoing) == (3, [2])


async def test_one_that_says_nothing_more_is_waited_for_a_moment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outgoing_module, "GATHER_S", 0.02)
    outgoing = Outgoing[int]()
    outgoing.put(0)
    await outgoing.take()
    outgoing.on_taken(0, gather=True)
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    outgoing.put(1)
    assert await outgoing.take() == (2, [1])
    assert loop.time() - began_s >= 0.015


async def test_only_so_much_is_gathered() -> None:
    outgoing = Outgoing[int]()
    outgoing.put(0)
    await outgoing.take()
    outgoing.on_taken(0, gather=True)
    taking = asyncio.create_task(outgoing.take())
    for number in range(BATCH_MAX):
        await asyncio.sleep(0)
        assert not taking.done()
        outgoing.put(number)
    assert await taking == (2, list(range(BATCH_MAX)))


async def test_too_much_is_refused() -> None:
    outgoing = Outgoing[int]()
    for number in range(WAITING_MAX):
        outgoing.put(number)
    with pytest.raises(asyncio.QueueFull):
        outgoing.put(0)


async def test_after_the_end_nothing_goes() -> None:
    outgoing = Outgoing[int]()
    taking = asyncio.create_task(outgoing.take())
    await asyncio.sleep(0)
    outgoing.put(1)
    outgoing.close()
    assert await taking is None
    assert await outgoing.take() is None
