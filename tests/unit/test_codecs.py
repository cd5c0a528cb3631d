"""What a codec gives back differs from what it took by no more than it promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import HandoffConfig
from cluster.wire import kv_pb2
from tests.unit.inbox_frames import HERE, TOKENS, kv_frame, open_frame
from workers.kv.codecs import CODABLE, CODECS, FP8, GROUP_CHANNELS, INT8, GroupCodec, group_codec
from workers.kv.frames import Frame
from workers.kv.inbox import Inbox
from workers.kv.incoming import KvGeometry, TransferState

BOTH = pytest.mark.parametrize("codec", [FP8, INT8], ids=["fp8", "int8"])
ROUNDING = {torch.float32: 2**-20, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Of a number of each type, relative; float32's has room for the arithmetic between."""
FP8_RELATIVE = 2**-4
"""e4m3 has three bits behind the point."""
FP8_SMALLEST = 2**-10
"""Half its smallest step: in units of the scale, what small numbers may be off."""

SHAPES = st.tuples(
    st.integers(1, 3), st.integers(1, 5), st.sampled_from([1, 8, 63, 64, 65, 80, 128])
)


@st.composite
def kv(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of one shape and type, of sizes that differ widely between groups."""
    shape = draw(SHAPES)
    dtype = draw(st.sampled_from(CODABLE))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    low, high = (-10, 4) if dtype is torch.float16 else (-40, 30)
    parts = []
    for _ in range(2):
        exponents = torch.empty(shape).uniform_(low, high, generator=generator)
        kind = draw(st.sampled_from(["spread", "even", "constant", "zeros"]))
        part = torch.randn(shape, generator=generator)
        part = {
            "spread": part * 2**exponents,
            "even": part,
            "constant": torch.full(shape, draw(st.sampled_from([-3.0, 1e-3, 7.0]))),
            "zeros": torch.zeros(shape),
        }[kind]
        parts.append(part.to(dtype))
    return parts[0], parts[1]


def back(
    codec: GroupCodec, keys: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    heads, tokens, channels = keys.shape
    payload = codec.encode(keys, values)
    assert payload.dtype is torch.uint8
    assert payload.numel() == codec.payload_bytes(tokens, heads, channels)
    # What arrives is bytes, at an address that is aligned and no more.
    received = torch.frombuffer(bytearray(payload.numpy().tobytes()), dtype=torch.uint8)
    return codec.decode(received, heads, tokens, channels, keys.dtype)


def scales(codec: GroupCodec, part: torch.Tensor) -> torch.Tensor:
    """Each number's scale."""
    out = torch.empty(part.shape, dtype=torch.float32)
    for first in range(0, part.shape[-1], GROUP_CHANNELS):
        group = slice(first, first + GROUP_CHANNELS)
        largest = part[..., group].float().abs().amax(-1, keepdim=True)
        out[..., group] = largest / codec.largest
    return out


def rounded(bound: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """The bound, and what the result's own type rounds on top."""
    smallest = torch.finfo(part.dtype).smallest_normal
    rounding = ROUNDING[part.dtype] * (part.float().abs() + bound + smallest)
    return bound + rounding


@given(parts=kv())
def test_int8_is_off_by_no_more_than_half_a_scale(
    parts: tuple[torch.Tensor, torch.Tensor],
) -> None:
    for part, got in zip(parts, back(INT8, *parts), strict=True):
        assert got.dtype is part.dtype and got.shape == part.shape
        error = (got.float() - part.float()).abs()
        assert (error <= rounded(scales(INT8, part) / 2, part)).all()


@given(parts=kv())
def test_fp8_is_off_by_no_more_than_a_sixteenth(
    parts: tuple[torch.Tensor, torch.Tensor],
) -> None:
    for part, got in zip(parts, back(FP8, *parts), strict=True):
        assert got.dtype is part.dtype and got.shape == part.shape
        error = (got.float() - part.float()).abs()
        bound = torch.maximum(FP8_RELATIVE * part.float().abs(), FP8_SMALLEST * scales(FP8, part))
        assert (error <= rounded(bound, part)).all()


@BOTH
@pytest.mark.parametrize("dtype", CODABLE)
@pytest.mark.parametrize("number", [0.0, 1.0, -3.0, 448.0, 1e-30, 60000.0])
def test_one_number_alone_comes_back(codec: GroupCodec, dtype: torch.dtype, number: float) -> None:
    part = torch.full((2, 3, 64), number).to(dtype)
    for got in back(codec, part, part):
        assert torch.allclose(got, part, rtol=ROUNDING[dtype], atol=0)


@BOTH
def test_a_large_channel_costs_only_its_own_group(codec: GroupCodec) -> None:
    part = torch.randn(1, 2, 128)
    part[0, 0, 3] = 1e4
    keys, _ = back(codec, part, part)
    assert torch.allclose(keys[0, 0, 64:], part[0, 0, 64:], rtol=0.07, atol=0.02)
    assert torch.allclose(keys[0, 1], part[0, 1], rtol=0.07, atol=0.02)


@BOTH
def test_keys_and_values_of_any_strides(codec: GroupCodec) -> None:
    """The CPU cache has its keys' channels before their tokens."""
    keys, values = torch.randn(2, 64, 5).transpose(1, 2), torch.randn(5, 2, 64).transpose(0, 1)
    expected = codec.encode(keys.contiguous(), values.contiguous())
    assert torch.equal(codec.encode(keys, values), expected)


@BOTH
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_what_is_no_number_does_not_become_one(codec: GroupCodec, bad: float) -> None:
    part = torch.randn(1, 2, 128)
    part[0, 1, 70] = bad
    keys, _ = back(codec, part, part)
    assert not keys[0, 1, 64:].isfinite().any()
    assert keys[0, 1, :64].isfinite().all()
    assert keys[0, 0].isfinite().all()


@BOTH
@pytest.mark.parametrize(
    ("channels", "bytes_a_row"), [(1, 5), (64, 68), (65, 73), (80, 88), (128, 136)]
)
def test_payload_sizes(codec: GroupCodec, channels: int, bytes_a_row: int) -> None:
    assert codec.payload_bytes(7, 3, channels) == 2 * 7 * 3 * bytes_a_row


def test_every_codec_has_a_name_that_the_configuration_knows() -> None:
    (names,) = [
        field.annotation for name, field in HandoffConfig.model_fields.items() if name == "codec"
    ]
    assert set(CODECS) == set(names.__args__)  # type: ignore[union-attr]
    assert sorted(CODECS.values()) == sorted(kv_pb2.Codec.values())
    assert group_codec(CODECS["none"]) is None
    assert (group_codec(CODECS["fp8"]), group_codec(CODECS["int8"])) == (FP8, INT8)


# --- in the inbox ---------------------------------------------------------------------------------

WIDE = KvGeometry(layers=2, first_head=2, heads=2, head_size=64, element_bytes=2)
RAW_LAYER_BYTES = WIDE.frame_bytes(TOKENS, WIDE.heads)


def coded_frame(
    codec: GroupCodec, geometry: KvGeometry, layer: int, extra: int = 0, order: int = 0
) -> Frame:
    header = kv_frame(layer=layer, codec=codec.wire, key_order=order).header
    size_bytes = geometry.frame_bytes(TOKENS, geometry.heads, codec) + extra
    return Frame(header, memoryview(bytes(size_bytes)))


def inbox_of(geometry: KvGeometry) -> Inbox:
    inbox = Inbox(geometry, HERE, 1 << 20, 10.0, lambda: 0.0)
    assert inbox.receive(open_frame())[0] is TransferState.ARRIVING
    return inbox


@BOTH
def test_the_inbox_counts_the_bytes_that_came(codec: GroupCodec) -> None:
    inbox, settled = inbox_of(WIDE), []
    inbox.expect("t", ("prefill", "prefill-1"), settled.append)
    coded = WIDE.frame_bytes(TOKENS, WIDE.heads, codec)
    assert coded == 2 * TOKENS * WIDE.heads * 68 < RAW_LAYER_BYTES
    assert inbox.bytes_held == 2 * RAW_LAYER_BYTES
    inbox.receive(coded_frame(codec, WIDE, 0))
    assert inbox.bytes_held == RAW_LAYER_BYTES + coded
    assert inbox.receive(coded_frame(codec, WIDE, 1))[0] is TransferState.WHOLE
    assert inbox.bytes_held == settled[0].bytes == 2 * coded
    assert inbox.take("t") is not None
    assert inbox.bytes_held == 0


@BOTH
@pytest.mark.parametrize("end", ["fail", "drop"])
def test_a_coded_transfer_that_fails_midway_holds_nothing(codec: GroupCodec, end: str) -> None:
    inbox = inbox_of(WIDE)
    inbox.receive(coded_frame(codec, WIDE, 0))
    getattr(inbox, end)("t", "it broke")
    assert inbox.bytes_held == 0


@BOTH
@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        ({"extra": 1}, "bytes where"),
        ({"extra": -1}, "bytes where"),
        ({"order": 1}, "with key order 1"),
    ],
)
def test_a_wrong_coded_frame_fails_the_transfer(
    codec: GroupCodec, frame: dict[str, int], reason: str
) -> None:
    inbox = inbox_of(WIDE)
    state, said = inbox.receive(coded_frame(codec, WIDE, 0, **frame))
    assert state is TransferState.FAILED
    assert reason in said
    assert inbox.bytes_held == 0


@BOTH
def test_a_codec_that_makes_kv_larger_is_refused(codec: GroupCodec) -> None:
    """For then the budget that was reserved would not do."""
    bytes_already = KvGeometry(layers=2, first_head=2, heads=2, head_size=64, element_bytes=1)
    inbox = inbox_of(bytes_already)
    state, said = inbox.receive(coded_frame(codec, bytes_already, 0))
    assert state is TransferState.FAILED
    assert "larger" in said
