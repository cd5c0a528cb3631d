"""What this worker's prefix cache holds, from vLLM's KV cache events. One of the few files that
know vLLM's internals; see tests/integration/test_vllm_seams.py.

vLLM's scheduler hands a step's events to a publisher, which is there to send them by ZMQ. Here a
collector takes the publisher's place, and the worker sends them with the step's outputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vllm.config.kv_events import KVEventsConfig
from vllm.distributed.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KVEventBatch,
)
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.core import EngineCore

from cluster.vllm_blocks import short_hash
from cluster.wire import worker_pb2

REPORT_MODE = "kv_cache_report_mode"
"""Key of SamplingParams.extra_args, of vLLM's own."""


def events_config(configured: KVEventsConfig | None) -> KVEventsConfig:
    """So that vLLM makes events, and sends them nowhere unless it was asked to."""
    if configured is not None and configured.enable_kv_cache_events:
        return configured
    return KVEventsConfig(enable_kv_cache_events=True, publisher="null")


def report_once(params: SamplingParams | None) -> None:
    """Let vLLM tell of a block when it is stored, and not again for a client that asks for it by
    `vllm_xargs`: what is told twice counts as two copies, of which one would never be removed."""
    if params is not None and params.extra_args:
        params.extra_args.pop(REPORT_MODE, None)


class KvEventCollector:
    """Used on the engine's thread."""

    def __init__(self, publisher: Any) -> None:
        self._publisher = publisher
        self._copies: dict[int, int] = {}
        """How many blocks have the hash: vLLM tells of each."""
        self._sequence = 0
        self._cleared = False
        # Ordered, so that a prompt's blocks come in its order.
        self._stored: dict[int, None] = {}
        self._removed: dict[int, None] = {}

    @classmethod
    def install(cls, core: EngineCore) -> KvEventCollector:
        collector = cls(core.scheduler.kv_event_publisher)
        core.scheduler.kv_event_publisher = collector
        return collector

    def take(self) -> worker_pb2.KvEvents | None:
        """What has changed since the last time."""
        if not (self._cleared or self._stored or self._removed):
            return None
        self._sequence += 1
        events = worker_pb2.KvEvents(
            sequence=self._sequence,
            reset=self._cleared,
            stored=self._stored,
            removed=self._removed,
        )
        self._cleared, self._stored, self._removed = False, {}, {}
        return events

    def everything(self) -> worker_pb2.KvEvents:
        """All that it holds, for one that heard nothing so far, or not all. To be asked when there
        is nothing to take."""
        return worker_pb2.KvEvents(sequence=self._sequence, reset=True, stored=self._copies)

    # --- vLLM's publisher

    def publish(self, batch: KVEventBatch) -> None:
        for event in batch.events:
            match event:
                # With several groups of layers, the first one's.
                case BlockStored() if event.group_idx in (None, 0):
                    self._on_stored(map(short_hash, event.block_hashes))
                case BlockRemoved() if event.group_idx in (None, 0):
                    self._on_removed(map(short_hash, event.block_hashes))
                case AllBlocksCleared():
                    self._cleared = True
                    self._copies, self._stored, self._removed = {}, {}, {}
        self._publisher.publish(batch)

    def get_publisher_config(self) -> Any:
        return self._publisher.get_publisher_config()

    def shutdown(self) -> None:
        self._publisher.shutdown()

    def _on_stored(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            copies = self._copies.get(block, 0)
            self._copies[block] = copies + 1
            if copies:
                continue
            if block in self._removed:
                del self._removed[block]
            else:
                self._stored[block] = None

    def _on_removed(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            copies = self._copies.get(block, 0)
            if copies > 1:
                self._copies[block] = copies - 1
            elif copies:
                del self._copies[block]
                if block in self._stored:
                    del self._stored[block]
                else:
                    self._removed[block] = None
