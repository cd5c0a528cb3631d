"""Copying KV out of one paged cache into another of a different shape moves every number right.

The expected places are written down here a second time, by index and without views.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.wire import kv_pb2
from workers.kv.layout import (
    PagedLayer,
    UnknownLayout,
    _gpu_layer,
    frame_ranges,
    paged_layer,
)

HEADS, HEAD_SIZE = 3, 4
UNTOUCHED = -1.0
TOKENS_CHANNELS = kv_pb2.KEY_ORDER_TOKENS_CHANNELS
CHANNELS_TOKENS = kv_pb2.KEY_ORDER_CHANNELS_TOKENS
BLOCKS = kv_pb2.KEY_ORDER_BLOCKS

Index = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """A cache's shape, and where in it one channel of a token's key (0) or value (1) lies."""

    name: str
    shape: Callable[[int, int, int], Index]
    """From blocks, block size and heads."""
    index: Callable[[int, int, int, int, int, int], Index]
    """From block, slot, head, channel, key or value, and block size."""
    on_gpu: bool = True

    def layer(self, cache: torch.Tensor, heads: int) -> PagedLayer:
        if self.on_gpu:
            return _gpu_layer(cache, heads, HEAD_SIZE)
        return paged_layer(cache, heads, HEAD_SIZE)

    def __repr__(self) -> str:
        return self.name


def cpu_index(block: int, slot: int, head: int, channel: int, which: int, size: int) -> Index:
    flat = size * HEAD_SIZE + slot * HEAD_SIZE + channel if which else channel * size + slot
    return block, head, *divmod(flat, 2 * HEAD_SIZE)


D = HEAD_SIZE
LAYOUTS = [
    Layout("cpu", lambda b, s, h: (b, h, s, 2 * D), cpu_index, on_gpu=False),
    Layout(
        "blocks-kv-slots-heads",
        lambda b, s, h: (b, 2, s, h, D),
        lambda b, s, h, c, kv, _: (b, kv, s, h, c),
    ),
    Layout(
        "kv-blocks-slots-heads",
        lambda b, s, h: (2, b, s, h, D),
        lambda b, s, h, c, kv, _: (kv, b, s, h, c),
    ),
    Layout(
        "blocks-kv-heads-slots",
        lambda b, s, h: (b, 2, h, s, D),
        lambda b, s, h, c, kv, _: (b, kv, h, s, c),
    ),
    Layout(
        "kv-blocks-heads-slots",
        lambda b, s, h: (2, b, h, s, D),
        lambda b, s, h, c, kv, _: (kv, b, h, s, c),
    ),
    Layout(
        "blocks-heads-slots",
        lambda b, s, h: (b, h, s, 2 * D),
        lambda b, s, h, c, kv, _: (b, h, s, kv * D + c),
    ),
    Layout(
        "blocks-slots-heads",
        lambda b, s, h: (b, s, h, 2 * D),
        lambda b, s, h, c, kv, _: (b, s, h, kv * D + c),
    ),
]
CPU, GPU = LAYOUTS[0], LAYOUTS[1]


@dataclass
class Sequence:
    """A sequence's KV in a cache, in blocks that lie in no order."""

    layout: Layout
    block_size: int
    heads: int
    cache: torch.Tensor
    block_ids: list[int]

    @classmethod
    def make(
        cls,
        layout: Layout,
        block_size: int,
        tokens: int,
        heads: int = HEADS,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> Sequence:
        needed = -(-tokens // block_size)
        # More than two blocks, or a shape would not tell blocks from keys and values.
        blocks = needed + 3
        block_ids = random.Random(seed).sample(range(blocks), needed)
        cache = torch.full(layout.shape(blocks, block_size, heads), UNTOUCHED, dtype=dtype)
        return cls(layout, block_size, heads, cache, block_ids)

    @property
    def layer(self) -> PagedLayer:
        return self.layout.layer(self.cache, self.heads)

    def cells(self, token: int, head: int) -> tuple[list[Index], list[Index]]:
        """Where a token's key and value lie."""
        block, slot = self.block_ids[token // self.block_size], token % self.block_size
        keys, values = (
            [self.layout.index(block, slot, head, c, kv, self.block_size) for c in range(D)]
            for kv in (0, 1)
        )
        return keys, values

    def fill(self, tokens: int) -> None:
        for token in range(tokens):
            for head in range(self.heads):
                for kv, cells in enumerate(self.cells(token, head)):
                    for channel, cell in enumerate(cells):
                        self.cache[cell] = number(token, head, channel, kv)


def number(token: int, head: int, channel: int, kv: int) -> float:
    """Different for each place, and exact in bfloat16 for short sequences."""
    return float(((token * HEADS + head) * D + channel) * 2 + kv)


def moved(
    source: Sequence,
    target: Sequence,
    read: range,
    write: range,
    first_head: int = 0,
) -> None:
    layer = source.layer
    payload = layer.read(source.block_ids, read.start, len(read))
    keys, values = target.layer.split(payload, source.heads, len(read), layer.key_order)
    target.layer.write(
        target.block_ids,
        write.start,
        len(write),
        keys,
        values,
        parts_first=read.start,
        heads=slice(first_head, first_head + source.heads),
    )


def assert_holds(target: Sequence, written: range, first_head: int = 0, heads: int = HEADS) -> None:
    """The range holds the source's numbers and nothing else was touched."""
    expected = torch.full_like(target.cache, UNTOUCHED)
    for token in written:
        for head in range(heads):
            for kv, cells in enumerate(target.cells(token, first_head + head)):
                for channel, cell in enumerate(cells):
                    expected[cell] = number(token, head, channel, kv)
    assert torch.equal(target.cache, expected)


@pytest.mark.parametrize("target_layout", LAYOUTS, ids=repr)
@pytest.mark.parametrize("source_layout", LAYOUTS, ids=repr)
def test_every_layout_to_every_other(source_layout: Layout, target_layout: Layout) -> None:
    source = Sequence.make(source_layout, block_size=8, tokens=21, seed=1)
    target = Sequence.make(target_layout, block_size=5, tokens=21, seed=2)
    source.fill(21)
    moved(source, target, range(21), range(21))
    assert_holds(target, range(21))


@pytest.mark.parametrize(("source_size", "target_size"), [(32, 128), (128, 32), (16, 16)])
@pytest.mark.parametrize("layout", [CPU, GPU], ids=repr)
def test_blocks_of_different_sizes(layout: Layout, source_size: int, target_size: int) -> None:
    source = Sequence.make(layout, source_size, tokens=150, seed=3)
    target = Sequence.make(layout, target_size, tokens=150, seed=4)
    source.fill(150)
    moved(source, target, range(150), range(150))
    assert_holds(target, range(150))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("source_layout", "target_layout"), [(CPU, GPU), (GPU, CPU)])
def test_types_of_numbers(source_layout: Layout, target_layout: Layout, dtype: torch.dtype) -> None:
    source = Sequence.make(source_layout, 4, tokens=10, dtype=dtype)
    target = Sequence.make(target_layout, 5, tokens=10, dtype=dtype)
    source.fill(10)
    assert source.layer.read(source.block_ids, 0, 10).dtype is dtype
    moved(source, target, range(10), range(10))
    assert_holds(target, range(10))


def test_bytes_that_went_over_the_wire_are_the_same_numbers() -> None:
    source = Sequence.make(CPU, 4, tokens=10, dtype=torch.bfloat16)
    target = Sequence.make(CPU, 32, tokens=10, dtype=torch.bfloat16)
    source.fill(10)
    payload = source.layer.read(source.block_ids, 0, 10)
    sent = bytes(payload.view(torch.uint8).numpy())
    assert len(sent) == 2 * HEADS * 10 * HEAD_SIZE * 2
    received = torch.frombuffer(bytearray(sent), dtype=torch.bfloat16)
    keys, values = target.layer.split(received, HEADS, 10, CHANNELS_TOKENS)
    target.layer.write(target.block_ids, 0, 10, keys, values, 0, slice(0, HEADS))
    assert_holds(target, range(10))


@pytest.mark.parametrize(
    ("layout", "key_order"), [(CPU, CHANNELS_TOKENS), (GPU, TOKENS_CHANNELS)], ids=repr
)
def test_a_payload_is_keys_in_the_layers_order_and_then_values(
    layout: Layout, key_order: int
) -> None:
    source = Sequence.make(layout, 4, tokens=10)
    source.fill(10)
    layer = source.layer
    assert layer.key_order == key_order
    assert (layer.heads, layer.block_size, layer.head_size) == (HEADS, 4, HEAD_SIZE)
    tokens, heads, channels = range(3, 9), range(HEADS), range(D)
    if key_order == CHANNELS_TOKENS:
        keys = [number(t, h, c, 0) for h in heads for c in channels for t in tokens]
    else:
        keys = [number(t, h, c, 0) for h in heads for t in tokens for c in channels]
    values = [number(t, h, c, 1) for h in heads for t in tokens for c in channels]
    assert layer.read(source.block_ids, 3, 6).tolist() == keys + values


@pytest.mark.parametrize("first_head", [0, 3, 5])
@pytest.mark.parametrize("layout", [CPU, GPU], ids=repr)
def test_a_range_of_heads(layout: Layout, first_head: int) -> None:
    source = Sequence.make(layout, 4, tokens=10)
    target = Sequence.make(layout, 6, tokens=10, heads=8)
    source.fill(10)
    moved(source, target, range(10), range(10), first_head)
    assert_holds(target, range(10), first_head)


def in_one(blocks: list[memoryview]) -> torch.Tensor:
    return torch.frombuffer(bytearray(b"".join(blocks)), dtype=torch.float32)


def test_whole_blocks_go_as_they_are() -> None:
    source = Sequence.make(CPU, 4, tokens=20, seed=1)
    target = Sequence.make(CPU, 4, tokens=20, seed=2)
    source.fill(20)
    assert source.layer.has_whole_blocks(4, 12)
    payload = in_one(source.layer.whole_blocks(source.block_ids[1:4]))
    assert target.layer.takes_blocks(BLOCKS, 4, first=8)
    target.layer.write_blocks(target.block_ids[2:4], payload, skip=1)
    assert_holds(target, range(8, 16))


@pytest.mark.parametrize(("first", "tokens"), [(2, 8), (4, 6)])
def test_parts_of_blocks_are_not_whole(first: int, tokens: int) -> None:
    assert not Sequence.make(CPU, 4, tokens=20).layer.has_whole_blocks(first, tokens)


@pytest.mark.parametrize(
    ("layout", "order", "block_tokens", "first"),
    [
        (GPU, BLOCKS, 4, 8),
        (CPU, CHANNELS_TOKENS, 4, 8),
        (CPU, BLOCKS, 8, 8),
        (CPU, BLOCKS, 4, 6),
    ],
)
def test_blocks_that_are_others_do_not_go_as_they_are(
    layout: Layout, order: int, block_tokens: int, first: int
) -> None:
    layer = Sequence.make(layout, 4, tokens=20).layer
    assert not layer.takes_blocks(order, block_tokens, first)


def test_only_vllms_cpu_attention_has_blocks_in_one_piece() -> None:
    for layout in LAYOUTS:
        layer = Sequence.make(layout, 4, tokens=20).layer
        assert layer.has_whole_blocks(4, 8) == (layout is CPU)


@pytest.mark.parametrize("target_layout", LAYOUTS, ids=repr)
def test_blocks_to_every_other_layout_and_size(target_layout: Layout) -> None:
    source = Sequence.make(CPU, 4, tokens=20, seed=1)
    target = Sequence.make(target_layout, 6, tokens=20, heads=HEADS + 2, seed=2)
    source.fill(20)
    payload = in_one(source.layer.whole_blocks(source.block_ids[1:4]))
    keys, values = target.layer.split(payload, HEADS, 12, BLOCKS, block_tokens=4)
    write = range(6, 15)
    target.layer.write(
        target.block_ids, 6, len(write), keys, values, parts_first=4, heads=slice(1, HEADS + 1)
    )
    assert_holds(target, write, first_head=1)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_part_of_any_sequence(data: st.DataObject) -> None:
    draw = data.draw
    sizes = st.sampled_from([1, 4, 7, 16])
    tokens = draw(st.integers(1, 30), "tokens")
    source = Sequence.make(draw(st.sampled_from(LAYOUTS)), draw(sizes), tokens, seed=5)
    heads = draw(st.sampled_from([HEADS, HEADS + 2]), "heads of the target")
    target = Sequence.make(draw(st.sampled_from(LAYOUTS)), draw(sizes), tokens, heads, seed=6)
    first_head = draw(st.integers(0, heads - HEADS), "first head")
    read = draw(ranges(range(tokens)), "read")
    write = draw(ranges(read), "write")
    source.fill(tokens)
    before = source.cache.clone()
    moved(source, target, read, write, first_head)
    assert_holds(target, write, first_head)
    assert torch.equal(source.cache, before)


def ranges(within: range) -> st.SearchStrategy[range]:
    """Ranges of at least one inside another."""
    bound = st.integers(within.start, within.stop)
    pairs = st.tuples(bound, bound).filter(lambda pair: pair[0] != pair[1])
    return pairs.map(lambda pair: range(min(pair), max(pair)))


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(1, 29), max_size=5), seed=st.integers(0, 99))
def test_frames_of_any_cut_and_order_give_the_whole(cuts: list[int], seed: int) -> None:
    source, target = Sequence.make(CPU, 8, tokens=30), Sequence.make(GPU, 16, tokens=30)
    source.fill(30)
    bounds = sorted({0, 30, *cuts})
    frames = [range(*pair) for pair in itertools.pairwise(bounds)]
    random.Random(seed).shuffle(frames)
    for frame in frames:
        moved(source, target, frame, frame)
    assert_holds(target, range(30))


