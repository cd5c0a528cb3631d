"""A router whose member watcher fails as nobody expects, when a file is there."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from router import __main__ as router_main

FILE = "TEST_FAIL_FILE"


def told() -> bool:
    return Path(os.environ[FILE]).exists()


def fail() -> None:
    from router.members import MemberWatcher

    watch = MemberWatcher.run

    async def run(self: MemberWatcher) -> None:
        watching = asyncio.create_task(watch(self))
        while not told():
            await asyncio.sleep(0.1)
        watching.cancel()
        raise KeyError("nobody expects it")

    MemberWatcher.run = run  # type: ignore[method-assign]


if __name__ == "__main__":
    fail()
    router_main.main()
