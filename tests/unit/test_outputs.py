"""Outputs go to the front end at once; those of several messages together while it is behind."""

from __future__ import annotations

import asyncio

from vllm.v1.engine import EngineCoreOutputs

from router.outputs import BEHIND_S, HELD_MAX, HOLD_S, TURNS, Outputs


def numbered(count: int) -> list[EngineCoreOutputs]:
    return [EngineCoreOutputs(engine_index=i, outputs=[]) for i in range(count)]


async def turns_of_the_loop(count: int = TURNS + 1) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def pass_on_slowly(self) -> None:
        self.now_s += 2 * BEHIND_S


class FrontEnd:
    """Reads as vLLM's does: everything that is there, then it lets others run."""

    def __init__(self, outputs: Outputs) -> None:
        self.pieces: list[list[int]] = []
        self._outputs = outputs

    async def run(self) -> None:
        while True:
            piece = [(await self._outputs.get()).engine_index]
            while self._outputs._queue.qsize():
                piece.append((await self._outputs.get()).engine_index)
            self.pieces.append(piece)


async def behind(outputs: Outputs, clock: Clock) -> None:
    """The loop is slow to pass on what is put first."""
    asyncio.get_running_loop().call_soon(clock.pass_on_slowly)
    outputs.put(EngineCoreOutputs(engine_index=-1, outputs=[]))
    await turns_of_the_loop()


async def test_a_loop_that_keeps_up_gets_each_at_once() -> None:
    clock = Clock()
    outputs = Outputs(clock)
    for each in numbered(5):
        outputs.put(each)
        assert outputs._queue.qsize() == 1
        assert await outputs.get() is each
        await turns_of_the_loop()


async def test_one_that_is_behind_gets_together_what_comes_together() -> None:
    clock = Clock()
    outputs = Outputs(clock)
    front_end = FrontEnd(outputs)
    task = asyncio.create_task(front_end.run())
    await behind(outputs, clock)
    for each in numbered(3):
        outputs.put(each)
        # Each message takes some turns of the loop to be read.
        await turns_of_the_loop()
    await asyncio.sleep(5 * HOLD_S)
    task.cancel()
    assert front_end.pieces == [[-1], [0, 1, 2]]


async def test_only_so_many_wait_for_another() -> None:
    clock = Clock()
    outputs = Outputs(clock)
    await behind(outputs, clock)
    await outputs.get()
    for each in numbered(HELD_MAX):
        outputs.put(each)
    assert outputs._queue.qsize() == HELD_MAX


async def test_when_it_keeps_up_again_nothing_waits() -> None:
    clock = Clock()
    outputs = Outputs(clock)
    await behind(outputs, clock)
    held, at_once = numbered(2)
    outputs.put(held)
    assert outputs._queue.qsize() == 1
    await asyncio.sleep(5 * HOLD_S)
    assert outputs._queue.qsize() == 2
    outputs.put(at_once)
    assert outputs._queue.qsize() == 3
    order = [(await outputs.get()).engine_index for _ in range(3)]
    assert order == [-1, 0, 1]
