"""Ranks of one sender, each with a group of its own: their parts come whole or not at all."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator

import pytest

from tests.unit.ends import FINGERPRINT, LONG_S, SENDER, Loop
from tests.unit.group_peer import GEOMETRY, TOKENS, GroupReceiver, payload_of, push_layer, send_kv
from tests.unit.test_groups import WAYS, Way
from workers.kv.group import Transport
from workers.kv.sender import Identity, Sender
from workers.kv.transfer import GRPC, Sent, Transfer
from workers.kv.transports import make_transports

WAIT_S = 60.0
"""For what should happen at once, on a machine that may be busy."""
LAYERS = range(GEOMETRY.layers)


class Rank:
    """One KV head's sender."""

    def __init__(self, head: int, transport: str) -> None:
        self.heads = range(head, head + 1)
        self.sent: queue.Queue[Sent] = queue.Queue()
        # As a rank makes them.
        self._transports: list[Transport] = make_transports(transport, "127.0.0.1", f"r{head}")
        self.sender = Sender(
            Identity(*SENDER, FINGERPRINT),
            *(1 << 30, LONG_S, self.sent.put, self._transports, transport),
            heads=(head, 1),
        )

    def open(self, port: int) -> Transfer:
        return self.sender.open(send_kv(port), TOKENS, b"digest")

    def push(self, transfer: Transfer, layers: range = LAYERS) -> None:
        for layer in layers:
            push_layer(transfer, layer, heads=self.heads)

    def close(self) -> None:
        self.sender.close(timeout_s=0)
        for each in self._transports:
            each.close()


@pytest.fixture(params=[*WAYS, pytest.param(Way(GRPC), id=GRPC)])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Way:
    way: Way = request.param
    for name, value in way.env.items():
        monkeypatch.setenv(name, value)
    return way


@pytest.fixture
def receiver(
    loop: Loop, start: Callable[[GroupReceiver], GroupReceiver], way: Way
) -> GroupReceiver:
    return start(GroupReceiver(loop, *make_transports(way.transport, "127.0.0.1", "receiver")))


@pytest.fixture
def ranks(receiver: GroupReceiver, way: Way) -> Iterator[list[Rank]]:
    ranks = [Rank(head, way.transport) for head in range(GEOMETRY.heads)]
    yield ranks
    for rank in ranks:
        rank.close()


def result(rank: Rank) -> tuple[bool, str]:
    sent = rank.sent.get(timeout=WAIT_S)
    return sent.delivered, sent.reason


def first_has_sent(receiver: GroupReceiver, ranks: list[Rank]) -> Transfer:
    """All of the first rank's part has come. Returns the second one's transfer."""
    first, second = (rank.open(receiver.port) for rank in ranks)
    ranks[0].push(first)
    first.finish()
    until_s = time.monotonic() + WAIT_S
    while not (
        (coming := receiver.inbox._transfers.get("t")) and coming.part_has_come(ranks[0].heads)
    ):
        assert time.monotonic() < until_s
        time.sleep(0.01)
    return second


def assert_whole(receiver: GroupReceiver) -> None:
    taken = receiver.inbox.take("t")
    assert taken is not None
    for layer in LAYERS:
        assert [frame.payload for frame in taken[layer]] == [payload_of(layer, 1)] * GEOMETRY.heads
    assert receiver.inbox.bytes_held == 0


def test_a_rank_that_is_done_leaves_the_others_their_time(
    receiver: GroupReceiver, ranks: list[Rank], way: Way
) -> None:
    claim = receiver.claim()
    second = ranks[1]
    transfer = first_has_sent(receiver, ranks)
    # The end of its frames is behind them.
    time.sleep(0.1)
    assert claim.empty()
    second.push(transfer)
    transfer.finish()
    assert [result(rank) for rank in ranks] == [(True, "")] * 2
    settled = claim.get(timeout=WAIT_S)
    assert (settled.whole, settled.transport) == (True, way.transport)
    assert_whole(receiver)


def test_a_group_that_breaks_behind_its_part_takes_nothing_with_it(
    receiver: GroupReceiver, ranks: list[Rank], way: Way
) -> None:
    claim = receiver.claim()
    first, second = ranks
    transfer = first_has_sent(receiver, ranks)
    for group in first.sender.peer(send_kv(receiver.port))._groups.values():
        group.close("broken by the test")
    second.push(transfer)
    transfer.finish()
    assert claim.get(timeout=WAIT_S).whole
    assert_whole(receiver)


def test_a_sender_that_gives_up_behind_its_part_takes_nothing_with_it(
    receiver: GroupReceiver, ranks: list[Rank], way: Way
) -> None:
    """As it does when its group breaks before it was told that its payloads were taken."""
    claim = receiver.claim()
    first, second = ranks
    transfer = first_has_sent(receiver, ranks)
    # By gRPC it has been told by now.
    for early in list(first.sender._transfers):
        early.give_up("broken by the test")
    delivered, reason = result(first)
    assert delivered or reason == "the sender gave up: broken by the test"
    second.push(transfer)
    transfer.finish()
    assert claim.get(timeout=WAIT_S).whole
    assert_whole(receiver)


def test_one_part_that_is_not_whole_fails_the_transfer(
    receiver: GroupReceiver, ranks: list[Rank], way: Way
) -> None:
    claim = receiver.claim()
    second = ranks[1]
    transfer = first_has_sent(receiver, ranks)
    second.push(transfer, LAYERS[:-1])
    transfer.finish()
    settled = claim.get(timeout=WAIT_S)
    assert not settled.whole
    assert "ended before the KV was whole" in settled.reason
    delivered, _ = result(second)
    assert not delivered
    assert receiver.inbox.bytes_held == 0


def test_ranks_may_send_by_different_ways(receiver: GroupReceiver, way: Way) -> None:
    """As after a group of one of them broke."""
    claim = receiver.claim()
    ranks = [Rank(0, way.transport), Rank(1, GRPC)]
    try:
        for rank in ranks:
            transfer = rank.open(receiver.port)
            rank.push(transfer)
            transfer.finish()
        assert [result(rank) for rank in ranks] == [(True, "")] * 2
        assert claim.get(timeout=WAIT_S).whole
        assert_whole(receiver)
    finally:
        for rank in ranks:
            rank.close()
