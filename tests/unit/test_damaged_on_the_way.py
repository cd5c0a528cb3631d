"""What is damaged between sender and receiver fails at both ends, with the reason."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from unittest import mock

import pytest

from cluster.wire import kv_pb2
from tests.frames import encode_frame
from tests.unit.ends import (
    SOON_S,
    Frames,
    Loop,
    MakeOutbox,
    Receiver,
    push_all,
)
from workers.kv.frames import checksum

ANY_S: float = mock.ANY


async def flip_payload(frames: Frames) -> Frames:
    async for i, frame in numbered(frames):
        yield frame[:-1] + bytes([frame[-1] ^ 1]) if i == 2 else frame


async def flip_header(frames: Frames) -> Frames:
    async for i, frame in numbered(frames):
        yield frame[:20] + bytes([frame[20] ^ 1]) + frame[21:] if i == 2 else frame


async def truncate(frames: Frames) -> Frames:
    async for i, frame in numbered(frames):
        yield frame[:-16] if i == 2 else frame


async def duplicate(frames: Frames) -> Frames:
    async for frame in frames:
        yield frame
        yield frame


async def duplicate_one(frames: Frames) -> Frames:
    async for i, frame in numbered(frames):
        yield frame
        if i == 2:
            yield frame


async def lose(frames: Frames) -> Frames:
    async for i, frame in numbered(frames):
        if i != 2:
            yield frame


async def open_late(frames: Frames) -> Frames:
    opened = await anext(frames)
    yield TOO_EARLY
    yield opened
    async for frame in frames:
        yield frame


async def mix_up(frames: Frames) -> Frames:
    """A frame of another transfer gets into the stream."""
    async for i, frame in numbered(frames):
        yield OF_ANOTHER if i == 2 else frame


async def reverse(frames: Frames) -> Frames:
    yield await anext(frames)
    rest = [frame async for frame in frames]
    for frame in reversed(rest):
        yield frame


async def numbered(frames: Frames) -> AsyncIterator[tuple[int, bytes]]:
    i = 0
    async for frame in frames:
        yield i, frame
        i += 1


TOO_EARLY = encode_frame(
    kv_pb2.FrameHeader(transfer_id="t", kv=kv_pb2.KvFrame(tokens=1, checksum=checksum(b"")))
)
OF_ANOTHER = encode_frame(
    kv_pb2.FrameHeader(transfer_id="another", abort=kv_pb2.AbortTransfer(reason="not yours"))
)


def through(loop: Loop, wire: Callable[[Frames], Frames]) -> Receiver:
    receiver = Receiver(loop)
    receiver.on_the_wire = wire  # type: ignore[method-assign]
    return receiver


@pytest.mark.parametrize(
    ("wire", "reason"),
    [
        (flip_payload, "layer 1, tokens from 0: the payload does not match its checksum"),
        (flip_header, "its header does not match its checksum"),
        (truncate, "a frame of 288 bytes cannot hold 256 of payload"),
        (duplicate, "the transfer was opened twice"),
        (duplicate_one, "layer 1, tokens from 0 arrived twice"),
        (lose, "the sender's stream ended before the KV was whole"),
        (open_late, "a frame arrived before the transfer was opened"),
        (mix_up, "a frame of another in the stream of t"),
    ],
)
def test_a_damaged_stream_fails_at_both_ends_with_the_reason(
    loop: Loop,
    start: Callable[[Receiver], Receiver],
    make_outbox: MakeOutbox,
    wire: Callable[[Frames], Frames],
    reason: str,
) -> None:
    receiver = start(through(loop, wire))
    outbox, claim = make_outbox(), receiver.claim()
    push_all(outbox.open(receiver))
    sent = outbox.result()
    assert (sent.delivered, sent.reason) == (False, reason)
    settled = claim.get(timeout=SOON_S)
    assert (settled.whole, settled.reason) == (False, reason)
    assert claim.empty()
    assert receiver.inbox.take("t") is None
    assert receiver.inbox.bytes_held == 0
    outbox.assert_at_rest()


def test_kv_frames_out_of_order_are_no_damage(
    loop: Loop, start: Callable[[Receiver], Receiver], make_outbox: MakeOutbox
) -> None:
    receiver = start(through(loop, reverse))
    outbox = make_outbox()
    push_all(outbox.open(receiver))
    assert outbox.result().delivered
    assert receiver.inbox.take("t") is not None
