"""Frames: what is sent comes back, and what was damaged on the way is never taken for good."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.wire import kv_pb2
from tests.frames import encode_frame
from workers.kv.frames import (
    ALIGNMENT_BYTES,
    BadFrame,
    Frame,
    checksum,
    decode_frames,
    digest_tokens,
)


def decode_frame(message: bytes) -> Frame:
    (frame,) = decode_frames(message)
    return frame


TOKEN_IDS = st.lists(st.integers(0, 2**32 - 1), max_size=20)


def kv_header(payload: bytes, transfer_id: str = "t", **fields: int) -> kv_pb2.FrameHeader:
    kv = kv_pb2.KvFrame(checksum=checksum(payload), **fields)
    return kv_pb2.FrameHeader(transfer_id=transfer_id, kv=kv)


HEADERS = st.builds(
    kv_header,
    payload=st.just(b""),
    transfer_id=st.text(max_size=40),
    layer=st.integers(0, 2**32 - 1),
    first_token=st.integers(0, 2**64 - 1),
    tokens=st.integers(0, 2**64 - 1),
    first_head=st.integers(0, 2**32 - 1),
    heads=st.integers(0, 2**32 - 1),
    key_order=st.integers(0, 1),
)


@given(header=HEADERS, payload=st.binary(max_size=200))
def test_a_kv_frame_comes_back_as_it_was_sent(header: kv_pb2.FrameHeader, payload: bytes) -> None:
    header.kv.checksum = checksum(payload)
    frame = decode_frame(encode_frame(header, payload))
    assert frame.header == header
    assert bytes(frame.payload) == payload


@pytest.mark.parametrize(
    "header",
    [
        kv_pb2.FrameHeader(transfer_id="t", open=kv_pb2.OpenTransfer(tokens=7)),
        kv_pb2.FrameHeader(transfer_id="t", abort=kv_pb2.AbortTransfer(reason="enough")),
    ],
    ids=["open", "abort"],
)
def test_frames_without_a_payload_come_back(header: kv_pb2.FrameHeader) -> None:
    frame = decode_frame(encode_frame(header))
    assert frame.header == header
    assert len(frame.payload) == 0


@given(transfer_id=st.text(alphabet="x", max_size=40))
def test_the_payload_is_aligned_and_not_copied(transfer_id: str) -> None:
    payload = bytes(range(64))
    message = encode_frame(kv_header(payload, transfer_id), payload)
    (header_bytes,) = struct.unpack_from("<I", message)
    start = len(message) - len(payload)
    assert start % ALIGNMENT_BYTES == 0
    assert start - ALIGNMENT_BYTES < struct.calcsize("<IIQ") + header_bytes <= start

    frame = decode_frame(message)
    assert bytes(frame.payload) == payload
    assert frame.payload.obj is message


@given(payloads=st.lists(st.binary(max_size=100), min_size=1, max_size=5))
def test_frames_that_share_a_message_come_back_in_order(payloads: list[bytes]) -> None:
    headers = [kv_header(payload, layer=i) for i, payload in enumerate(payloads)]
    encoded = map(encode_frame, headers, payloads)
    frames = list(decode_frames(b"".join(encoded)))
    assert [frame.header for frame in frames] == headers
    assert [bytes(frame.payload) for frame in frames] == payloads


def test_frames_before_a_damaged_one_are_good() -> None:
    message = DAMAGE_MESSAGE + DAMAGE_MESSAGE[:-1] + b"x"
    frames = decode_frames(message)
    assert next(frames).header == DAMAGE_HEADER
    with pytest.raises(BadFrame):
        next(frames)


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
def test_a_tensor_over_the_payload_starts_at_an_aligned_address() -> None:
    payload = bytes(4096)
    message = encode_frame(kv_header(payload, "some-transfer"), payload)
    tensor = torch.frombuffer(decode_frame(message).payload, dtype=torch.float32)
    assert tensor.data_ptr() % ALIGNMENT_BYTES == 0


DAMAGE_PAYLOAD = bytes(range(1, 33))  # no padding behind it
DAMAGE_HEADER = kv_header(
    DAMAGE_PAYLOAD, "transfer", layer=1, first_token=16, tokens=4, heads=2, key_order=1
)
DAMAGE_MESSAGE = encode_frame(DAMAGE_HEADER, DAMAGE_PAYLOAD)


def is_refused_or_unchanged(message: bytes) -> bool:
    try:
        frame = decode_frame(message)
    except BadFrame:
        return True
    return frame.header == DAMAGE_HEADER and bytes(frame.payload) == DAMAGE_PAYLOAD


def test_no_flipped_bit_goes_unseen() -> None:
    for bit in range(8 * len(DAMAGE_MESSAGE)):
        damaged = bytearray(DAMAGE_MESSAGE)
        damaged[bit // 8] ^= 1 << bit % 8
        assert is_refused_or_unchanged(bytes(damaged)), f"bit {bit}"


def test_no_truncation_goes_unseen() -> None:
    for size_bytes in range(len(DAMAGE_MESSAGE)):
        with pytest.raises(BadFrame):
            decode_frame(DAMAGE_MESSAGE[:size_bytes])


@given(
    header=HEADERS,
    payload=st.binary(max_size=100),
    bit=st.integers(min_value=0),
    cut=st.integers(min_value=0),
)
def test_damage_to_any_frame_is_seen_or_harmless(
    header: kv_pb2.FrameHeader, payload: bytes, bit: int, cut: int
) -> None:
    header.kv.checksum = checksum(payload)
    message = encode_frame(header, payload)
    flipped = bytearray(message)
    flipped[bit // 8 % len(message)] ^= 1 << bit % 8
    for damaged in (bytes(flipped), message[: cut % len(message)]):
        try:
            frame = decode_frame(damaged)
        except BadFrame:
            continue
        assert frame.header == header
        assert bytes(frame.payload) == payload


@given(message=st.binary(max_size=100))
def test_noise_is_no_frame(message: bytes) -> None:
    with pytest.raises(BadFrame):
        decode_frame(message)


def test_swapped_payloads_are_seen() -> None:
    one, other = b"a" * 16, b"b" * 16
    with pytest.raises(BadFrame, match=r"layer 3, tokens from 5"):
        decode_frame(encode_frame(kv_header(one, layer=3, first_token=5), other))


def test_a_header_of_no_kind_is_refused() -> None:
    with pytest.raises(BadFrame, match="no known kind"):
        decode_frame(encode_frame(kv_pb2.FrameHeader(transfer_id="t")))


def test_a_header_longer_than_the_frame_is_refused() -> None:
    message = bytearray(DAMAGE_MESSAGE)
    struct.pack_into("<I", message, 0, len(message))
    with pytest.raises(BadFrame, match="cannot hold a header"):
        decode_frame(bytes(message))


@given(one=TOKEN_IDS, other=TOKEN_IDS)
def test_different_prompts_have_different_digests(one: list[int], other: list[int]) -> None:
    assert len(digest_tokens(one)) == 16
    assert (digest_tokens(one) == digest_tokens(other)) == (one == other)


def test_a_digest_depends_on_order_and_length_alone() -> None:
    assert digest_tokens([1, 2]) == digest_tokens((1, 2))
    assert digest_tokens([1, 2]) != digest_tokens([2, 1])
    assert digest_tokens([0]) != digest_tokens([0, 0])
    assert digest_tokens([0, 1]) != digest_tokens([256])
