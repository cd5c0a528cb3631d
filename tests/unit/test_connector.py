"""The vLLM connector without an engine: what it makes of vLLM's calls."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

from cluster.wire import kv_pb2
from tests.unit.ends import GEOMETRY, HERE, SENDER, TOKENS
from workers.kv.connector import RECEIVE, BatonConnector
from workers.kv.endpoint import ENDPOINT_KEY, KvEndpoint, publish, withdraw
from workers.kv.frames import Frame
from workers.kv.inbox import Inbox


@pytest.fixture
def endpoint() -> Iterator[KvEndpoint]:
    inbox = Inbox(GEOMETRY, HERE[1], 1 << 20, 30.0, time.monotonic)
    there = KvEndpoint(inbox, sender=cast(Any, None))
    publish("here", there)
    yield there
    withdraw("here")


def connector(role: KVConnectorRole) -> BatonConnector:
    transfer = SimpleNamespace(kv_connector_extra_config={ENDPOINT_KEY: "here"})
    return BatonConnector(
        cast(Any, SimpleNamespace(kv_transfer_config=transfer)), role, cast(Any, None)
    )


def deliver(inbox: Inbox, transfer_id: str) -> None:
    def receive(payload: bytes = b"", **kind: Any) -> None:
        header = kv_pb2.FrameHeader(transfer_id=transfer_id, **kind)
        inbox.receive(Frame(header, memoryview(payload)))

    receive(
        open=kv_pb2.OpenTransfer(
            tokens=TOKENS,
            from_worker_id=SENDER[0],
            from_incarnation=SENDER[1],
            to_incarnation=HERE[1],
        )
    )
    for layer in range(GEOMETRY.layers):
        kv = kv_pb2.KvFrame(layer=layer, tokens=TOKENS, heads=GEOMETRY.heads)
        receive(bytes(GEOMETRY.frame_bytes(TOKENS, GEOMETRY.heads)), kv=kv)


def request(transfer_id: str) -> Any:
    return SimpleNamespace(kv_transfer_params={RECEIVE: transfer_id}, num_tokens=TOKENS + 1)


@pytest.mark.parametrize("cached", [0, TOKENS])
def test_what_is_loaded_stays_until_the_step_and_nothing_else(
    endpoint: KvEndpoint, cached: int
) -> None:
    """All of it may be in the prefix cache by the time that its request is scheduled."""
    deliver(endpoint.inbox, "t")
    assert endpoint.inbox.admit("t")
    scheduler = connector(KVConnectorRole.SCHEDULER)
    tokens, _ = scheduler.get_num_new_matched_tokens(request("t"), cached)
    assert tokens == TOKENS - cached
    blocks = SimpleNamespace(get_block_ids=lambda: ([4],))
    scheduler.update_state_after_alloc(request("t"), cast(Any, blocks), tokens)
    assert endpoint.inbox.transfers_held == (0 if cached else 1)
    assert endpoint.take_released() == ["t"]
