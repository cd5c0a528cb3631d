"""A transfer that breaks off, or that nobody answers, ends in time and holds nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

from cluster.wire import worker_pb2
from tests.unit.ends import (
    LAYER_BYTES,
    LONG_S,
    SOON_S,
    Loop,
    MakeOutbox,
    Receiver,
    Silent,
    push_all,
    push_layer,
    wait_until,
)
from workers.kv import peer as peer_module
from workers.kv.sender import PEER_IDLE_S
from workers.kv.transfer import Sent

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
    assert sent == Sent("t", False, reason, LAYER_BYTES)
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


def test_a_receiver_that_drops_it_ends_the_stream_of_a_silent_sender(
    loop: Loop, receiver: Receiver, make_outbox: MakeOutbox
) -> None:
    outbox, claim = make_outbox(), receiver.claim()
    transfer = outbox.open(receiver)
    push_layer(transfer, 0)
    assert transfer.credit.wait(SOON_S)
    wait_until("a layer has come", lambda: bool(receiver.inbox._transfers["t"].frames))
    receiver.inbox.drop("t", "the router gave it up")
    # Nothing more is sent, and nobody calls `finish`.
    assert outbox.result() == Sent("t", False, "the router gave it up", LAYER_BYTES)
    assert not claim.get(timeout=SOON_S).whole
    outbox.assert_at_rest()
    wait_until("nobody reads from it", lambda: "kv-take" not in loop.call(task_names()))


async def task_names() -> list[str]:
    return [task.get_name() for task in asyncio.all_tasks()]


def test_nobody_listens(receiver: Receiver, make_outbox: MakeOutbox) -> None:
    receiver.stop()
    outbox = make_outbox()
    push_all(outbox.open(receiver))
    sent = outbox.result()
    assert not sent.delivered
    assert "UNAVAILABLE" in sent.reason
    outbox.assert_at_rest()


# --- not needed any more ----------------------------------------------------------------------


def test_of_a_worker_that_has_started_anew_only_the_newest_start_is_kept(
    loop: Loop, start: Callable[[Receiver], Receiver], make_outbox: MakeOutbox
) -> None:
    former, newest = start(Receiver(loop)), start(Receiver(loop, incarnation="decode-2"))
    outbox = make_outbox()
    transfer = outbox.open(former, "before")
    push_layer(transfer, 0)
    assert transfer.credit.wait(SOON_S)
    peer = outbox.sender.peer(former.send_kv())
    push_all(outbox.open(newest))
    assert outbox.result().delivered
    # What is on its way ends first.
    assert outbox.sender.sending.peers == 2
    push_layer(transfer, 1)
    push_layer(transfer, 2)
    transfer.finish()
    assert outbox.result().delivered
    assert outbox.sender.sending.peers == 1
    with pytest.raises(ValueError, match="closed"):
        peer.push(iter(()))
    push_all(outbox.open(newest, "after"))
    assert outbox.result().delivered
    outbox.assert_at_rest()


def test_a_peer_that_nothing_is_sent_to_is_not_kept_for_ever(
    receiver: Receiver, make_outbox: MakeOutbox
) -> None:
    outbox = make_outbox()
    gone = worker_pb2.SendKv(worker_id="gone", address="127.0.0.1:1", incarnation="gone-1")
    peer = outbox.sender.peer(gone)
    push_all(outbox.open(receiver, "a"))
    assert outbox.result().delivered
    assert outbox.sender.sending.peers == 2
    peer.asked_for_at_s -= PEER_IDLE_S
    push_all(outbox.open(receiver, "b"))
    assert outbox.result().delivered
    assert outbox.sender.sending.peers == 1


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


@pytest.mark.parametrize("retry_after_s", [LONG_S, 0.0])
def test_a_silent_receiver_is_not_waited_for_by_each_transfer(
    loop: Loop,
    start: Callable[[Receiver], Receiver],
    make_outbox: MakeOutbox,
    monkeypatch: pytest.MonkeyPatch,
    retry_after_s: float,
) -> None:
    monkeypatch.setattr(peer_module, "PAIR_DEADLINE_S", 0.2)
    monkeypatch.setattr(peer_module, "RETRY_AFTER_S", retry_after_s)
    receiver = start(Silent(loop, "Pair"))
    outbox = make_outbox()
    push_all(outbox.open(receiver, "a"))
    assert "DEADLINE_EXCEEDED" in outbox.result().reason
    receiver.let_go()
    monkeypatch.setattr(peer_module, "PAIR_DEADLINE_S", LONG_S)
    push_all(outbox.open(receiver, "b"))
    sent = outbox.result()
    if retry_after_s:
        assert not sent.delivered
        assert sent.reason.startswith(f"127.0.0.1:{receiver.port} did not answer within ")
    else:
        assert sent.reason == "at last"
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


def test_a_stopping_worker_does_not_wait_for_silent_receivers(
    loop: Loop, start: Callable[[Receiver], Receiver], make_outbox: MakeOutbox
) -> None:
    receiver = start(Silent(loop, "Push"))
    outbox = make_outbox()
    for i in range(5):
        push_layer(outbox.open(receiver, f"t{i}"), 0)
    assert [receiver.asked.get(timeout=SOON_S) for _ in range(5)]
    began_s = time.monotonic()
    outbox.sender.close(timeout_s=0.5)
    assert time.monotonic() - began_s < 2.0
    assert not any(outbox.result().delivered for _ in range(5))
    outbox.assert_at_rest()
