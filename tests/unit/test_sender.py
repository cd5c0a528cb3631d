"""The sender against a real server: a transfer is delivered whole, or refused with the reason."""

from __future__ import annotations

import itertools
import os
import queue
import time
from collections.abc import AsyncIterator, Callable

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
    inbox_of,
    layer_payload,
    push_all,
    push_layer,
    wait_until,
)
from workers.kv.frames import checksum
from workers.kv.inbox import Inbox
from workers.kv.peer import RATE_ASSUMED_BYTES_S, RATE_SAMPLE_BYTES_MIN
from workers.kv.ranks import RankEndpoint, RankSettings
from workers.kv.sending import RanksSending
from workers.kv.service import KvInboxService
from workers.kv.transfer import GRPC, Sent
from workers.kv.undelivered import REASON_CHARACTERS_MAX, RanksUndelivered, RankUndelivered


def test_a_transfer_is_delivered_whole(receiver: Receiver, make_outbox: MakeOutbox) -> None:
    outbox, claim = make_outbox(), receiver.claim()
    push_all(outbox.open(receiver))
    assert outbox.result() == Sent("t", True, "", GEOMETRY.layers * LAYER_BYTES)
    assert claim.get(timeout=SOON_S).whole
    assert receiver.inbox.peek("t") == (TOKENS, b"digest", 0)
    taken = receiver.inbox.take("t")
    assert taken is not None
    for layer in range(GEOMETRY.layers):
        (frame,) = taken[layer]
        assert frame.payload == layer_payload(layer)
    assert receiver.inbox.bytes_held == 0
    outbox.assert_at_rest()


def test_a_payload_that_may_change_is_copied_at_once(
    receiver: Receiver, make_outbox: MakeOutbox
) -> None:
    outbox, claim = make_outbox(), receiver.claim()
    transfer = outbox.open(receiver)
    for layer in range(GEOMETRY.layers):
        cache = bytearray(layer_payload(layer))
        # As two blocks of the cache.
        parts = [memoryview(cache)[:48], memoryview(cache)[48:]]
        kv = kv_pb2.KvFrame(layer=layer, tokens=TOKENS, heads=GEOMETRY.heads)
        kv.checksum = checksum(*parts)
        transfer.push_copy(kv_pb2.FrameHeader(transfer_id="t", kv=kv), parts)
        cache[:] = bytes(len(cache))
    transfer.finish()
    assert outbox.result() == Sent("t", True, "", GEOMETRY.layers * LAYER_BYTES)
    assert claim.get(timeout=SOON_S).whole
    taken = receiver.inbox.take("t")
    assert taken is not None
    assert {layer: taken[layer][0].payload for layer in taken} == {
        layer: layer_payload(layer) for layer in range(GEOMETRY.layers)
    }
    outbox.assert_at_rest()


@pytest.mark.parametrize("fault", [None, "breaks off", "never comes"])
def test_ranks_send_one_transfer_in_parts(
    loop: Loop, start: Callable[[Receiver], Receiver], fault: str | None
) -> None:
    """Where the first part is delivered before the second one begins."""
    inbox = Inbox(GEOMETRY, HERE[1], 1 << 20, LONG_S, time.monotonic, shared=True)
    receiver = start(Receiver(loop, inbox=inbox))
    claim, send = receiver.claim(), receiver.send_kv()
    sending, undelivered = RanksSending(GEOMETRY.heads), queue.SimpleQueue[Sent]()
    told = RanksUndelivered(undelivered.put)
    settings = rank_settings(sending, told)
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
        if fault == "breaks off":
            assert undelivered.get(timeout=SOON_S).reason == settled.reason
        assert undelivered.empty()
        memory = inbox.take_shared("t")
        assert (memory is not None) == settled.whole and inbox.bytes_held == 0
        if memory is not None:
            read = {(kv.layer, kv.first_head): bytes(p[:2]) for kv, p in memory.told().read()}
            assert read == {cell: bytes(cell) for cell in itertools.product(range(3), range(2))}
            memory.close()
    finally:
        for rank in ranks:
            rank.close()
        told.close()


def rank_settings(sending: RanksSending, undelivered: RanksUndelivered) -> RankSettings:
    fingerprint = FINGERPRINT.SerializeToString()
    return RankSettings(
        *(os.getpid(), *SENDER, fingerprint, GEOMETRY, GEOMETRY.heads),
        *(kv_pb2.CODEC_NONE, 1 << 20, LONG_S, "127.0.0.1", GRPC, sending.path, undelivered.path),
    )


def test_what_a_rank_cannot_deliver_its_worker_hears_of(
    loop: Loop, start: Callable[[Receiver], Receiver]
) -> None:
    receiver = start(Receiver(loop, fingerprint=worker_pb2.Fingerprint(model="other")))
    undelivered: queue.SimpleQueue[Sent] = queue.SimpleQueue()
    told = RanksUndelivered(undelivered.put)
    rank = RankEndpoint(rank_settings(RanksSending(GEOMETRY.heads), told), 1)
    try:
        rank.sending(receiver.send_kv(), TOKENS, lambda: b"digest")
        sent = undelivered.get(timeout=SOON_S)
        assert (sent.transfer_id, sent.delivered) == ("t", False)
        assert "'tiny' at the sender and 'other' at the receiver" in sent.reason
    finally:
        rank.close()
        told.close()


def test_a_long_reason_is_told_in_part() -> None:
    undelivered: queue.SimpleQueue[Sent] = queue.SimpleQueue()
    worker = RanksUndelivered(undelivered.put)
    rank = RankUndelivered(worker.path)
    try:
        # As many bytes as there can be of a character.
        rank.tell(Sent("t", False, "\N{RUNNER}" * 1000, 0))
        assert undelivered.get(timeout=SOON_S).reason == "\N{RUNNER}" * REASON_CHARACTERS_MAX
    finally:
        rank.close()
        worker.close()


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


def test_a_peers_rate_is_measured_by_what_went_to_it(
    receiver: Receiver, make_outbox: MakeOutbox
) -> None:
    peer = make_outbox().sender.peer(receiver.send_kv())
    peer.measured(RATE_SAMPLE_BYTES_MIN - 1, 1.0)
    assert peer.rate_bytes_s == RATE_ASSUMED_BYTES_S
    for _ in range(50):
        peer.measured(1 << 20, 0.5)
    assert peer.rate_bytes_s == pytest.approx(2 << 20, rel=0.01)


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
