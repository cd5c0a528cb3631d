"""Baton's vLLM KV connector: pushes a prompt's KV layer by layer, and adopts KV that arrived whole.

vLLM makes two of these, one in its scheduler and one in its model runner. What they do is small,
because the decode leg is handed to vLLM only when its KV is complete and checked (see
workers/engine.py): loading is then a copy within the step that needs it, which cannot fail halfway
and holds no block while the network is slow.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.model_executor.models.utils import extract_layer_index

from cluster.wire import kv_pb2, worker_pb2
from workers import vllm_resume
from workers.kv.codecs import CODABLE, group_codec
from workers.kv.endpoint import ENDPOINT_KEY, KvEndpoint, published
from workers.kv.frames import checksum, digest_tokens
from workers.kv.incoming import Whole
from workers.kv.layers import KernelBlocks, model_layers
from workers.kv.layout import PagedLayer, frame_ranges
from workers.kv.ranks import RANKS_KEY, RankEndpoint, RankSettings, enter_rank
from workers.kv.shared import SharedFrames, SharedMemory
from workers.kv.transfer import FRAME_BYTES_MAX
from workers.vllm_names import tolerate_lost_names

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

SEND, RECEIVE = "baton_send", "baton_receive"
"""Keys of a request's kv_transfer_params: a SendKv message, and a transfer id."""

PREFILL_ABORTED = "the prefill was aborted"

vllm_resume.install()


@dataclass(frozen=True, slots=True)
class Load:
    """Copy tokens [first_token, first_token + tokens) of a whole transfer into blocks."""

    transfer_id: str
    block_ids: list[int]
    first_token: int
    tokens: int
    shared: SharedFrames | None = None
    """Where ranks find the frames, unless the transfer was dropped."""


@dataclass(frozen=True, slots=True)
class Save:
    """Push tokens [first_token, end_token) of these, which are in the cache after this step."""

    send: worker_pb2.SendKv
    token_ids: list[int]
    block_ids: list[int]
    first_token: int
    end_token: int
    overlaps: bool
    """Each layer when it is computed; otherwise all of them after the step."""

    @property
    def is_last(self) -> bool:
        return self.end_token == len(self.token_ids)


@dataclass
class StepHandoffs(KVConnectorMetadata):  # type: ignore[misc]
    loads: list[Load] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)
    aborts: list[str] = field(default_factory=list)
    """Transfers that ranks should give up."""
    number: int = 0
    """Of this step, among all that were scheduled."""


@dataclass(slots=True)
class _Sending:
    token_ids: list[int]
    """Its prompt, and the output that it is resumed after."""
    send: worker_pb2.SendKv
    overlaps: bool
    pushed_tokens: int = 0


