"""A sender waits for room at its receiver and on its own stage, and for no longer than it may."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from cluster.handoff_failure import HandoffFailure
from tests.unit.ends import (
    GEOMETRY,
    LAYER_BYTES,
    LONG_S,
    SOON_S,
    Loop,
    MakeOutbox,
    Receiver,
    Silent,
    inbox_of,
    push_all,
    push_layer,
)
from tests.unit.inbox_frames import waiting_for_room
from workers.kv.transfer import ENGINE_WAIT_MAX_S, STALLED_S, Sent

LARGE = memoryview(bytes(16 << 20))
"""More than a stream carries to a receiver that reads nothing."""

WRONG_SIZE = f"a payload of {len(LARGE)} bytes where {LAYER_BYTES} belong"


# --- at the receiver --------------------------------------------------------------------------


def waits_for_room(receiver: Receiver) -> None:
    until_s = time.monotonic() + SOON_S
    while not waiting_for_room(receiver.inbox):
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
    assert sent.delivered
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
    settled = claim.get(timeout=SOON_S)
    assert (settled.reason, settled.failure) == (reason, HandoffFailure.NO_ROOM)
    assert (waiting_for_room(inbox), inbox.bytes_held) == (0, GEOMETRY.layers * LAYER_BYTES)
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
    assert waiting_for_room(full.inbox) == 0
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


# --- on the stage -----------------------------------------------------------------------------


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
    assert outbox.result() == Sent("moves", False, WRONG_SIZE, len(LARGE))
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
