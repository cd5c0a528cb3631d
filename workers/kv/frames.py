"""Frames of a KV hand-off: a typed header and raw bytes. A message holds one or several.

A frame is `uint32 header bytes | uint32 checksum | uint64 payload bytes | FrameHeader | zeros |
payload | zeros`, both runs of zeros to a multiple of 16. The padding puts each payload on an
address that tensors can be made of without copying it. Sizes and header have a checksum of their
own, for damaged ones would put a good payload in a wrong place.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import xxhash

from cluster.wire import kv_pb2

ALIGNMENT_BYTES = 16
_PREFIX = struct.Struct("<IIQ")
_SIZES = struct.Struct("<IQ")


class BadFrame(Exception):
    """A frame that does not parse, or whose payload is not what its header says."""


@dataclass(frozen=True, slots=True)
class Frame:
    header: kv_pb2.FrameHeader
    payload: memoryview


def digest_tokens(token_ids: Sequence[int]) -> bytes:
    """16 bytes that tell one prompt from another."""
    return xxhash.xxh3_128_digest(b"".join(t.to_bytes(4, "little") for t in token_ids))


def checksum(*parts: bytes | memoryview) -> int:
    """Of a payload, in one part or several."""
    state = xxhash.xxh3_64()
    for part in parts:
        state.update(part)
    return state.intdigest()


def encode_header(header: kv_pb2.FrameHeader, payload_bytes: int) -> bytes:
    """What comes before the payload."""
    encoded = header.SerializeToString()
    check = _header_checksum(len(encoded), payload_bytes, encoded)
    prefix = _PREFIX.pack(len(encoded), check, payload_bytes)
    return b"".join((prefix, encoded, padding(len(encoded))))


def padding(size_bytes: int) -> bytes:
    """What comes after a header or a payload of this size, so that the next begins aligned."""
    return bytes(-size_bytes % ALIGNMENT_BYTES)


def decode_frames(message: bytes) -> Iterator[Frame]:
    """Parse a message's frames, and check each when it is its turn.

    Raises:
        BadFrame: one is truncated, malformed, or damaged.
    """
    rest = memoryview(message)
    if not rest:
        raise BadFrame("an empty message")
    while rest:
        frame, size_bytes = _decode_frame(rest)
        yield frame
        rest = rest[size_bytes:]


def decode_header(encoded: bytes | memoryview) -> tuple[kv_pb2.FrameHeader, int]:
    """The header of a frame that begins with it, and the bytes of the payload.

    Raises:
        BadFrame: it is truncated, malformed, or damaged.
    """
    header, payload_bytes, _ = _decode_header(memoryview(encoded))
    return header, payload_bytes


def check_payload(header: kv_pb2.FrameHeader, payload: memoryview) -> None:
    """Raises BadFrame if the payload is not what the header says."""
    if header.WhichOneof("kind") == "kv" and checksum(payload) != header.kv.checksum:
        raise BadFrame(
            f"layer {header.kv.layer}, tokens from {header.kv.first_token}: the payload does not "
            "match its checksum"
        )


def _decode_frame(message: memoryview) -> tuple[Frame, int]:
    """A message's first frame, and the bytes it takes."""
    header, payload_bytes, first = _decode_header(message)
    payload = message[first : first + payload_bytes]
    if len(payload) != payload_bytes:
        raise BadFrame(f"a frame of {len(message)} bytes cannot hold {payload_bytes} of payload")
    check_payload(header, payload)
    return Frame(header, payload), first + payload_bytes + -payload_bytes % ALIGNMENT_BYTES


def _decode_header(message: memoryview) -> tuple[kv_pb2.FrameHeader, int, int]:
    """A header, its payload's bytes, and where they begin."""
    if len(message) < _PREFIX.size:
        raise BadFrame(f"a frame of {len(message)} bytes has no header")
    header_bytes, header_checksum, payload_bytes = _PREFIX.unpack_from(message)
    end = _PREFIX.size + header_bytes
    if end > len(message):
        raise BadFrame(f"a frame of {len(message)} bytes cannot hold a header of {header_bytes}")
    encoded = bytes(message[_PREFIX.size : end])
    if _header_checksum(header_bytes, payload_bytes, encoded) != header_checksum:
        raise BadFrame("its header does not match its checksum")
    header = kv_pb2.FrameHeader()
    try:
        header.ParseFromString(encoded)
    except Exception as error:
        raise BadFrame(f"its header does not parse: {error}") from error
    if header.WhichOneof("kind") is None:
        raise BadFrame("its header is of no known kind")
    return header, payload_bytes, end + -end % ALIGNMENT_BYTES


def _header_checksum(header_bytes: int, payload_bytes: int, encoded: bytes) -> int:
    return xxhash.xxh32_intdigest(_SIZES.pack(header_bytes, payload_bytes) + encoded)
