"""Frames of a KV hand-off: a typed header and raw bytes, in one message.

A frame is `uint32 header bytes | uint32 header checksum | FrameHeader | zeros to a multiple of 16 |
payload`. The padding puts the payload on an address that tensors can be made of without copying it.
The header has a checksum of its own, for a damaged one would put a good payload in a wrong place.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import xxhash

from cluster.wire import kv_pb2

ALIGNMENT_BYTES = 16
_PREFIX = struct.Struct("<II")


class BadFrame(Exception):
    """A frame that does not parse, or whose payload is not what its header says."""


@dataclass(frozen=True, slots=True)
class Frame:
    header: kv_pb2.FrameHeader
    payload: memoryview


def digest_tokens(token_ids: Sequence[int]) -> bytes:
    """16 bytes that tell one prompt from another."""
    return xxhash.xxh3_128_digest(b"".join(t.to_bytes(4, "little") for t in token_ids))


def checksum(payload: bytes | memoryview) -> int:
    return xxhash.xxh3_64_intdigest(payload)


def encode_frame(header: kv_pb2.FrameHeader, payload: bytes | memoryview = b"") -> bytes:
    return b"".join((encode_header(header), payload))


def encode_header(header: kv_pb2.FrameHeader) -> bytes:
    """What comes before the payload."""
    encoded = header.SerializeToString()
    prefix = _PREFIX.pack(len(encoded), xxhash.xxh32_intdigest(encoded))
    padding = -(len(prefix) + len(encoded)) % ALIGNMENT_BYTES
    return b"".join((prefix, encoded, bytes(padding)))


def decode_frame(message: bytes) -> Frame:
    """Parse a frame and check its header and its payload against their checksums.

    Raises:
        BadFrame: it is truncated, malformed, or damaged.
    """
    if len(message) < _PREFIX.size:
        raise BadFrame(f"a frame of {len(message)} bytes has no header")
    header_bytes, header_checksum = _PREFIX.unpack_from(message)
    end = _PREFIX.size + header_bytes
    if end > len(message):
        raise BadFrame(f"a frame of {len(message)} bytes cannot hold a header of {header_bytes}")
    encoded = message[_PREFIX.size : end]
    if xxhash.xxh32_intdigest(encoded) != header_checksum:
        raise BadFrame("its header does not match its checksum")
    header = kv_pb2.FrameHeader()
    try:
        header.ParseFromString(encoded)
    except Exception as error:
        raise BadFrame(f"its header does not parse: {error}") from error
    if header.WhichOneof("kind") is None:
        raise BadFrame("its header is of no known kind")
    payload = memoryview(message)[min(len(message), end + -end % ALIGNMENT_BYTES) :]
    if header.WhichOneof("kind") == "kv" and checksum(payload) != header.kv.checksum:
        raise BadFrame(
            f"layer {header.kv.layer}, tokens from {header.kv.first_token}: the payload does not "
            "match its checksum"
        )
    return Frame(header, payload)
