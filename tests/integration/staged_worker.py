"""A worker that stops at a point of a hand-off, so that tests can strike just there.

The folder that STAGE_FOLDER names is how they talk: a file named after a stage stops the worker
that comes there first, or the first whose receiver is the one in the file. It tells of itself in a
file, and goes on when the test has removed that.
While there is a file SLOW, each step takes its time: streams run on until the test has struck.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STAGE_FOLDER = "BATON_TEST_STAGE_FOLDER"
QUEUED = "queued"
"""The prefill worker has the prompt, and has not begun with it."""
COMPUTING = "computing"
"""The prefill worker's engine is in the middle of a step; the first layer's KV may be going."""
COMPUTED = "computed"
"""The prefill worker's engine has computed the first token, and has not told it."""
SENDING = "sending"
"""Half of the KV is on its way, and the prompt may be computed meanwhile."""
ADOPTING = "adopting"
"""The decode worker has all of the KV, and has not begun."""
SLOW = "slow"
SLOW_STEP_S = 0.2
"""Forty-five of them take longer than a busy machine needs to start sixteen streams."""
POLL_S = 0.005


def told(folder: Path, stage: str) -> Path:
    return folder / f"{stage}.told"


def stop_at(stage: str, transfer_id: str, sender: str, receiver: str) -> None:
    """`sender` or `receiver` is empty where it is this worker."""
    folder = Path(os.environ[STAGE_FOLDER])
    taken = folder / f"{stage}.{os.getpid()}"
    try:
        if (folder / stage).read_text() not in ("", receiver):
            return
        (folder / stage).rename(taken)
    except FileNotFoundError:
        return
    me = str(os.getpid())
    taken.write_text(
        json.dumps({"transfer_id": transfer_id, "sender": sender or me, "receiver": receiver or me})
    )
    taken.rename(told(folder, stage))
    while told(folder, stage).exists():
        time.sleep(POLL_S)


def stop_where_told() -> None:
    from vllm.v1.engine.core import EngineCore

    from cluster.wire import worker_pb2
    from workers.engine import EngineHost
    from workers.kv.connector import BatonConnector
    from workers.kv.incoming import Settled
    from workers.kv.sender import Transfer

    admit, step, save_layer = EngineHost._admit, EngineCore.step, BatonConnector.save_kv_layer
    batches, settle = Transfer._batches, EngineHost._settled

    receivers: dict[str, str] = {}
    """By the prefill leg, which the transfer is named after."""

    def stopping_admit(
        self: EngineHost, client: int, request: Any, add: worker_pb2.AddRequest, adopt: str
    ) -> None:
        if add.HasField("send"):
            receivers[add.leg_id] = add.send.worker_id
            stop_at(QUEUED, add.leg_id, "", add.send.worker_id)
        admit(self, client, request, add, adopt)

    def stopping_step(self: EngineCore) -> Any:
        # Prefill is as fast as ever: all streams are to run soon.
        if not receivers and Path(os.environ[STAGE_FOLDER], SLOW).exists():
            time.sleep(SLOW_STEP_S)
        outputs, executed = step(self)
        for of_client in outputs.values():
            for output in of_client.outputs:
                if output.new_token_ids and output.request_id in receivers:
                    receiver = receivers.pop(output.request_id)
                    stop_at(COMPUTED, output.request_id, "", receiver)
        return outputs, executed

    def stopping_save(self: BatonConnector, *args: Any, **kwargs: Any) -> None:
        save_layer(self, *args, **kwargs)
        for save in self._step().saves:
            stop_at(COMPUTING, save.send.transfer_id, "", save.send.worker_id)

    def stopping_batches(self: Transfer, bytes_min: int, *more: Any) -> Iterator[Any]:
        # One frame a message, so that there is a half.
        for number, frames in enumerate(batches(self, 1, *more)):
            if number == 1:
                stop_at(SENDING, self.transfer_id, "", self._send.worker_id)
            yield frames

    def stopping_settle(self: EngineHost, request_id: str, settled: Settled) -> None:
        waiting = self._waiting.get(request_id)
        if waiting is not None and settled.whole:
            stop_at(ADOPTING, settled.transfer_id, waiting.add.receive.worker_id, "")
        settle(self, request_id, settled)

    EngineHost._admit = stopping_admit  # type: ignore[method-assign]
    EngineCore.step = stopping_step  # type: ignore[method-assign]
    BatonConnector.save_kv_layer = stopping_save  # type: ignore[method-assign]
    Transfer._batches = stopping_batches  # type: ignore[method-assign]
    EngineHost._settled = stopping_settle  # type: ignore[method-assign]


if __name__ == "__main__":
    from workers import __main__ as worker_main

    # As the worker itself does it, before vLLM is imported.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    stop_where_told()
    worker_main.main()
