"""The vLLM connector without an engine: what it makes of vLLM's calls."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

from cluster.wire import kv_pb2, worker_pb2
from tests.unit.ends import GEOMETRY, HERE, SENDER, TOKENS
from workers.kv.connector import RECEIVE, SEND, BatonConnector, Load, Save, StepHandoffs
from workers.kv.endpoint import ENDPOINT_KEY, KvEndpoint, publish, withdraw
from workers.kv.frames import Frame, digest_tokens
from workers.kv.inbox import Inbox
from workers.kv.layout import UnknownLayout, paged_layer


@pytest.fixture
def endpoint() -> Iterator[KvEndpoint]:
    inbox = Inbox(GEOMETRY, HERE[1], 1 << 20, 30.0, time.monotonic)
    there = KvEndpoint(inbox, sender=cast(Any, None))
    publish("here", there)
    yield there
    withdraw("here")


def connector(role: KVConnectorRole, block_tokens: int = 16) -> BatonConnector:
    transfer = SimpleNamespace(kv_connector_extra_config={ENDPOINT_KEY: "here"})
    config = SimpleNamespace(kv_transfer_config=transfer)
    group = SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=block_tokens))
    cache = SimpleNamespace(kv_cache_groups=[group])
    return BatonConnector(cast(Any, config), role, cast(Any, cache))


def frame(transfer_id: str, payload: bytes | bytearray = b"", **kind: Any) -> Frame:
    return Frame(kv_pb2.FrameHeader(transfer_id=transfer_id, **kind), memoryview(payload))


def opening(transfer_id: str, tokens: int) -> Frame:
    opened = kv_pb2.OpenTransfer(
        tokens=tokens,
        from_worker_id=SENDER[0],
        from_incarnation=SENDER[1],
        to_incarnation=HERE[1],
    )
    return frame(transfer_id, open=opened)


def deliver(inbox: Inbox, transfer_id: str) -> None:
    inbox.receive(opening(transfer_id, TOKENS))
    for layer in range(GEOMETRY.layers):
        kv = kv_pb2.KvFrame(layer=layer, tokens=TOKENS, heads=GEOMETRY.heads)
        payload = bytes(GEOMETRY.frame_bytes(TOKENS, GEOMETRY.heads))
        inbox.receive(frame(transfer_id, payload, kv=kv))


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


class Transfers:
    """Of an endpoint whose sending does not matter."""

    def __init__(self) -> None:
        self.opened: list[tuple[int, bytes]] = []

    def overlaps(self, send: worker_pb2.SendKv, tokens: int) -> bool:
        return True

    def begin(self, transfer_id: str) -> None:
        """Nothing is told."""

    def sending(self, send: worker_pb2.SendKv, tokens: int, digest: Callable[[], bytes]) -> None:
        self.opened.append((tokens, digest()))


def test_of_a_resumed_request_the_output_so_far_goes_with_its_prompt(endpoint: KvEndpoint) -> None:
    """It is computed where the prompt is, and would be computed again where that goes."""
    scheduler, transfers = connector(KVConnectorRole.SCHEDULER), Transfers()
    scheduler._endpoint = cast(Any, transfers)
    scheduler._kv_cache_manager = cast(Any, SimpleNamespace(get_block_ids=lambda _: ([4, 5],)))
    send = worker_pb2.SendKv(transfer_id="t")
    params, tokens = {SEND: send}, [1, 2, 3, 4, 5, 6]
    resumed = SimpleNamespace(request_id="r", all_token_ids=tokens, kv_transfer_params=params)
    scheduler.on_new_request(cast(Any, resumed))
    saves = [scheduler._next_save("r", computed) for computed in (4, 6)]
    assert saves == [
        Save(send, tokens, [4, 5], 0, 4, overlaps=True),
        Save(send, tokens, [4, 5], 4, 6, overlaps=True),
    ]
    assert [save.is_last for save in saves if save] == [False, True]
    assert transfers.opened == [(6, digest_tokens(tokens))] * 2


def caches(block_tokens: int, layers: int = GEOMETRY.layers) -> dict[str, torch.Tensor]:
    """As vLLM's CPU attention has them, with another number in each element."""
    shape = (12, GEOMETRY.heads, block_tokens, 2 * GEOMETRY.head_size)
    size = math.prod(shape)
    return {
        f"model.layers.{layer}.self_attn.attn": torch.arange(
            layer * size, (layer + 1) * size, dtype=torch.int16
        ).view(shape)
        for layer in range(layers)
    }


@dataclass
class Pushed:
    """What is given to a transfer."""

    held_tokens: int = 0
    frames: list[tuple[kv_pb2.KvFrame, bytearray]] = field(default_factory=list)

    def push(self, header: kv_pb2.FrameHeader, payload: memoryview) -> None:
        self.frames.append((header.kv, bytearray(payload)))

    def push_copy(self, header: kv_pb2.FrameHeader, parts: Sequence[memoryview]) -> None:
        self.push(header, memoryview(b"".join(parts)))

    def finish(self) -> None:
        """There is more to come of others."""


