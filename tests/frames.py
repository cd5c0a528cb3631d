"""Frames as they go over the wire, one by itself."""

from __future__ import annotations

from cluster.wire import kv_pb2
from workers.kv.frames import encode_header, padding


def encode_frame(header: kv_pb2.FrameHeader, payload: bytes | memoryview = b"") -> bytes:
    return b"".join((encode_header(header, len(payload)), payload, padding(len(payload))))
