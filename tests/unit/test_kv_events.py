"""Which of its prefix cache's blocks a worker tells of, whatever a client asks for."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from vllm.distributed.kv_events import KVEventBatch
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request
from vllm.v1.serial_utils import MsgpackEncoder

from cluster.wire import worker_pb2
from workers.engine import EngineHost
from workers.kv_events import KvEventCollector
from workers.vllm_held import HeldPrefixes

BLOCK_TOKENS = 16
BLOCKS = 8
PROMPT = list(range(5, 5 + 3 * BLOCK_TOKENS + 7))


class Host(EngineHost):
    """Of a cache of blocks, and no model."""

    def __init__(self) -> None:
        super().__init__(None, cast(Any, None), cast(Any, None))
        spec = FullAttentionSpec(
            block_size=BLOCK_TOKENS, num_kv_heads=1, head_size=1, dtype=torch.float32
        )
        config = KVCacheConfig(BLOCKS, [], [KVCacheGroupSpec(["layer"], spec)])
        self.cache = KVCacheManager(
            config, 4096, BLOCK_TOKENS, BLOCK_TOKENS, enable_kv_cache_events=True
        )
        init_none_hash(sha256)
        self.hasher = get_request_block_hasher(BLOCK_TOKENS, sha256)
        core = SimpleNamespace(
            scheduler=SimpleNamespace(kv_cache_manager=self.cache), request_block_hasher=self.hasher
        )
        self._held = HeldPrefixes(cast(Any, core))
        self.collector = KvEventCollector(SimpleNamespace(publish=lambda batch: None))

    def run(self) -> None:
        command = self._commands.get()
        assert command is not None
        command()

    def _add(self, client: int, request: EngineCoreRequest, message: worker_pb2.AddRequest) -> None:
        """All of it in one step, at whose end it is over."""
        running = Request.from_engine_core_request(request, self.hasher)
        found, cached, _ = self.cache.get_computed_blocks(running)
        new = len(PROMPT) - cached
        assert self.cache.allocate_slots(running, new, cached, found) is not None
        self.cache.free(running)

    def _hold(self, transfer_id: str, prompt: EngineCoreRequest) -> None:
        assert self.held.hold(transfer_id, prompt) == 2 * BLOCK_TOKENS
        self.held.release(transfer_id)

    def told(self) -> worker_pb2.KvEvents | None:
        self.collector.publish(KVEventBatch(ts=0.0, events=self.cache.take_events()))
        return self.collector.take()


def encoded(tokens: list[int], extra: dict[str, Any]) -> Iterable[bytes]:
    request = EngineCoreRequest(
        request_id="r",
        prompt_token_ids=tokens,
        mm_features=None,
        sampling_params=SamplingParams(max_tokens=4, extra_args=extra),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    return [bytes(part) for part in MsgpackEncoder().encode(request)]


@pytest.mark.parametrize("asked", ["add", "hold"])
def test_a_block_is_told_of_once_whatever_a_client_asks_for(asked: str) -> None:
    host, extra = Host(), {"kv_cache_report_mode": "full"}
    prompt = encoded(PROMPT, extra)
    host.add(1, worker_pb2.AddRequest(request=prompt))
    host.run()
    stored = host.told()
    assert stored is not None and len(stored.stored) == 3
    for _ in range(2):
        if asked == "add":
            host.add(1, worker_pb2.AddRequest(request=prompt))
        else:
            # It keeps no more than a quarter of the cache.
            beginning = encoded(PROMPT[: 2 * BLOCK_TOKENS + 1], extra)
            host.hold(worker_pb2.HoldPrefix(transfer_id="t", request=beginning))
        host.run()
        assert host.told() is None
    host.cache.block_pool.get_new_blocks(BLOCKS - 1)
    evicted = host.told()
    assert evicted is not None and set(evicted.removed) == set(stored.stored)
    assert not host.collector.everything().stored
