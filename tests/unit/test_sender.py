"""The sender against a real server: a transfer is delivered whole, or ends with a reason, in time,
holding nothing."""

from __future__ import annotations

import asyncio
import itertools
import os
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any
from unittest import mock

import pytest

from cluster.wire import kv_pb2, worker_pb2
from tests.unit.ends import (
    FINGERPRINT,
    GEOMETRY,
    HERE,
    LAYER_BYTES,
    LONG_S,
    SENDER,
    SOON_S,
    TOKENS,
    Context,
    Frames,
    Loop,
    MakeOutbox,
    Receiver,
    layer_payload,
    push_all,
    push_layer,
    wait_until,
)
from workers.kv.frames import checksum, encode_frame
from workers.kv.inbox import Inbox
from workers.kv.peer import RATE_ASSUMED_BYTES_S, RATE_SAMPLE_BYTES_MIN
from workers.kv.ranks import RankEndpoint, RankSettings
from workers.kv.sending import RanksSending
from workers.kv.service import KvInboxService
from workers.kv.transfer import ENGINE_WAIT_MAX_S, GRPC, STALLED_S, Sent

LARGE = memoryview(bytes(16 << 20))
"""More than a stream carries to a receiver that reads nothing."""

ANY_S: float = mock.ANY
WRONG_SIZE = f"a payload of {len(LARGE)} bytes where {LAYER_BYTES} belong"


class Silent(Receiver):
    """Answers nothing until it is let go."""

    def __init__(self, loop: Loop, method: str) -> None:
        super().__init__(loop)
        self._method = method
        self._go = asyncio.Event()
        self.asked: queue.Queue[str] = queue.Queue()

    async def Pair(  # noqa: N802 - gRPC's name
        self, request: kv_pb2.PairRequest, context: Context
    ) -> kv_pb2.PairReply:
        await self._wait("Pair")
        return await super().Pair(request, context)

    async def push(self, frames: Frames, context: Context) -> AsyncIterator[bytes]:
        await self._wait("Push")
        result = kv_pb2.TransferResult(reason="at last")
        yield kv_pb2.PushReply(result=result).SerializeToString()

    async def _wait(self, method: str) -> None:
        self.asked.put(method)
        if method == self._method:
            await self._go.wait()

    def let_go(self) -> None:
        self._loop.soon(self._go.set)


# --- delivered --------------------------------------------------------------------------------


def test_a_transfer_is_delivered_whole(receiver: Receiver, make_outbox: MakeOutbox) -> None:
    outbox, claim = make_outbox(), receiver.claim()
    push_all(outbox.open(receiver))
    assert outbox.result() == Sent("t", True, "", GEOMETRY.layers * LAYER_BYTES, ANY_S)
    assert claim.get(timeout=SOON_S).whole
    assert receiver.inbox.peek("t") == (TOKENS, b"digest", 0)
    taken = receiver.inbox.take("t")
    assert taken is not None
    for layer in range(GEOMETRY.layers):
        (frame,) = taken[layer]
        assert frame.payload == layer_payload(layer)
    assert receiver.inbox.bytes_held == 0
    outbox.assert_at_rest()


