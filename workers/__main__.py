"""Run one worker in the foreground: `python -m workers SETTINGS_JSON`.

Prints one line of JSON when it is ready: its address and description.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from typing import Any

from cluster.errors import ERROR_PREFIX
from cluster.logs import configure_logs
from workers.environment import prepare_environment
from workers.settings import WorkerSettings


async def serve(settings: WorkerSettings) -> None:
    # After `prepare_environment`: this imports torch and vLLM.
    from workers.worker import Worker

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, stop.set)
    worker = await Worker.start(settings)

    def on_notice() -> None:
        # The second time, or without a notice to give: at once.
        if not worker.on_notice():
            stop.set()

    loop.add_signal_handler(signal.SIGTERM, on_notice)
    print(json.dumps({"address": worker.description.kv_address}), flush=True)
    stopping = asyncio.create_task(stop.wait())
    drained = asyncio.create_task(worker.drained())
    waits: set[asyncio.Future[Any]] = {stopping, drained, worker.service.failed}
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for waiting in (stopping, drained):
        waiting.cancel()
    await worker.stop()
    if worker.service.failed.done():
        print(f"{ERROR_PREFIX}{worker.service.failed.result()}", file=sys.stderr)
    sys.stderr.flush()
    # vLLM's executor of several ranks holds up an interpreter that ends in order.
    os._exit(int(worker.service.failed.done()))


def main() -> None:
    configure_logs()
    settings = WorkerSettings.from_json(sys.argv[1])
    prepare_environment(settings.cpu_ids)
    asyncio.run(serve(settings))


if __name__ == "__main__":
    main()