@dataclass
class Opens:
    """A sender."""

    transfer: Pushed = field(default_factory=Pushed)

    def open(self, send: worker_pb2.SendKv, tokens: int, digest: bytes) -> Pushed:
        return self.transfer


@pytest.mark.parametrize("kernels", [1, 2, 4])
def test_the_schedulers_blocks_are_several_of_the_kernels(
    endpoint: KvEndpoint, kernels: int
) -> None:
    """Pushed from a cache of blocks of four tokens, and adopted in one of smaller blocks."""
    tokens, cut = 10, 4 // kernels
    endpoint.sender = cast(Any, sender := Opens())
    whole, split = (connector(KVConnectorRole.WORKER, block_tokens=4) for _ in range(2))
    whole.register_kv_caches(caches(4))
    # As many tokens, in more blocks.
    split.register_kv_caches(
        {
            name: torch.zeros_like(cache).repeat(kernels, 1, 1, 1)
            for name, cache in caches(cut).items()
        }
    )
    send = worker_pb2.SendKv(transfer_id="there")

    whole.push_computed(send, list(range(tokens)), [7, 2, 5])
    endpoint.inbox.receive(opening("back", tokens))
    for kv, payload in sender.transfer.frames:
        endpoint.inbox.receive(frame("back", payload, kv=kv))
    load = Load("back", [3, 9, 1], first_token=0, tokens=tokens)
    split.bind_connector_metadata(StepHandoffs(loads=[load]))
    split.start_load_kv(cast(Any, None))

    # And out of it again, as a step's saves.
    sent, sender.transfer.frames = sender.transfer.frames, []
    save = Save(send, list(range(tokens)), [3, 9, 1], 0, tokens, overlaps=False)
    endpoint.begin("there")
    split.bind_connector_metadata(StepHandoffs(saves=[save]))
    split.wait_for_save()
    endpoint.step_ended(0)
    assert values(sender.transfer.frames) == values(sent)


def values(
    frames: list[tuple[kv_pb2.KvFrame, bytearray]],
) -> dict[tuple[int, int], list[list[int]]]:
    """Keys and values by layer and token, whatever the order in which they were sent."""
    found = {}
    for kv, payload in frames:
        layer = paged_layer(
            torch.zeros(1, GEOMETRY.heads, 4, 2 * GEOMETRY.head_size, dtype=torch.int16),
            GEOMETRY.heads,
            GEOMETRY.head_size,
        )
        flat = torch.frombuffer(payload, dtype=torch.int16)
        keys, kept = layer.split(flat, kv.heads, kv.tokens, kv.key_order, kv.block_tokens)
        for at in range(kv.tokens):
            both = torch.cat([keys[:, at], kept[:, at]])
            found[kv.layer, kv.first_token + at] = both.tolist()
    assert len(found) == GEOMETRY.layers * 10
    return found


def second_model(caches: dict[str, torch.Tensor]) -> None:
    """A draft's first layer is counted from 0, like the model's."""
    caches["draft.layers.0.self_attn.attn"] = caches["model.layers.0.self_attn.attn"].clone()


def one_after(caches: dict[str, torch.Tensor]) -> None:
    """As EAGLE's."""
    last = f"model.layers.{GEOMETRY.layers}.self_attn.attn"
    caches[last] = caches["model.layers.0.self_attn.attn"].clone()


def one_less(caches: dict[str, torch.Tensor]) -> None:
    del caches["model.layers.1.self_attn.attn"]


def other_type(caches: dict[str, torch.Tensor]) -> None:
    first = caches["model.layers.0.self_attn.attn"]
    caches["model.layers.0.self_attn.attn"] = first.to(torch.uint8)


def other_blocks(caches: dict[str, torch.Tensor]) -> None:
    first = caches["model.layers.0.self_attn.attn"]
    caches["model.layers.0.self_attn.attn"] = first[:, :, :8].contiguous()


@pytest.mark.parametrize("change", [second_model, one_after, one_less, other_type, other_blocks])
def test_caches_that_are_not_one_a_layer_are_refused(
    endpoint: KvEndpoint, change: Callable[[dict[str, torch.Tensor]], None]
) -> None:
    registered = caches(16)
    connector(KVConnectorRole.WORKER).register_kv_caches(registered)
    change(registered)
    with pytest.raises(UnknownLayout):
        connector(KVConnectorRole.WORKER).register_kv_caches(registered)


def test_blocks_that_do_not_fill_the_schedulers_are_refused(endpoint: KvEndpoint) -> None:
    with pytest.raises(UnknownLayout, match="blocks of"):
        connector(KVConnectorRole.WORKER, block_tokens=24).register_kv_caches(caches(16))