@pytest.mark.parametrize("fault", [None, "breaks off", "never comes"])
def test_ranks_send_one_transfer_in_parts(
    loop: Loop, start: Callable[[Receiver], Receiver], fault: str | None
) -> None:
    """Where the first part is delivered before the second one begins."""
    inbox = Inbox(GEOMETRY, HERE[1], 1 << 20, LONG_S, time.monotonic, shared=True)
    receiver = start(Receiver(loop, inbox=inbox))
    claim, send = receiver.claim(), receiver.send_kv()
    fingerprint = FINGERPRINT.SerializeToString()
    sending = RanksSending(GEOMETRY.heads)
    settings = RankSettings(
        *(os.getpid(), *SENDER, fingerprint, GEOMETRY, GEOMETRY.heads),
        *(kv_pb2.CODEC_NONE, 1 << 20, LONG_S, "127.0.0.1", GRPC, sending.path),
    )
    ranks = [RankEndpoint(settings, rank) for rank in range(settings.ranks)]
    try:
        for rank in ranks:
            if fault == "never comes" and rank is ranks[1]:
                break
            transfer = rank.sending(send, TOKENS, lambda: b"digest")
            assert transfer is not None and rank.sending(send, TOKENS, bytes) is transfer
            for layer in range(GEOMETRY.layers):
                payload = memoryview(bytes([layer, rank.geometry.first_head]) * (LAYER_BYTES // 4))
                kv = kv_pb2.KvFrame(layer=layer, tokens=TOKENS, checksum=checksum(payload))
                kv.first_head, kv.heads = rank.geometry.first_head, rank.geometry.heads
                transfer.push(kv_pb2.FrameHeader(transfer_id="t", kv=kv), payload)
                assert sending.total()[0] == 1
                if fault == "breaks off" and rank is ranks[1]:
                    break
            rank.finish("t")
            assert transfer.done.wait(SOON_S)
            assert inbox.peek("t") is None or rank is ranks[1]
            wait_until("the rank holds nothing", lambda: sending.total()[:2] == (0, 0))
            assert sending.total().peers == 1 + (rank is ranks[1])
        if fault == "never comes":
            assert claim.empty() and inbox.transfers_held == 1
            inbox.fail("t", "the time has passed")
        settled = claim.get(timeout=SOON_S)
        assert settled.whole == (fault is None), settled.reason
        memory = inbox.take_shared("t")
        assert (memory is not None) == settled.whole and inbox.bytes_held == 0
        if memory is not None:
            read = {(kv.layer, kv.first_head): bytes(p[:2]) for kv, p in memory.told().read()}
            assert read == {cell: bytes(cell) for cell in itertools.product(range(3), range(2))}
            memory.close()
    finally:
        for rank in ranks:
            rank.close()


def test_transfers_at_once_stay_apart(receiver: Receiver, make_outbox: MakeOutbox) -> None:
    outbox = make_outbox(max_staged_bytes=LAYER_BYTES * 2)
    ids = [f"t{i}" for i in range(12)]
    transfers = [outbox.open(receiver, transfer_id) for transfer_id in ids]
    for layer in range(GEOMETRY.layers):
        for transfer in transfers:
            push_layer(transfer, layer)
    for transfer in transfers:
        transfer.finish()
    results = [outbox.result() for _ in ids]
    assert {(sent.transfer_id, sent.delivered, sent.reason) for sent in results} == {
        (transfer_id, True, "") for transfer_id in ids
    }
    assert all(receiver.inbox.take(transfer_id) is not None for transfer_id in ids)
    outbox.assert_at_rest()


def test_a_frame_larger_than_the_whole_bound_goes_alone(
    receiver: Receiver, make_outbox: MakeOutbox
) -> None:
    outbox = make_outbox(max_staged_bytes=1)
    push_all(outbox.open(receiver))
    assert outbox.result().delivered
    outbox.assert_at_rest()


def test_what_is_pushed_after_the_end_is_forgotten(
    receiver: Receiver, make_outbox: MakeOutbox
) -> None:
    outbox = make_outbox()
    transfer = outbox.open(receiver)
    push_all(transfer)
    assert outbox.result().delivered
    push_layer(transfer, 0)
    transfer.finish()
    transfer.abort("too late")
    assert receiver.inbox.take("t") is not None
    outbox.assert_at_rest()


# --- refused ----------------------------------------------------------------------------------


def test_a_refused_pairing_names_both_values(
    loop: Loop, start: Callable[[Receiver], Receiver], make_outbox: MakeOutbox
) -> None:
    other = worker_pb2.Fingerprint(model="tiny", dtype="bfloat16", layers=4)
    receiver = start(Receiver(loop, fingerprint=other))
    outbox = make_outbox()
    push_all(outbox.open(receiver))
    sent = outbox.result()
    assert not sent.delivered
    assert sent.reason == (
        "KV of prefill would be wrong on decode: "
        "dtype is 'float32' at the sender and 'bfloat16' at the receiver; "
        "layers is 3 at the sender and 4 at the receiver"
    )
    assert (receiver.pushes, receiver.inbox.transfers_held) == (0, 0)
    outbox.assert_at_rest()


def test_a_refused_pairing_is_asked_again_and_an_accepted_one_is_not(
    receiver: Receiver, make_outbox: MakeOutbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    answers = iter([kv_pb2.PairReply(reason="not yet"), kv_pb2.PairReply(accepted=True)])

    async def pair(request: kv_pb2.PairRequest, context: Context) -> kv_pb2.PairReply:
        asked.append(request.worker_id)
        return next(answers)

    receiver.stop()
    monkeypatch.setattr(receiver, "Pair", pair)
    receiver.start()
    outbox = make_outbox()
    for transfer_id, delivered in (("a", False), ("b", True), ("c", True)):
        push_all(outbox.open(receiver, transfer_id))
        assert outbox.result().delivered is delivered
    assert asked == ["prefill", "prefill"]


def test_a_receiver_of_another_incarnation_refuses_to_pair(
    receiver: Receiver, make_outbox: MakeOutbox
) -> None:
    outbox = make_outbox()
    send = receiver.send_kv()
    send.incarnation = "decode-0"
    push_all(outbox.sender.open(send, TOKENS, b"digest"))
    sent = outbox.result()
    assert not sent.delivered
    assert sent.reason == "asked for decode/decode-0, this is decode/decode-1"
    outbox.assert_at_rest()


def test_a_receiver_that_restarted_since_it_paired_refuses_the_transfer(
    loop: Loop, start: Callable[[Receiver], Receiver], make_outbox: MakeOutbox
) -> None:
    old = Receiver(loop, incarnation="decode-0")
    old.start()
    outbox = make_outbox()
    push_all(outbox.open(old, "before"))
    assert outbox.result().delivered
    new = Receiver(loop)
    # Both listen for a moment, so that the sender's channel always finds one.
    new.start(old.port)
    try:
        old.stop()
        push_all(outbox.open(old, "after"))
        sent = outbox.result()
        assert not sent.delivered
        assert sent.reason == "it is meant for incarnation decode-0, this is decode-1"
        assert new.inbox.bytes_held == 0
        assert new.inbox.take("after") is None
    finally:
        new.stop()


def test_an_inbox_that_is_too_small_refuses_with_the_reason(
    loop: Loop, start: Callable[[Receiver], Receiver], make_outbox: MakeOutbox
) -> None:
    receiver = start(Receiver(loop, inbox=inbox_of(1)))
    outbox = make_outbox()
    push_all(outbox.open(receiver))
    sent = outbox.result()
    assert not sent.delivered
    assert "the inbox is too small" in sent.reason
    outbox.assert_at_rest()


# --- room at the receiver ---------------------------------------------------------------------


def inbox_of(size_bytes: int) -> Inbox:
    return Inbox(GEOMETRY, HERE[1], size_bytes, LONG_S, time.monotonic)


def waits_for_room(receiver: Receiver) -> None:
    until_s = time.monotonic() + SOON_S
    while not receiver.inbox.transfers_waiting:
        assert time.monotonic() < until_s
        time.sleep(0.005)


@pytest.fixture
def full(loop: Loop, start: Callable[[Receiver], Receiver], make_outbox: MakeOutbox) -> Receiver:
    """Its inbox has room for one transfer, and that is there."""
    receiver = start(Receiver(loop, inbox=inbox_of(GEOMETRY.layers * LAYER_BYTES)))
    outbox = make_outbox()
    push_all(outbox.open(receiver, "first"))
    assert outbox.result().delivered
    outbox.sender.close()
    return receiver


def test_a_transfer_waits_for_room_and_sends_nothing_before(
    full: Receiver, make_outbox: MakeOutbox
) -> None:
    outbox = make_outbox()
    frames_before = full.frames_seen.qsize()
    push_all(outbox.open(full))
    waits_for_room(full)
    assert outbox.sender.sending.staged_bytes > GEOMETRY.layers * LAYER_BYTES
    assert (full.frames_seen.qsize(), outbox.sent.qsize()) == (frames_before, 0)
    assert full.inbox.take("first") is not None
    sent = outbox.result()
    assert (sent.delivered, sent.credit_wait_s > 0) == (True, True)
    assert full.inbox.take("t") is not None
    outbox.assert_at_rest()


def test_a_wait_for_room_ends_at_its_deadline(
    loop: Loop, start: Callable[[Receiver], Receiver], make_outbox: MakeOutbox
) -> None:
    inbox = inbox_of(GEOMETRY.layers * LAYER_BYTES)
    receiver = start(Receiver(loop, inbox=inbox, credit_deadline_s=0.2))
    outbox, claim = make_outbox(), receiver.claim("second")
    push_all(outbox.open(receiver, "first"))
    assert outbox.result().delivered
    push_all(outbox.open(receiver, "second"))
    sent = outbox.result()
    reason = "the inbox had no room for it within 0.2 s"
    assert (sent.delivered, sent.reason) == (False, reason)
    assert claim.get(timeout=SOON_S).reason == reason
    assert (inbox.transfers_waiting, inbox.bytes_held) == (0, GEOMETRY.layers * LAYER_BYTES)
    outbox.assert_at_rest()


@pytest.mark.parametrize("how", ["aborted", "disconnected"])
def test_who_leaves_while_it_waits_for_room_waits_no_more(
    full: Receiver, make_outbox: MakeOutbox, how: str
) -> None:
    outbox, claim = make_outbox(), full.claim()
    transfer = outbox.open(full)
    waits_for_room(full)
    if how == "aborted":
        transfer.abort("the prefill was aborted")
    else:
        outbox.sender.peer(full.send_kv()).channel.close()
    assert not outbox.result().delivered
    assert not claim.get(timeout=SOON_S).whole
    assert full.inbox.transfers_waiting == 0
    outbox.assert_at_rest()


def test_a_transfer_that_is_dropped_while_it_waits_for_room_ends(
    full: Receiver, make_outbox: MakeOutbox
) -> None:
    outbox = make_outbox()
    push_all(outbox.open(full))
    waits_for_room(full)
    full.inbox.drop("t", "the client left")
    sent = outbox.result()
    assert (sent.delivered, sent.reason) == (False, "the client left")
    outbox.assert_at_rest()


# --- damaged on the way -----------------------------------------------------------------------


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


# --- broken off -------------------------------------------------------------------------------


def test_a_receiver_that_stops_midway_ends_the_transfer(
    receiver: Receiver, make_outbox: MakeOutbox
) -> None:
    outbox, claim = make_outbox(), receiver.claim()
    transfer = outbox.open(receiver)
    push_layer(transfer, 0)
    push_layer(transfer, 1)
    assert receiver.frames_seen.get(timeout=SOON_S) == 0
    receiver.stop()
    sent = outbox.result()
    assert not sent.delivered
    assert sent.reason.startswith(f"127.0.0.1:{receiver.port}: ")
    assert transfer.done.is_set()
    push_layer(transfer, 2)
    # Nobody called `finish`, and still no thread waits for it.
    outbox.assert_at_rest()
    assert not claim.get(timeout=SOON_S).whole
    assert receiver.inbox.bytes_held == 0


def test_a_sender_that_gives_up_midway_fails_the_transfer(
    receiver: Receiver, make_outbox: MakeOutbox
) -> None:
    outbox, claim = make_outbox(), receiver.claim()
    transfer = outbox.open(receiver)
    push_layer(transfer, 0)
    assert transfer.credit.wait(SOON_S)
    transfer.abort("the prefill was aborted")
    push_layer(transfer, 1)
    sent = outbox.result()
    reason = "the sender gave up: the prefill was aborted"
    assert sent == Sent("t", False, reason, LAYER_BYTES, ANY_S)
    settled = claim.get(timeout=SOON_S)
    assert (settled.whole, settled.reason) == (False, reason)
    assert receiver.inbox.bytes_held == 0
    outbox.assert_at_rest()


def test_a_sender_that_finishes_too_early_fails_the_transfer(
    receiver: Receiver, make_outbox: MakeOutbox
) -> None:
    outbox, claim = make_outbox(), receiver.claim()
    transfer = outbox.open(receiver)
    push_layer(transfer, 0)
    transfer.finish()
    sent = outbox.result()
    reason = "the sender's stream ended before the KV was whole"
    assert (sent.delivered, sent.reason) == (False, reason)
    assert claim.get(timeout=SOON_S).reason == reason
    assert receiver.inbox.bytes_held == 0


def test_a_sender_whose_connection_is_gone_fails_the_transfer(
    receiver: Receiver, make_outbox: MakeOutbox
) -> None:
    outbox, claim = make_outbox(), receiver.claim()
    transfer = outbox.open(receiver)
    push_layer(transfer, 0)
    push_layer(transfer, 1)
    assert receiver.frames_seen.get(timeout=SOON_S) == 0
    outbox.sender.peer(receiver.send_kv()).channel.close()
    settled = claim.get(timeout=SOON_S)
    assert not settled.whole
    assert settled.reason == "the sender's stream ended before the KV was whole"
    assert receiver.inbox.bytes_held == 0
    assert not outbox.result().delivered
    outbox.assert_at_rest()


def test_a_stopping_worker_tells_its_receivers(receiver: Receiver, make_outbox: MakeOutbox) -> None:
    outbox, claim = make_outbox(), receiver.claim()
    transfer = outbox.open(receiver)
    push_layer(transfer, 0)
    assert transfer.credit.wait(SOON_S)
    outbox.sender.close()
    assert claim.get(timeout=SOON_S).reason == "the sender gave up: the worker is stopping"
    assert not outbox.result().delivered
    outbox.assert_at_rest()


def test_nobody_listens(receiver: Receiver, make_outbox: MakeOutbox) -> None:
    receiver.stop()
    outbox = make_outbox()
    push_all(outbox.open(receiver))
    sent = outbox.result()
    assert not sent.delivered
    assert "UNAVAILABLE" in sent.reason
    outbox.assert_at_rest()


# --- never answered ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["Pair", "Push"])
def test_a_receiver_that_never_answers_costs_no_more_than_the_deadline(
    loop: Loop, start: Callable[[Receiver], Receiver], make_outbox: MakeOutbox, method: str
) -> None:
    receiver = start(Silent(loop, method))
    outbox = make_outbox(deadline_s=1.0)
    began_s = time.monotonic()
    for i in range(20):
        push_all(outbox.open(receiver, f"t{i}"))
    results = [outbox.result() for _ in range(20)]
    # Not one after the other.
    assert time.monotonic() - began_s < 10
    assert not any(sent.delivered for sent in results)
    assert all("DEADLINE_EXCEEDED" in sent.reason for sent in results)
    outbox.assert_at_rest()


def test_a_prefill_that_never_ends_costs_no_more_than_the_deadline(
    receiver: Receiver, make_outbox: MakeOutbox
) -> None:
    outbox, claim = make_outbox(deadline_s=0.4), receiver.claim()
    transfer = outbox.open(receiver)
    push_layer(transfer, 0)
    assert not outbox.result().delivered
    assert not claim.get(timeout=SOON_S).whole
    outbox.assert_at_rest()


def test_a_full_stage_gives_up_who_does_not_move_and_others_get_on(
    loop: Loop, start: Callable[[Receiver], Receiver], make_outbox: MakeOutbox
) -> None:
    """A silent receiver's frames make room for others' before its deadline."""
    silent, other = start(Silent(loop, "Push")), start(Receiver(loop))
    outbox = make_outbox(max_staged_bytes=len(LARGE) * 3 // 2)
    push_layer(outbox.open(silent, "stands"), 0, LARGE)
    assert outbox.sender.sending.staged_bytes > len(LARGE)
    transfer = outbox.open(other, "moves")
    push_layer(transfer, 0, LARGE)
    sent = outbox.result()
    assert (sent.transfer_id, sent.delivered) == ("stands", False)
    assert sent.reason == f"the sender gave up: nothing of it was sent for {STALLED_S:g} s"
    # It has its room; that the receiver wants no such frame is another matter.
    assert outbox.result() == Sent("moves", False, WRONG_SIZE, len(LARGE), ANY_S)
    outbox.assert_at_rest()


def test_one_transfer_holds_the_engine_up_only_for_so_long(
    receiver: Receiver, make_outbox: MakeOutbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox, claim = make_outbox(max_staged_bytes=100), receiver.claim()
    asked_s: list[float] = []

    def no_room(size_bytes: int, wait_s: float, ended: threading.Event) -> bool:
        asked_s.append(wait_s)
        return len(asked_s) < 3

    monkeypatch.setattr(outbox.sender, "stage", no_room)
    monkeypatch.setattr(outbox.sender, "unstage", lambda size_bytes: None)
    transfer = outbox.open(receiver)
    for layer in range(GEOMETRY.layers):
        push_layer(transfer, layer)
    assert ENGINE_WAIT_MAX_S >= asked_s[0] >= asked_s[1] >= asked_s[2]
    reason = "the sender gave up: no room for more within 100 bytes that wait to be sent"
    sent = outbox.result()
    assert (sent.delivered, sent.reason) == (False, reason)
    assert not claim.get(timeout=SOON_S).whole
    assert receiver.inbox.bytes_held == 0


def test_the_stage_has_room_when_a_frame_is_sent(make_outbox: MakeOutbox) -> None:
    sender = make_outbox(max_staged_bytes=100).sender
    never = threading.Event()
    assert sender.stage(60, 0, never)
    assert sender.stage(40, 0, never)
    assert not sender.stage(1, 0, never)
    through = queue.Queue[bool]()
    thread = threading.Thread(target=lambda: through.put(sender.stage(50, LONG_S, never)))
    thread.start()
    sender.unstage(40)
    assert through.empty()
    sender.unstage(60)
    assert through.get(timeout=SOON_S)
    assert sender.sending.staged_bytes == 50
    sender.unstage(50)
    thread.join(SOON_S)


def test_a_push_stops_waiting_for_room_when_its_transfer_has_ended(
    loop: Loop,
    start: Callable[[Receiver], Receiver],
    make_outbox: MakeOutbox,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    silent, later = Silent(loop, "Push"), Silent(loop, "Push")
    start(silent), start(later)
    outbox = make_outbox(max_staged_bytes=len(LARGE) * 3 // 2)
    push_layer(outbox.open(silent, "holds the room"), 0, LARGE)
    waiting = threading.Event()
    stage = outbox.sender.stage

    def watched(*args: Any) -> bool:
        waiting.set()
        return stage(*args)

    monkeypatch.setattr(outbox.sender, "stage", watched)
    transfer = outbox.open(later, "ends")
    engine = threading.Thread(target=push_layer, args=(transfer, 0, LARGE))
    engine.start()
    assert waiting.wait(SOON_S)
    later.let_go()
    assert outbox.result() == Sent("ends", False, "at last", 0)
    engine.join(SOON_S)
    assert not engine.is_alive()


def test_a_stopping_worker_does_not_wait_for_silent_receivers(
    loop: Loop, start: Callable[[Receiver], Receiver], make_outbox: MakeOutbox
) -> None:
    receiver = start(Silent(loop, "Push"))
    outbox = make_outbox()
    for i in range(5):
        push_layer(outbox.open(receiver, f"t{i}"), 0)
    assert [receiver.asked.get(timeout=SOON_S) for _ in range(5)]
    began_s = time.monotonic()
    outbox.sender.close(timeout_s=0.2)
    assert time.monotonic() - began_s < 0.7
    assert not any(outbox.result().delivered for _ in range(5))
    outbox.assert_at_rest()


def test_a_peers_rate_is_measured_by_what_went_to_it(
    receiver: Receiver, make_outbox: MakeOutbox
) -> None:
    peer = make_outbox().sender.peer(receiver.send_kv())
    peer.measured(RATE_SAMPLE_BYTES_MIN - 1, 1.0)
    assert peer.rate_bytes_s == RATE_ASSUMED_BYTES_S
    for _ in range(50):
        peer.measured(1 << 20, 0.5)
    assert peer.rate_bytes_s == pytest.approx(2 << 20, rel=0.01)


def test_small_frames_that_wait_share_a_message(
    loop: Loop, start: Callable[[Receiver], Receiver], make_outbox: MakeOutbox
) -> None:
    messages: list[int] = []

    class Counting(Receiver):
        async def push(self, frames: Frames, context: Context) -> AsyncIterator[bytes]:
            async def counted() -> Frames:
                async for message in frames:
                    messages.append(len(message))
                    yield message

            async for reply in KvInboxService.push(self, counted(), context):
                yield reply

    receiver = start(Counting(loop))
    outbox = make_outbox()
    # All of it waits before the receiver is paired with.
    with outbox.sender._peers_lock:
        transfer = outbox.open(receiver)
        push_all(transfer)
    assert outbox.result().delivered
    # What opens the transfer, and the rest.
    assert len(messages) == 2