class BatonConnector(KVConnectorBase_V1):  # type: ignore[misc]
    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config
        ranks: RankSettings | None = extra.get(RANKS_KEY)
        self._in_ranks = ranks is not None
        self._endpoint: KvEndpoint
        self._runner: KvEndpoint | RankEndpoint
        if ranks is not None and role is KVConnectorRole.WORKER:
            tolerate_lost_names()
            self._runner = enter_rank(ranks, get_tensor_model_parallel_rank())
        else:
            self._endpoint = self._runner = published(extra[ENDPOINT_KEY])
        self._loads: list[Load] = []
        self._aborts: list[str] = []
        self._lent: deque[list[SharedMemory]] = deque()
        """To the ranks, by each step whose outputs are not here yet."""
        self._sending: dict[str, _Sending] = {}
        self._layers: dict[int, PagedLayer] = {}
        self._blocks: KernelBlocks
        self._steps = 0
        """Scheduled so far."""
        self._saved_layers: set[int] = set()
        """Of this step, those that were pushed when they had been computed."""
        self._failed_block_ids: set[int] = set()

    @property
    def requires_kv_delivery(self) -> bool:
        """A prompt preempted before its end is computed again and pushed from where it was; one
        whose transfer is lost is recomputed by the decode worker. Nothing has to be held back."""
        return False

    # --- in the scheduler -------------------------------------------------------------------

    def on_new_request(self, request: Request) -> None:
        send = (request.kv_transfer_params or {}).get(SEND)
        if send is not None:
            token_ids = list(request.all_token_ids)
            overlaps = self._endpoint.overlaps(send, len(token_ids))
            self._sending[request.request_id] = _Sending(token_ids, send, overlaps)
            if not self._in_ranks:
                self._endpoint.begin(send.transfer_id)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        return max(0, self._adoptable_tokens(request, num_computed_tokens)), False

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        transfer_id = (request.kv_transfer_params or {}).get(RECEIVE)
        if transfer_id is None:
            return
        # Its blocks are the request's own from here on.
        self._endpoint.release_held(transfer_id)
        if num_external_tokens == 0:
            self._endpoint.inbox.drop(transfer_id, "nothing of it is to be loaded")
            return
        self._loads.append(
            Load(
                transfer_id=transfer_id,
                block_ids=list(blocks.get_block_ids()[0]),
                first_token=self._end_of_adoptable(request) - num_external_tokens,
                tokens=num_external_tokens,
            )
        )

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> StepHandoffs:
        if scheduler_output.preempted_req_ids and not self._in_ranks:
            # Their blocks may be this step's. What was computed in them goes before that, if it
            # waits for its step's outputs.
            self._endpoint.step_ended(self._steps)
        self._steps += 1
        loads, self._loads = self._loads, []
        saves: list[Save] = []
        if self._sending:
            cached = scheduler_output.scheduled_cached_reqs
            computed = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
            computed |= {
                new.req_id: new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs
            }
            for request_id, scheduled in scheduler_output.num_scheduled_tokens.items():
                save = self._next_save(request_id, computed[request_id] + scheduled)
                if save is not None:
                    saves.append(save)
        if not self._in_ranks:
            return StepHandoffs(loads, saves, number=self._steps)
        aborts, self._aborts = self._aborts, []
        return StepHandoffs(self._lend(loads), saves, aborts)

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        sending = self._sending.pop(request.request_id, None)
        if sending is not None:
            if self._in_ranks:
                self._aborts.append(sending.send.transfer_id)
            else:
                self._endpoint.abort(sending.send.transfer_id, PREFILL_ABORTED)
        transfer_id = (request.kv_transfer_params or {}).get(RECEIVE)
        if transfer_id is not None:
            self._endpoint.inbox.drop(transfer_id, "the request has ended")
            self._endpoint.release_held(transfer_id)
        # Whatever is on its way was copied when it was pushed: the blocks are free at once.
        return False, None

    def _lend(self, loads: list[Load]) -> list[Load]:
        """Tell the ranks of a step where they find what they load."""
        lent: list[SharedMemory] = []
        told: list[Load] = []
        for load in loads:
            memory = self._endpoint.inbox.take_shared(load.transfer_id)
            if memory is not None:
                lent.append(memory)
                load = replace(load, shared=memory.told())
            told.append(load)
        self._lent.append(lent)
        return told

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """A step's outputs are here, from all ranks: they have loaded what it was to load."""
        if self._in_ranks:
            for memory in self._lent.popleft():
                memory.close()

    def _adoptable_tokens(self, request: Request, cached_tokens: int) -> int:
        """Tokens to adopt behind those that the prefix cache has."""
        whole = self._whole(request)
        if whole is None or cached_tokens < whole.held_tokens:
            return 0
        return self._end_of_adoptable(request) - cached_tokens

    def _end_of_adoptable(self, request: Request) -> int:
        """The last token is always computed."""
        whole = self._whole(request)
        return min(whole.tokens, int(request.num_tokens) - 1) if whole else 0

    def _whole(self, request: Request) -> Whole | None:
        transfer_id = (request.kv_transfer_params or {}).get(RECEIVE)
        return None if transfer_id is None else self._endpoint.inbox.peek(transfer_id)

    def _next_save(self, request_id: str, computed_tokens: int) -> Save | None:
        """What to push of a request of which `computed_tokens` are in the cache after this step.

        From the first token on: what the prefix cache held is not computed in any step. And never
        twice: after a preemption the same KV is computed again.
        """
        sending = self._sending.get(request_id)
        if sending is None:
            return None
        token_ids = sending.token_ids
        # Opened as soon as the prompt is computed: the way to the receiver and back, and its wait
        # for room there, take no time of their own.
        self._endpoint.sending(sending.send, len(token_ids), lambda: digest_tokens(token_ids))
        end = min(computed_tokens, len(token_ids))
        if end <= sending.pushed_tokens or (not sending.overlaps and end < len(token_ids)):
            return None
        assert self._kv_cache_manager is not None
        block_ids = self._kv_cache_manager.get_block_ids(request_id)[0]
        first = sending.pushed_tokens
        save = Save(sending.send, token_ids, list(block_ids), first, end, sending.overlaps)
        sending.pushed_tokens = end
        if save.is_last:
            del self._sending[request_id]
        return save

    # --- in the model runner ----------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        geometry = self._runner.geometry
        codec = group_codec(self._runner.codec)
        for cache in kv_caches.values():
            if codec is not None and cache.dtype not in CODABLE:
                raise ValueError(
                    f"handoff.codec: the KV cache is of {cache.dtype}, which goes only as it is: "
                    "set it to 'none'"
                )
        self._layers = model_layers(kv_caches, geometry)
        scheduled = self._kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        self._blocks = KernelBlocks(scheduled, self._layers)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        assert isinstance(connector_metadata, StepHandoffs)
        saves = [
            replace(save, block_ids=self._blocks.of(save.block_ids))
            for save in connector_metadata.saves
        ]
        super().bind_connector_metadata(replace(connector_metadata, saves=saves))

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        for load in self._step().loads:
            frames = self._runner.received(load.transfer_id, load.shared)
            if frames is None:
                # Dropped since it was scheduled: vLLM recomputes these blocks.
                self._failed_block_ids.update(load.block_ids)
                continue
            load = replace(load, block_ids=self._blocks.of(load.block_ids))
            for kv, payload in frames:
                self._adopt(load, self._layers[kv.layer], kv, payload)
        if isinstance(self._runner, RankEndpoint):
            for transfer_id in self._step().aborts:
                self._runner.abort(transfer_id, PREFILL_ABORTED)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: `start_load_kv` has copied everything."""

    def save_kv_layer(
        self,
        layer_name: str,
        kv_layer: torch.Tensor,
        attn_metadata: AttentionMetadata,
        **kwargs: Any,
    ) -> None:
        self._save_layer(extract_layer_index(layer_name))

    def _save_layer(self, layer_index: int) -> None:
        self._saved_layers.add(layer_index)
        for save in self._step().saves:
            if save.overlaps:
                rest = int(save.is_last and layer_index == max(self._layers))
                self._push_layer(save, layer_index, save.first_token, save.end_token - rest)

    def wait_for_save(self) -> None:
        # A step that is one whole CUDA graph calls nothing between its layers.
        for layer_index in self._layers.keys() - self._saved_layers:
            self._save_layer(layer_index)
        self._saved_layers.clear()
        step = self._step()
        for save in step.saves:
            # Its blocks may be free after the step; the next step may give them to others.
            if not save.overlaps:
                self._runner.after_step(step.number, partial(self._push_all, save))
            elif save.is_last:
                # With the last layer's last token the transfer is whole, and the receiver does not
                # wait for long to be asked for it: not before the first token is on its way, which
                # may take many seconds of compiling.
                self._runner.after_step(step.number, partial(self._push_rest, save))

    def get_block_ids_with_load_errors(self) -> set[int]:
        failed, self._failed_block_ids = self._failed_block_ids, set()
        return failed

    def push_computed(
        self, send: worker_pb2.SendKv, token_ids: list[int], block_ids: list[int]
    ) -> None:
        """Push the KV of a request that runs, between two steps: prompt and output alike."""
        self._endpoint.begin(send.transfer_id)
        blocks = self._blocks.of(block_ids)
        self._push_all(Save(send, token_ids, blocks, 0, len(token_ids), overlaps=False))

    def shutdown(self) -> None:
        # A worker that runs the model itself closes its endpoint itself.
        if isinstance(self._runner, RankEndpoint):
            self._runner.close()

    def _step(self) -> StepHandoffs:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, StepHandoffs)
        return metadata

    def _push_all(self, save: Save) -> None:
        for layer_index in self._layers:
            self._push_layer(save, layer_index, save.first_token, save.end_token)
        self._runner.finish(save.send.transfer_id)

    def _push_rest(self, save: Save) -> None:
        self._push_layer(save, max(self._layers), save.end_token - 1, save.end_token)
        self._runner.finish(save.send.transfer_id)

    def _push_layer(self, save: Save, layer_index: int, first_token: int, end_token: int) -> None:
        transfer = self._runner.sending(
            save.send, len(save.token_ids), lambda: digest_tokens(save.token_ids)
        )
        if transfer is None:
            return
        geometry = self._runner.geometry
        layer = self._layers[layer_index]
        begin = max(first_token, transfer.held_tokens)
        most = max(1, FRAME_BYTES_MAX // geometry.frame_bytes(1, geometry.heads))
        for first, end in frame_ranges(begin, end_token, most, layer.block_size):
            kv = kv_pb2.KvFrame(
                layer=layer_index,
                first_token=first,
                tokens=end - first,
                first_head=geometry.first_head,
                heads=geometry.heads,
                codec=self._runner.codec,
            )
            header = kv_pb2.FrameHeader(transfer_id=save.send.transfer_id, kv=kv)
            if kv.codec == kv_pb2.CODEC_NONE and layer.has_whole_blocks(first, end - first):
                size = layer.block_size
                blocks = layer.whole_blocks(save.block_ids[first // size : end // size])
                header.kv.key_order, header.kv.block_tokens = kv_pb2.KEY_ORDER_BLOCKS, size
                header.kv.checksum = checksum(*blocks)
                transfer.push_copy(header, blocks)
                continue
            payload, key_order = self._encoded(layer, save.block_ids, first, end - first)
            header.kv.key_order, header.kv.checksum = key_order, checksum(payload)
            transfer.push(header, payload)

    def _encoded(
        self, layer: PagedLayer, block_ids: list[int], first: int, tokens: int
    ) -> tuple[memoryview, kv_pb2.KeyOrder]:
        """A payload and its order."""
        codec = group_codec(self._runner.codec)
        payload = layer.read(block_ids, first, tokens)
        if codec is None:
            return _bytes_of(payload), layer.key_order
        keys, values = layer.split(payload, layer.heads, tokens, layer.key_order)
        return _bytes_of(codec.encode(keys, values)), kv_pb2.KEY_ORDER_TOKENS_CHANNELS

    def _adopt(
        self, load: Load, layer: PagedLayer, kv: kv_pb2.KvFrame, payload: memoryview
    ) -> None:
        first = max(load.first_token, kv.first_token)
        end = min(load.first_token + load.tokens, kv.first_token + kv.tokens)
        mine = self._runner.geometry
        first_head = max(mine.first_head, kv.first_head)
        end_head = min(mine.first_head + mine.heads, kv.first_head + kv.heads)
        if end <= first or end_head <= first_head:
            return
        codec, dtype = group_codec(kv.codec), layer.keys.dtype
        if codec is None:
            uncoded = torch.frombuffer(payload, dtype=dtype).to(layer.keys.device)
            if kv.heads == layer.heads and layer.takes_blocks(kv.key_order, kv.block_tokens, first):
                # The last block may have tokens that are not to be adopted. It is the request's
                # own, which computes them before it reads them.
                size = layer.block_size
                blocks = load.block_ids[first // size : -(-end // size)]
                layer.write_blocks(blocks, uncoded, skip=(first - kv.first_token) // size)
                return
            keys, values = layer.split(uncoded, kv.heads, kv.tokens, kv.key_order, kv.block_tokens)
        else:
            coded = torch.frombuffer(payload, dtype=torch.uint8).to(layer.keys.device)
            keys, values = codec.decode(coded, kv.heads, kv.tokens, layer.head_size, dtype)
        layer.write(
            load.block_ids,
            first,
            end - first,
            keys[first_head - kv.first_head : end_head - kv.first_head],
            values[first_head - kv.first_head : end_head - kv.first_head],
            parts_first=kv.first_token,
            heads=slice(first_head - mine.first_head, end_head - mine.first_head),
        )


def connector_of_this_process() -> BatonConnector:
    """The one in the model runner, which has the cache."""
    connector = get_kv_transfer_group()
    assert isinstance(connector, BatonConnector)
    return connector


def _bytes_of(payload: torch.Tensor) -> memoryview:
    if payload.is_cuda:
        # Several times as fast as into memory that may be moved. Torch keeps it for the next one.
        payload = torch.empty_like(payload, device="cpu", pin_memory=True).copy_(payload)
    return payload.view(torch.uint8).numpy().data.cast("B")
