"""Where a token's keys and values lie in vLLM's paged KV cache, and how to copy them in and out.

The layouts are vLLM's own and not promised by it, so this is the one file that knows them;
tests/integration/test_vllm_seams.py compares it with what vLLM's kernel writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from cluster.wire import kv_pb2

_KEY_ORDERS = (kv_pb2.KEY_ORDER_TOKENS_CHANNELS, kv_pb2.KEY_ORDER_CHANNELS_TOKENS)


class UnknownLayout(Exception):
    """vLLM's cache has a shape that Baton cannot read."""


@dataclass(frozen=True, slots=True)
class PagedLayer:
    """One layer's KV cache as two views of vLLM's memory.

    keys, values: [blocks, heads, block_size, head_size], of any strides.
    key_order: the order in which keys are copied fastest.
    """

    keys: torch.Tensor
    values: torch.Tensor
    key_order: int

    @property
    def heads(self) -> int:
        return self.keys.shape[1]

    @property
    def block_size(self) -> int:
        return self.keys.shape[2]

    @property
    def head_size(self) -> int:
        return self.keys.shape[3]

    def read(self, block_ids: Sequence[int], first: int, tokens: int) -> torch.Tensor:
        """Copy tokens [first, first + tokens) of a sequence out of its blocks.

        Returns:
            [2 * heads * tokens * head_size], keys in `key_order`, then values
            [heads, tokens, head_size].
        """
        payload = self.keys.new_empty(2 * self.heads * tokens * self.head_size)
        keys, values = self.split(payload, self.heads, tokens, self.key_order)
        for block, within, at in self._pieces(block_ids, first, tokens):
            keys[:, at].copy_(self.keys[block, :, within])
            values[:, at].copy_(self.values[block, :, within])
        return payload

    def write(
        self,
        block_ids: Sequence[int],
        first: int,
        tokens: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        parts_first: int,
        heads: slice,
    ) -> None:
        """Copy tokens [first, first + tokens) of a sequence into its blocks.

        keys, values: [heads, tokens, head_size], for tokens from `parts_first` on and the KV heads
            of the slice `heads`.
        """
        skip = first - parts_first
        for block, within, at in self._pieces(block_ids, first, tokens):
            source = slice(at.start + skip, at.stop + skip)
            self.keys[block, heads, within].copy_(keys[:, source])
            self.values[block, heads, within].copy_(values[:, source])

    def split(
        self, payload: torch.Tensor, heads: int, tokens: int, key_order: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Views [heads, tokens, head_size] of the keys and values in what `read` returned."""
        if key_order not in _KEY_ORDERS:
            raise UnknownLayout(f"key order {key_order} is not known")
        keys, values = payload.view(2, heads * tokens * self.head_size)
        if key_order == kv_pb2.KEY_ORDER_CHANNELS_TOKENS:
            keys = keys.view(heads, self.head_size, tokens).transpose(1, 2)
        else:
            keys = keys.view(heads, tokens, self.head_size)
        return keys, values.view(heads, tokens, self.head_size)

    def _pieces(
        self, block_ids: Sequence[int], first: int, tokens: int
    ) -> Iterator[tuple[int, slice, slice]]:
        """Runs of a token range within one block: (block, slots in it, offsets in the range)."""
        position = first
        while position < first + tokens:
            slot = position % self.block_size
            run = min(self.block_size - slot, first + tokens - position)
            yield (
                block_ids[position // self.block_size],
                slice(slot, slot + run),
                slice(position - first, position - first + run),
            )
            position += run


def paged_layer(cache: torch.Tensor, heads: int, head_size: int) -> PagedLayer:
    """Find keys and values in one layer's cache as vLLM allocated it.

    Raises:
        UnknownLayout: it has none of the shapes known here.
    """
    if cache.device.type == "cpu":
        return _cpu_layer(cache, heads, head_size)
    return _gpu_layer(cache, heads, head_size)


def _cpu_layer(cache: torch.Tensor, heads: int, head_size: int) -> PagedLayer:
    """vLLM's CPU attention: in each [block, head], keys [head_size, block_size], then values
    [block_size, head_size]."""
    if cache.dim() != 4 or cache.shape[1] != heads or cache.shape[3] != 2 * head_size:
        raise UnknownLayout(
            f"expected a CPU KV cache [blocks, {heads}, block_size, {2 * head_size}], "
            f"got {list(cache.shape)}"
        )
    blocks, _, block_size, _ = cache.shape
    halves = cache.view(blocks, heads, 2, block_size * head_size)
    keys = halves[:, :, 0].view(blocks, heads, head_size, block_size).transpose(2, 3)
    values = halves[:, :, 1].view(blocks, heads, block_size, head_size)
    return PagedLayer(keys, values, kv_pb2.KEY_ORDER_CHANNELS_TOKENS)


def _gpu_layer(cache: torch.Tensor, heads: int, head_size: int) -> PagedLayer:
    """vLLM's GPU attention: [blocks, 2, block_size, heads, head_size] or the same with keys and
    values, or heads and block_size, in the other order; strides tell nothing apart, so shapes
    must."""
    if cache.dim() == 5 and cache.shape[-1] == head_size and 2 in cache.shape[:2]:
        both = cache if cache.shape[1] == 2 else cache.transpose(0, 1)
        keys, values = both[:, 0], both[:, 1]
        if keys.shape[2] == heads:
            keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        if keys.shape[1] == heads:
            return PagedLayer(keys, values, kv_pb2.KEY_ORDER_TOKENS_CHANNELS)
    if cache.dim() == 4 and cache.shape[-1] == 2 * head_size and heads in cache.shape[1:3]:
        by_head = cache if cache.shape[1] == heads else cache.transpose(1, 2)
        keys, values = by_head[..., :head_size], by_head[..., head_size:]
        return PagedLayer(keys, values, kv_pb2.KEY_ORDER_TOKENS_CHANNELS)
    raise UnknownLayout(
        f"expected a KV cache of {heads} heads of {head_size}, got {list(cache.shape)}"
    )
