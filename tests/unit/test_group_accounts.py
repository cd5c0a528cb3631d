"""What a group has taken on is not sent yet: until it is, it counts against the stage's bound, and
the rate that is measured is that of the sending."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from cluster.wire import kv_pb2
from tests.unit.ends import FINGERPRINT, LONG_S, SENDER, Loop, Outbox, wait_until
from tests.unit.group_peer import (
    GEOMETRY,
    LAYER_BYTES,
    TOKENS,
    GroupReceiver,
    push_layer,
    send_kv,
)
from workers.kv.frames import Frame, decode_header
from workers.kv.group import IncomingGroup, JoinGroup, OutgoingGroup
from workers.kv.inbox import Inbox
from workers.kv.peer import RATE_ASSUMED_BYTES_S, RATE_WEIGHT
from workers.kv.sender import Identity, Sender
from workers.kv.transfer import STALLED_S, Sent, Transfer

NAME = "slow"
RATE_BYTES_S = 20e6
WHOLE_BYTES = GEOMETRY.layers * LAYER_BYTES
WAIT_S = 60.0


class Link(OutgoingGroup):
    """Takes everything on at once, sends it in order at a rate, and straight into the inbox."""

    transport = NAME
    batch_bytes_min = WHOLE_BYTES

    def __init__(self, inbox: Inbox, rate_bytes_s: float) -> None:
        self.broken = ""
        self.moved_at_s = 0.0
        self.has_taken = threading.Event()
        self.is_up = threading.Event()
        self.is_up.set()
        self._inbox = inbox
        self._rate_bytes_s = rate_bytes_s
        self._free_at_s = 0.0

    def send(self, headers: Sequence[bytes], payloads: Sequence[memoryview]) -> Iterator[int]:
        ahead = iter(payloads)
        posted = []
        for encoded in headers:
            header, size_bytes = decode_header(encoded)
            self._free_at_s = max(self._free_at_s, time.monotonic())
            self._free_at_s += size_bytes / self._rate_bytes_s
            if size_bytes:
                posted.append((Frame(header, next(ahead)), self._free_at_s))
        self.has_taken.set()
        return self._sent(posted)

    def _sent(self, posted: list[tuple[Frame, float]]) -> Iterator[int]:
        for frame, sent_at_s in posted:
            time.sleep(max(0.0, sent_at_s - time.monotonic()))
            assert self.is_up.wait(LONG_S)
            self._inbox.receive(frame)
            yield len(frame.payload)

    def close(self, reason: str) -> None:
        self.broken = reason


class Slow:
    name = NAME

    def __init__(self, link: Link) -> None:
        self._link = link

    def join(self, call: JoinGroup, member: kv_pb2.GroupMember) -> OutgoingGroup:
        return self._link

    def accept(self, *_: Any) -> IncomingGroup:
        raise AssertionError("only the sending end is here")

    def close(self) -> None:
        """Nothing to close."""


class Ends:
    def __init__(self, receiver: GroupReceiver, max_staged_bytes: int) -> None:
        self.receiver = receiver
        self.link = Link(receiver.inbox, RATE_BYTES_S)
        receiver.transports[NAME] = Slow(self.link)
        sent: queue.Queue[Sent] = queue.Queue()
        identity = Identity(*SENDER, FINGERPRINT)
        self.sender = Sender(
            *(identity, max_staged_bytes, LONG_S, sent.put, [Slow(self.link)], NAME)
        )
        self.outbox = Outbox(self.sender, sent, set(threading.enumerate()))

    def open(self, transfer_id: str = "t") -> Transfer:
        self.receiver.claim(transfer_id)
        send = send_kv(self.receiver.port, transfer_id)
        transfer = self.sender.open(send, TOKENS, b"digest")
        assert transfer.credit.wait(WAIT_S)
        return transfer

    def result(self) -> Sent:
        return self.outbox.sent.get(timeout=WAIT_S)


Make = Callable[[int], Ends]


@pytest.fixture
def make(loop: Loop, start: Callable[[GroupReceiver], GroupReceiver]) -> Iterator[Make]:
    made: list[Ends] = []

    def make(max_staged_bytes: int) -> Ends:
        made.append(Ends(start(GroupReceiver(loop)), max_staged_bytes))
        return made[-1]

    yield make
    for ends in made:
        ends.link.is_up.set()
        ends.sender.close(timeout_s=0)


def newest_rate_bytes_s(ends: Ends) -> float:
    measured = ends.sender.peer(send_kv(ends.receiver.port)).rate_bytes_s
    return (measured - (1 - RATE_WEIGHT) * RATE_ASSUMED_BYTES_S) / RATE_WEIGHT


@pytest.mark.parametrize("pause_s", [0.0, 0.01], ids=["in-one-go", "layer-by-layer"])
def test_the_rate_measured_is_that_of_the_link(make: Make, pause_s: float) -> None:
    ends = make(1 << 30)
    transfer = ends.open()
    for layer in range(GEOMETRY.layers):
        push_layer(transfer, layer)
        time.sleep(pause_s)
    transfer.finish()
    assert ends.result().delivered
    # A busy machine makes it slower, never faster.
    assert newest_rate_bytes_s(ends) < 1.1 * RATE_BYTES_S


def test_what_was_not_sent_any_more_does_not_make_the_link_look_fast(make: Make) -> None:
    ends = make(1 << 30)
    transfer = ends.open()
    half = GEOMETRY.layers // 2
    for layer in range(half):
        push_layer(transfer, layer)
    wait_until("they are sent", lambda: ends.sender.sending.staged_bytes == 0)
    ends.link.is_up.clear()
    for layer in range(half, GEOMETRY.layers):
        push_layer(transfer, layer)
    ends.receiver.inbox.drop("t", "the router gave it up")
    assert not ends.result().delivered
    assert newest_rate_bytes_s(ends) < 1.1 * RATE_BYTES_S


def test_what_is_under_way_counts_against_the_bound(make: Make) -> None:
    ends = make(1 << 30)
    ends.link.is_up.clear()
    transfer = ends.open()
    for layer in range(GEOMETRY.layers):
        push_layer(transfer, layer)
    wait_until("the link has taken it on", ends.link.has_taken.is_set)
    assert ends.sender.sending.staged_bytes >= WHOLE_BYTES
    ends.link.is_up.set()
    transfer.finish()
    assert ends.result().delivered
    assert ends.sender.sending.staged_bytes == 0


def test_a_transfer_behind_another_is_not_taken_for_one_that_stands(make: Make) -> None:
    ends = make(2 * WHOLE_BYTES + GEOMETRY.layers * 1024)
    first, behind, third = (ends.open(name) for name in ("first", "behind", "third"))
    for transfer in (first, behind):
        for layer in range(GEOMETRY.layers):
            push_layer(transfer, layer)
        transfer.finish()
    layers = iter(range(GEOMETRY.layers))
    # The stage is full: these wait for what is sent of the first.
    staged_for_s = 1.5 * STALLED_S
    for _ in range(int(staged_for_s * RATE_BYTES_S / LAYER_BYTES)):
        push_layer(third, next(layers))
    # Batches of the first two may take turns, and either be whole before the other.
    assert ends.result().delivered
    for layer in layers:
        push_layer(third, layer)
    third.finish()
    assert all(ends.result().delivered for _ in range(2))
