"""Where a token's keys and values lie in vLLM's paged KV cache, and how to copy them in and out.

The layouts are vLLM's own and not promised by it, so this is the one file that knows them;
tests/integration/test_vllm_seams.py compares it with what vLLM's kernel writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from cluster.wire import kv_pb2


class UnknownLayout(Exception):
    """vLLM's cache has a shape that Baton cannot read."""


@dataclass(frozen=True, slots=True)
class PagedLayer:
    """One layer's KV cache as views of vLLM's memory.

    keys, values: [blocks, heads, block_size, head_size], of any strides.
    key_order: the order in which parts of blocks are copied fastest.
    blocks: [blocks, heads * 2 * block_size * head_size], where each block is one piece of memory,
        in KEY_ORDER_BLOCKS: on CPUs. None on GPUs.
    """

    keys: torch.Tensor
    values: torch.Tensor
    key_order: kv_pb2.KeyOrder
    blocks: torch.Tensor | None = None

    @property
    def heads(self) -> int:
        return self.keys.shape[1]

    @property
    def block_size(self) -> int:
        return self.keys.shape[2]

    @property
    def head_size(self) -> int:
        return self.keys.shape[3]

    def has_whole_blocks(self, first: int, tokens: int) -> bool:
        """These tokens are in `whole_blocks`."""
        size = self.block_size
        return self.blocks is not None and first % size == 0 and tokens % size == 0

    def takes_blocks(self, key_order: int, block_tokens: int, first: int) -> bool:
        """A payload in this order can be written with `write_blocks`, from token `first` on."""
        return (
            self.blocks is not None
            and key_order == kv_pb2.KEY_ORDER_BLOCKS
            and block_tokens == self.block_size
            and first % block_tokens == 0
        )

    def read(self, block_ids: Sequence[int], first: int, tokens: int) -> torch.Tensor:
        """Copy tokens [first, first + tokens) of a sequence out of its blocks.

        Returns:
            [2 * heads * tokens * head_size], keys in `key_order`, then values
            [heads, tokens, head_size].
        """
        payload = self.keys.new_empty(2 * self.heads * tokens * self.head_size)
        keys, values = self.split(payload, self.heads, tokens, self.key_order)
        if self.blocks is None:
            slots = self._slots(block_ids, first, tokens)
            keys.copy_(self.keys[slots[0], :, slots[1]].transpose(0, 1))
            values.copy_(self.values[slots[0], :, slots[1]].transpose(0, 1))
            return payload
        for block, within, at in self._pieces(block_ids, first, tokens):
            keys[:, at].copy_(self.keys[block, :, within])
            values[:, at].copy_(self.values[block, :, within])
        return payload

    def whole_blocks(self, block_ids: Sequence[int]) -> list[memoryview]:
        """The memory of blocks, where there are `blocks`. One after the other they are
        [2 * heads * tokens * head_size] in KEY_ORDER_BLOCKS."""
        assert self.blocks is not None
        memory = self.blocks.view(torch.uint8).numpy()
        return [memory[block].data for block in block_ids]

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
        if self.blocks is None:
            slots = self._slots(block_ids, first, tokens)
            keys, values = keys[:, skip : skip + tokens], values[:, skip : skip + tokens]
            self.keys[slots[0], heads, slots[1]] = keys.transpose(0, 1)
            self.values[slots[0], heads, slots[1]] = values.transpose(0, 1)
            return
        for block, within, at in self._pieces(block_ids, first, tokens):
            source = slice(at.start + skip, at.stop + skip)
            self.keys[block, heads, within].copy_(keys[:, source])
            self.values[block, heads, within].copy_(values[:, source])

    def write_blocks(self, block_ids: Sequence[int], payload: torch.Tensor, skip: int) -> None:
        """Copy blocks of what `whole_blocks` of a layer of this shape were: as many as are given,
        after the first `skip`."""
        assert self.blocks is not None
        sources = payload.view(-1, self.blocks.shape[1])[skip : skip + len(block_ids)]
        for block, source in zip(block_ids, sources, strict=True):
            self.blocks[block].copy_(source)

    def split(
        self, payload: torch.Tensor, heads: int, tokens: int, key_order: int, block_tokens: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [heads, tokens, head_size] of what `read` returned or `whole_blocks`
        were: views of it, unless its order is that of blocks.

        block_tokens: the sender's block size, where the order is that of blocks.
        """
        if key_order == kv_pb2.KEY_ORDER_BLOCKS:
            return self._split_blocks(payload, heads, tokens, block_tokens)
        keys, values = payload.view(2, heads * tokens * self.head_size)
        if key_order == kv_pb2.KEY_ORDER_CHANNELS_TOKENS:
            keys = keys.view(heads, self.head_size, tokens).transpose(1, 2)
        elif key_order == kv_pb2.KEY_ORDER_TOKENS_CHANNELS:
            keys = keys.view(heads, tokens, self.head_size)
        else:
            raise UnknownLayout(f"key order {key_order} is not known")
        return keys, values.view(heads, tokens, self.head_size)

    def _split_blocks(
        self, payload: torch.Tensor, heads: int, tokens: int, block_tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        halves = payload.view(-1, heads, 2, block_tokens * self.head_size)
        keys = halves[:, :, 0].view(-1, heads, self.head_size, block_tokens).permute(1, 0, 3, 2)
        values = halves[:, :, 1].view(-1, heads, block_tokens, self.head_size).transpose(0, 1)
        shape = (heads, tokens, self.head_size)
        return keys.reshape(shape), values.reshape(shape)

    def _slots(self, block_ids: Sequence[int], first: int, tokens: int) -> torch.Tensor:
        """[2, tokens]: each token's block, and its slot in it. On a GPU one copy of many tokens
        takes one launch, and one of each block's would take thousands."""
        positions = torch.arange(first, first + tokens)
        blocks = torch.tensor(block_ids)[positions // self.block_size]
        return torch.stack([blocks, positions % self.block_size]).to(self.keys.device)

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
    return PagedLayer(keys, values, kv_pb2.KEY_ORDER_CHANNELS_TOKENS, cache.view(blocks, -1))


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


def frame_ranges(
    first: int, end: int, tokens_max: int, block_size: int
) -> Iterator[tuple[int, int]]:
    """Cut tokens [first, end) into frames of at most `tokens_max`: of whole blocks where they fit,
    but for what stands before the first block and behind the last."""
    while first < end:
        cut = min(first + tokens_max, end)
        whole = cut // block_size * block_size
        if first < whole:
            cut = whole if first % block_size == 0 else -(-first // block_size) * block_size
        yield first, cut
        first = cut
