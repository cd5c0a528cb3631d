"""An inbox, and the frames that come to it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cluster.wire import kv_pb2
from workers.kv.frames import Frame
from workers.kv.inbox import Inbox
from workers.kv.incoming import KvGeometry, TransferState

GEOMETRY = KvGeometry(layers=2, first_head=2, heads=2, head_size=4, element_bytes=2)
HEADS = range(GEOMETRY.first_head, GEOMETRY.first_head + GEOMETRY.heads)
HERE = "here-1"
SENDER = ("prefill", "prefill-1")
OTHER_SENDER = ("prefill", "prefill-0")
MAX_IDLE_S = 10.0
TOKENS = 6
WHOLE_BYTES = TOKENS * GEOMETRY.bytes_per_token


@dataclass
class Clock:
    now_s: float = 1000.0

    def __call__(self) -> float:
        return self.now_s


def make_inbox(
    max_bytes: int = 10 * WHOLE_BYTES, clock: Callable[[], float] | None = None
) -> Inbox:
    return Inbox(GEOMETRY, HERE, max_bytes, MAX_IDLE_S, clock or Clock())


def open_frame(
    transfer_id: str = "t",
    tokens: int = TOKENS,
    sender: tuple[str, str] = SENDER,
    to_incarnation: str = HERE,
    expects_held: bool = False,
) -> Frame:
    opened = kv_pb2.OpenTransfer(
        tokens=tokens,
        prompt_digest=b"digest",
        from_worker_id=sender[0],
        from_incarnation=sender[1],
        to_incarnation=to_incarnation,
        expects_held=expects_held,
    )
    return Frame(kv_pb2.FrameHeader(transfer_id=transfer_id, open=opened), memoryview(b""))


def kv_frame(
    transfer_id: str = "t",
    layer: int = 0,
    first_token: int = 0,
    tokens: int = TOKENS,
    first_head: int = HEADS.start,
    heads: int = len(HEADS),
    extra_bytes: int = 0,
    **fields: int,
) -> Frame:
    kv = kv_pb2.KvFrame(
        layer=layer,
        first_token=first_token,
        tokens=tokens,
        first_head=first_head,
        heads=heads,
        **fields,
    )
    payload = bytes(GEOMETRY.frame_bytes(tokens, heads) + extra_bytes)
    return Frame(kv_pb2.FrameHeader(transfer_id=transfer_id, kv=kv), memoryview(payload))


def abort_frame(transfer_id: str = "t") -> Frame:
    abort = kv_pb2.AbortTransfer(reason="preempted")
    return Frame(kv_pb2.FrameHeader(transfer_id=transfer_id, abort=abort), memoryview(b""))


def kv_frames(
    transfer_id: str = "t",
    tokens: int = TOKENS,
    tokens_a_frame: int = TOKENS,
    heads_a_frame: int = len(HEADS),
) -> list[Frame]:
    """All of a transfer's KV, cut evenly."""
    return [
        kv_frame(
            transfer_id, layer, first, min(tokens_a_frame, tokens - first), head, heads_a_frame
        )
        for layer in range(GEOMETRY.layers)
        for first in range(0, tokens, tokens_a_frame)
        for head in HEADS[::heads_a_frame]
    ]


def cells(frames: Sequence[Frame]) -> list[tuple[int, int, int]]:
    """Every (layer, token, head) that some frames bring."""
    return [
        (kv.layer, token, head)
        for kv in (frame.header.kv for frame in frames)
        for token in range(kv.first_token, kv.first_token + kv.tokens)
        for head in range(kv.first_head, kv.first_head + kv.heads)
    ]


ALL_CELLS = sorted(itertools.product(range(GEOMETRY.layers), range(TOKENS), HEADS))


def receive_all(inbox: Inbox, *frames: Frame) -> tuple[TransferState, str]:
    result = TransferState.ARRIVING, ""
    for frame in frames:
        result = inbox.receive(frame)
    return result


def waiting_for_room(inbox: Inbox) -> int:
    return len(inbox._waiting)


def assert_failed(inbox: Inbox, transfer_id: str = "t") -> None:
    """The transfer failed, nothing of it can be adopted, and it holds no bytes."""
    state, _ = inbox.receive(kv_frame(transfer_id))
    assert state is TransferState.FAILED
    assert inbox.peek(transfer_id) is None
    assert inbox.take(transfer_id) is None
    assert inbox.bytes_held == 0
