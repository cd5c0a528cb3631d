"""When the connector pushes what it is to push, whichever way vLLM runs its steps."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

from tests.unit.ends import GEOMETRY, SOON_S, TOKENS, MakeOutbox, Outbox, Receiver
from workers.kv.connector import BatonConnector, Save, StepHandoffs
from workers.kv.endpoint import ENDPOINT_KEY, KvEndpoint, publish, withdraw

BLOCKS, BLOCK_TOKENS = 5, 4
BLOCK_IDS = [3, 1]
"""Of the prompt."""


class Worker:
    """The connector beside a cache, as a worker of one rank has it."""

    def __init__(self, endpoint: KvEndpoint) -> None:
        self.endpoint = endpoint
        extra = {ENDPOINT_KEY: "test"}
        config: Any = SimpleNamespace(
            kv_transfer_config=SimpleNamespace(kv_connector_extra_config=extra)
        )
        spec = SimpleNamespace(block_size=BLOCK_TOKENS)
        kv_cache: Any = SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec)])
        # One object stands for vLLM's two: they share nothing but the endpoint.
        self.connector = BatonConnector(config, KVConnectorRole.SCHEDULER, kv_cache)
        shape = (BLOCKS, GEOMETRY.heads, BLOCK_TOKENS, 2 * GEOMETRY.head_size)
        self.caches = {
            f"model.layers.{layer}.self_attn.attn": torch.randn(shape).to(torch.bfloat16)
            for layer in range(GEOMETRY.layers)
        }
        self.connector.register_kv_caches(self.caches)

    def schedule(self, *saves: Save, preempted: tuple[str, ...] = ()) -> None:
        scheduled: Any = SimpleNamespace(preempted_req_ids=set(preempted))
        step = self.connector.build_connector_meta(scheduled)
        self.connector.bind_connector_metadata(StepHandoffs(saves=list(saves), number=step.number))

    def run(self, hooks: bool) -> None:
        nothing: Any = None
        for name, cache in self.caches.items() if hooks else ():
            self.connector.save_kv_layer(name, cache, nothing)
        self.connector.wait_for_save()


@pytest.fixture
def outbox(receiver: Receiver, make_outbox: MakeOutbox) -> Outbox:
    return make_outbox()


@pytest.fixture
def worker(receiver: Receiver, outbox: Outbox) -> Iterator[Worker]:
    endpoint = KvEndpoint(receiver.inbox, outbox.sender)
    publish("test", endpoint)
    yield Worker(endpoint)
    withdraw("test")


def save_of(receiver: Receiver, transfer_id: str, overlaps: bool) -> Save:
    prompt = list(range(TOKENS))
    return Save(receiver.send_kv(transfer_id), prompt, BLOCK_IDS, 0, TOKENS, overlaps)


def received(receiver: Receiver, outbox: Outbox, transfer_id: str) -> dict[int, bytes]:
    """By layer."""
    assert outbox.result().delivered
    whole = receiver.inbox.take(transfer_id)
    assert whole is not None
    by_layer = {}
    for layer, frames in whole.items():
        frames.sort(key=lambda frame: frame.header.kv.first_token)
        by_layer[layer] = b"".join(frame.payload for frame in frames)
    return by_layer


def in_cache(worker: Worker) -> dict[int, bytes]:
    """What the blocks of the prompt hold."""
    return {
        layer: cache[BLOCK_IDS].view(torch.uint8).numpy().tobytes()
        for layer, cache in enumerate(worker.caches.values())
    }


def test_a_step_without_hooks_between_its_layers_pushes_the_same(
    receiver: Receiver, outbox: Outbox, worker: Worker
) -> None:
    """As one that is replayed as a whole CUDA graph."""
    sent = []
    for hooks, transfer_id in ((True, "a"), (False, "b"), (True, "c")):
        worker.endpoint.begin(transfer_id)
        worker.schedule(save_of(receiver, transfer_id, overlaps=True))
        worker.run(hooks)
        worker.endpoint.step_ended(len(sent) + 1)
        sent.append(received(receiver, outbox, transfer_id))
    assert sent[0] == sent[1] == sent[2]
    assert [len(each) for each in sent] == [GEOMETRY.layers] * 3


def test_what_waits_for_its_step_goes_before_another_step_may_write_its_blocks(
    receiver: Receiver, outbox: Outbox, worker: Worker
) -> None:
    """vLLM may have scheduled a step before the outputs of the one before are there."""
    expected = in_cache(worker)
    worker.endpoint.begin("t")
    worker.schedule(save_of(receiver, "t", overlaps=False))
    worker.run(hooks=True)
    worker.schedule()
    assert worker.endpoint.outgoing.transfers == 0, "it went before its step had ended"
    # The request's blocks are another one's from here on.
    worker.schedule(preempted=("r",))
    for cache in worker.caches.values():
        cache.zero_()
    claim = receiver.claim("t")
    assert claim.get(timeout=SOON_S).whole
    assert received(receiver, outbox, "t") == expected
    worker.endpoint.step_ended(1)
    assert outbox.sent.empty()
