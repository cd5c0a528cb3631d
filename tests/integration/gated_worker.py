"""A worker that stops at points of a request's way while a file there says so, and leaves what the
tests beside it want to see or to send again."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.wire import worker_pb2
from workers import __main__ as worker_main
from workers.environment import prepare_environment

if TYPE_CHECKING:
    from vllm.v1.engine.core import EngineCore

    from workers.engine import EngineHost
    from workers.kv.connector import BatonConnector
    from workers.kv.transfer import Transfer
    from workers.server import WorkerService

GATES_FOLDER = "BATON_TEST_GATES"

ENGINE = "engine"
"""Before a step, if the file says `any`; or if a prompt is computed in part (`computing`); or if
something decodes (`decoding`). Requests still come and are aborted."""
LAYER = "layer"
"""In a step, after a prompt's second layer."""
SENDING = "sending"
"""After a transfer's first frame."""
OUTPUTS = "outputs"
"""A step's outputs, on their way to the router."""
GRAMMAR = "grammar"
"""A request that goes on under a grammar, before it goes to vLLM's scheduler."""
RECORD = "record"
"""No gate: leave what comes and goes."""

PUSHED = "pushed"
"""Left of the last transfer: its id, and its messages in hex, a line each."""
ADDED = "added"
"""The last AddRequest."""
THREADS = "threads"
"""Left when it is asked what it holds: their names."""

POLL_S = 0.005


class Gates:
    """Files named `POOL.GATE`. `WORKER.GATE` beside it says that the worker has come to it."""

    def __init__(self, folder: str, worker_id: str) -> None:
        self._folder, self._worker_id = Path(folder), worker_id
        self._pool = worker_id.partition("-")[0]

    def says(self, gate: str) -> str:
        try:
            return (self._folder / f"{self._pool}.{gate}").read_text()
        except FileNotFoundError:
            return ""

    def reached(self, gate: str) -> None:
        (self._folder / f"{self._worker_id}.{gate}").touch()

    def wait(self, gate: str, until: Callable[[], bool] = lambda: False) -> None:
        while self.says(gate) and not until():
            self.reached(gate)
            time.sleep(POLL_S)

    def leave(self, what: str, content: bytes) -> None:
        """Whole, or not at all."""
        part = self._folder / f"{self._worker_id}.{what}.part"
        part.write_bytes(content)
        part.rename(self._folder / f"{self._worker_id}.{what}")


def gate_engine(gates: Gates) -> None:
    from vllm.v1.engine.core import EngineCore

    def closed(core: EngineCore) -> bool:
        running = core.scheduler.running
        match gates.says(ENGINE):
            case "any":
                return True
            case "computing":
                return any(0 < r.num_computed_tokens < r.num_prompt_tokens for r in running)
            case "decoding":
                return any(r.num_output_tokens > 2 for r in running)
        return False

    def gated(step: Callable[[EngineCore], Any]) -> Callable[[EngineCore], Any]:
        def step_or_not(self: EngineCore) -> Any:
            if not closed(self):
                return step(self)
            gates.reached(ENGINE)
            return {}, False

        return step_or_not

    for name in ("step", "step_with_batch_queue"):
        setattr(EngineCore, name, gated(getattr(EngineCore, name)))


def gate_layer(gates: Gates) -> None:
    from workers.kv.connector import BatonConnector

    save = BatonConnector.save_kv_layer

    def gated(self: BatonConnector, layer_name: str, *args: Any, **kwargs: Any) -> None:
        save(self, layer_name, *args, **kwargs)
        if self._step().saves and ".1." in layer_name:
            gates.wait(LAYER)

    BatonConnector.save_kv_layer = gated


def gate_sending(gates: Gates) -> None:
    from workers.kv.transfer import Transfer

    batches, messages = Transfer._batches, Transfer._messages

    def gated(self: Transfer, bytes_min: int, *more: Any) -> Iterator[Any]:
        bytes_min = 1 if gates.says(SENDING) else bytes_min
        for number, frames in enumerate(batches(self, bytes_min, *more)):
            if number:
                gates.wait(SENDING, self.done.is_set)
            yield frames

    def recorded(self: Transfer) -> Iterator[bytes]:
        sent = [self.transfer_id]
        for message in messages(self):
            if gates.says(RECORD):
                sent.append(message.hex())
                gates.leave(PUSHED, "\n".join(sent).encode())
            yield message

    Transfer._batches = gated
    Transfer._messages = recorded


def gate_routers(gates: Gates) -> None:
    from workers.engine import EngineHost
    from workers.server import WorkerService

    send, add = WorkerService._send_outputs, EngineHost.add
    hold, ready = WorkerService.Hold, EngineHost._grammar_ready

    def held_back(self: WorkerService, *outputs: Any) -> None:
        if gates.says(OUTPUTS):
            gates.reached(OUTPUTS)
            self._loop.call_later(POLL_S, held_back, self, *outputs)
        else:
            send(self, *outputs)

    def recorded(self: EngineHost, client: int, message: worker_pb2.AddRequest) -> None:
        if gates.says(RECORD):
            gates.leave(ADDED, message.SerializeToString())
        add(self, client, message)

    def ready_and_let(request: Any) -> bool:
        if gates.says(GRAMMAR):
            gates.reached(GRAMMAR)
            return False
        return ready(request)

    async def with_threads(self: WorkerService, request: Any, context: Any) -> worker_pb2.Holdings:
        names = [thread.name for thread in threading.enumerate()]
        gates.leave(THREADS, json.dumps(names).encode())
        return await hold(self, request, context)

    WorkerService._send_outputs = held_back
    WorkerService.Hold = with_threads
    EngineHost.add = recorded
    EngineHost._grammar_ready = staticmethod(ready_and_let)


if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    # As the worker itself does it, before vLLM is imported.
    prepare_environment(settings["cpu_ids"])
    told = Gates(os.environ[GATES_FOLDER], settings["worker_id"])
    for install in (gate_engine, gate_layer, gate_sending, gate_routers):
        install(told)
    worker_main.main()