@given(
    first=st.integers(0, 300),
    tokens=st.integers(0, 900),
    tokens_max=st.integers(1, 350),
    size=st.sampled_from([1, 16, 32, 128]),
)
def test_frames_hold_every_token_once_and_whole_blocks_where_they_fit(
    first: int, tokens: int, tokens_max: int, size: int
) -> None:
    frames = list(frame_ranges(first, first + tokens, tokens_max, size))
    assert [t for begin, end in frames for t in range(begin, end)] == [
        *range(first, first + tokens)
    ]
    assert all(0 < end - begin <= tokens_max for begin, end in frames)
    if tokens_max >= size:
        whole = [f for f in frames if f[0] % size == 0 and f[1] % size == 0]
        # All blocks but those that the sequence does not fill are in such frames.
        blocks = range(-(-first // size), (first + tokens) // size)
        assert sum(end - begin for begin, end in whole) == len(blocks) * size


def test_frames_are_no_more_than_needed() -> None:
    assert list(frame_ranges(0, 1000, 341, 128)) == [
        (0, 256),
        (256, 512),
        (512, 768),
        (768, 896),
        (896, 1000),
    ]
    assert list(frame_ranges(100, 600, 341, 128)) == [
        (100, 128),
        (128, 384),
        (384, 512),
        (512, 600),
    ]


@pytest.mark.parametrize(
    "shape",
    [
        (9, HEADS, 8, D),
        (9, HEADS + 1, 8, 2 * D),
        (9, 2, 8, HEADS, D),
        (9, HEADS * 8 * 2 * D),
    ],
)
def test_an_unknown_cpu_cache_is_refused_with_its_shape(shape: Index) -> None:
    with pytest.raises(UnknownLayout, match=str(list(shape)).replace("[", r"\[")):
        paged_layer(torch.zeros(shape), HEADS, HEAD_SIZE)


@pytest.mark.parametrize(
    "shape",
    [
        (9, 2, 8, HEADS, D + 1),
        (9, 2, 8, HEADS + 1, D),
        (9, 5, 8, HEADS, D),
        (9, 8, 7, 2 * D),
        (9, HEADS, 8, D),
        (9, 8, D),
    ],
)
def test_an_unknown_gpu_cache_is_refused_with_its_shape(shape: Index) -> None:
    with pytest.raises(UnknownLayout, match=str(list(shape)).replace("[", r"\[")):
        _gpu_layer(torch.zeros(shape), HEADS, HEAD_SIZE)


def test_an_unknown_key_order_is_refused() -> None:
    target = Sequence.make(CPU, 4, tokens=4)
    payload = torch.zeros(2 * HEADS * 4 * HEAD_SIZE)
    with pytest.raises(UnknownLayout, match="key order 7"):
        target.layer.split(payload, HEADS, 4, 7)
