"""Whom an engine tells what it has done."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from vllm.v1.engine import EngineCoreOutputs, UtilityOutput
from vllm.v1.metrics.stats import SchedulerStats

from cluster.wire import worker_pb2


class EngineListener(Protocol):
    """What the engine's thread tells; implementations hand it over to their own thread."""

    def on_outputs(
        self,
        client: int,
        outputs: EngineCoreOutputs,
        load: worker_pb2.WorkerLoad,
        kv_events: worker_pb2.KvEvents | None = None,
    ) -> None: ...

    def on_load(self, load: worker_pb2.WorkerLoad, stats: SchedulerStats | None) -> None:
        """For all who have not been told with their outputs; and a step's stats that had none to go
        with, for one of them."""

    def on_kv_events(
        self, kv_events: worker_pb2.KvEvents, to: int | None, told: Collection[int] = ()
    ) -> None:
        """For client `to`, or for all but those `told` with their outputs."""

    def on_adopted(self, client: int, adopted: worker_pb2.Adopted) -> None: ...

    def on_utility(self, client: int, call_id: int, output: UtilityOutput) -> None: ...

    def on_moved(self, client: int, moved: worker_pb2.MovedOut) -> None: ...

    def on_failed(self, message: str) -> None: ...
