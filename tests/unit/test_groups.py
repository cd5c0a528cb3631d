"""Payloads in groups, by Gloo and by nixl: what is delivered is what was sent, whatever goes wrong
fails the transfer at both ends, and neither end waits for one that is dead or frozen."""

from __future__ import annotations

import importlib.util
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import psutil
import pytest

from cluster.wire import kv_pb2
from tests.unit.ends import FINGERPRINT, LONG_S, SENDER, Loop, Outbox, wait_until
from tests.unit.group_peer import (
    GEOMETRY,
    LAYER_BYTES,
    TOKENS,
    GroupReceiver,
    payload_of,
    push_layer,
    send_kv,
    transport,
)
from workers.kv import collective, group
from workers.kv import peer as peer_module
from workers.kv.frames import Frame
from workers.kv.group import IncomingGroup
from workers.kv.incoming import Settled
from workers.kv.nixl import TRIAL_BYTES, Nixl
from workers.kv.nixl_agent import Read
from workers.kv.sender import Identity, Sender
from workers.kv.transfer import Sent, Transfer
from workers.kv.transports import make_transports

WAIT_S = 60.0
"""For what should happen at once, or at a deadline, on a machine that may be busy."""
DEADLINE_S = 1.0
WHOLE_BYTES = GEOMETRY.layers * LAYER_BYTES

needs_nixl = pytest.mark.skipif(
    importlib.util.find_spec("nixl") is None,
    reason="nixl is not installed: `make setup-nixl`, or `make test`",
)


@dataclass(frozen=True)
class Way:
    transport: str
    env: dict[str, str] = field(default_factory=dict)


WAYS = [
    pytest.param(Way("collective"), id="collective"),
    pytest.param(Way("nixl"), id="nixl", marks=needs_nixl),
    # As between machines without RDMA; on one machine UCX finds something faster.
    pytest.param(Way("nixl", {"UCX_TLS": "tcp"}), id="nixl-tcp", marks=needs_nixl),
]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Way:
    way: Way = request.param
    for name, value in way.env.items():
        monkeypatch.setenv(name, value)
    return way


@pytest.fixture  # to be asked for after the receiver, whose threads are not the sender's
def outbox(way: Way) -> Iterator[Outbox]:
    sent: queue.Queue[Sent] = queue.Queue()
    here = transport(way.transport, "sender")
    identity = Identity(*SENDER, FINGERPRINT)
    sender = Sender(identity, 1 << 30, LONG_S, sent.put, [here], way.transport)
    yield Outbox(sender, sent, set(threading.enumerate()))
    sender.close(timeout_s=0)
    here.close()


@pytest.fixture
def receiver(
    loop: Loop, start: Callable[[GroupReceiver], GroupReceiver], way: Way
) -> GroupReceiver:
    return start(GroupReceiver(loop, transport(way.transport, "receiver")))


def open_to(outbox: Outbox, port: int, transfer_id: str = "t") -> Transfer:
    return outbox.sender.open(send_kv(port, transfer_id), TOKENS, b"digest")


def push_all(transfer: Transfer) -> None:
    for layer in range(GEOMETRY.layers):
        push_layer(transfer, layer)
    transfer.finish()


def result(outbox: Outbox) -> Sent:
    return outbox.sent.get(timeout=WAIT_S)


def transport_of(settled: Settled) -> tuple[bool, str, str]:
    return settled.whole, settled.transport, settled.instead_of


def group_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "kv-group"]


# --- delivered --------------------------------------------------------------------------------


def test_what_is_delivered_is_what_was_sent(
    receiver: GroupReceiver, outbox: Outbox, way: Way
) -> None:
    claim = receiver.claim()
    push_all(open_to(outbox, receiver.port))
    assert result(outbox) == Sent("t", True, "", WHOLE_BYTES)
    assert transport_of(claim.get(timeout=WAIT_S)) == (True, way.transport, "")
    taken = receiver.inbox.take("t")
    assert taken is not None
    for layer in range(GEOMETRY.layers):
        (frame,) = taken[layer]
        assert frame.payload == payload_of(layer)
    assert receiver.inbox.bytes_held == 0
    outbox.sender.close()
    wait_until("the group's threads end", lambda: not group_threads())
    outbox.assert_at_rest()


def test_many_transfers_share_a_group(receiver: GroupReceiver, outbox: Outbox) -> None:
    ids = [f"t{number}" for number in range(4)]
    transfers = [open_to(outbox, receiver.port, transfer_id) for transfer_id in ids]
    for layer in range(GEOMETRY.layers):
        for transfer in transfers:
            push_layer(transfer, layer)
    for transfer in transfers:
        transfer.finish()
    assert [result(outbox).delivered for _ in ids] == [True] * len(ids)
    # One end of it is here, and so is the other.
    assert len(group_threads()) == 2
    for transfer_id in ids:
        taken = receiver.inbox.take(transfer_id)
        assert taken is not None
        assert all(taken[layer][0].payload == payload_of(layer) for layer in taken)


# --- damaged ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("flipped", "layer 1, tokens from 0: the payload does not match its checksum"),
        ("missing", "the sender's frames ended before the KV was whole"),
        ("twice", "layer 1, tokens from 0 arrived twice"),
        ("aborted", "the sender gave up: the prefill was aborted"),
    ],
)
def test_a_damaged_transfer_fails_at_both_ends_and_the_group_goes_on(
    receiver: GroupReceiver, outbox: Outbox, way: Way, fault: str, reason: str
) -> None:
    claim = receiver.claim()
    transfer = open_to(outbox, receiver.port)
    push_layer(transfer, 0)
    assert transfer.credit.wait(WAIT_S)
    match fault:
        case "flipped":
            push_layer(transfer, 1, checksum_of=payload_of(0))
        case "twice":
            push_layer(transfer, 1)
            push_layer(transfer, 1)
        case "aborted":
            transfer.abort("the prefill was aborted")
    if fault != "aborted":
        transfer.finish()
    sent = result(outbox)
    assert (sent.delivered, sent.reason) == (False, reason)
    settled = claim.get(timeout=WAIT_S)
    assert (settled.whole, settled.reason) == (False, reason)
    assert receiver.inbox.bytes_held == 0
    after = receiver.claim("after")
    push_all(open_to(outbox, receiver.port, "after"))
    assert result(outbox).delivered
    assert transport_of(after.get(timeout=WAIT_S)) == (True, way.transport, "")


@pytest.mark.parametrize("ended", ["whole", "flipped", "dropped"])
def test_a_group_keeps_nothing_of_transfers_that_have_ended(
    receiver: GroupReceiver,
    outbox: Outbox,
    way: Way,
    monkeypatch: pytest.MonkeyPatch,
    ended: str,
) -> None:
    there, groups = type(receiver.transports[way.transport]), list[IncomingGroup]()
    accept = there.accept

    def watched(*arguments: Any) -> IncomingGroup:
        groups.append(accept(*arguments))
        return groups[-1]

    monkeypatch.setattr(there, "accept", watched)
    claim = receiver.claim()
    transfer = open_to(outbox, receiver.port)
    push_layer(transfer, 0)
    wait_until("a layer has come", lambda: bool(receiver.inbox._transfers["t"].frames))
    (group_here,) = groups
    assert list(group_here._open) == ["t"]
    match ended:
        case "whole":
            for layer in range(1, GEOMETRY.layers):
                push_layer(transfer, layer)
            transfer.finish()
        case "flipped":
            push_layer(transfer, 1, checksum_of=payload_of(0))
        case "dropped":
            receiver.inbox.drop("t", "the client left")
    assert claim.get(timeout=WAIT_S).whole is (ended == "whole")
    assert result(outbox).delivered is (ended == "whole")
    wait_until("it is forgotten", lambda: not group_here._open)
    if ended != "whole":
        # What was under way when it ended.
        header = kv_pb2.FrameHeader(transfer_id="t", kv=kv_pb2.KvFrame(layer=2, tokens=TOKENS))
        group_here._take_frame(Frame(header, payload_of(2)))
        assert not group_here._open


# --- no group ---------------------------------------------------------------------------------


def test_a_peer_without_the_transport_gets_kv_by_grpc_and_one_warning(
    loop: Loop,
    start: Callable[[GroupReceiver], GroupReceiver],
    outbox: Outbox,
    way: Way,
    caplog: pytest.LogCaptureFixture,
) -> None:
    receiver = start(GroupReceiver(loop))
    with caplog.at_level(logging.WARNING):
        for transfer_id in ("a", "b"):
            claim = receiver.claim(transfer_id)
            push_all(open_to(outbox, receiver.port, transfer_id))
            assert result(outbox).delivered
            assert transport_of(claim.get(timeout=WAIT_S)) == (True, "grpc", way.transport)
    warnings = [record.getMessage() for record in caplog.records]
    peer = f"127.0.0.1:{receiver.port}"
    assert warnings == [
        f"{way.transport} transport: {peer} is not configured for it or lacks it, KV goes by gRPC"
    ]


def test_a_group_that_cannot_be_made_is_no_fault_of_the_transfer(
    receiver: GroupReceiver,
    outbox: Outbox,
    way: Way,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    refusing = mock.Mock(**{"accept.side_effect": RuntimeError("no group today")})
    monkeypatch.setitem(receiver.transports, way.transport, refusing)
    claim = receiver.claim()
    with caplog.at_level(logging.WARNING):
        push_all(open_to(outbox, receiver.port))
        assert result(outbox).delivered
    (warning,) = (record.getMessage() for record in caplog.records)
    assert warning.startswith(f"{way.transport} transport: no group with 127.0.0.1:{receiver.port}")
    assert "no group today" in warning
    assert transport_of(claim.get(timeout=WAIT_S)) == (True, "grpc", way.transport)


def test_after_a_group_broke_kv_goes_another_way_for_a_while(
    receiver: GroupReceiver, outbox: Outbox, way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_all(open_to(outbox, receiver.port, "before"))
    assert result(outbox).delivered
    groups = outbox.sender.peer(send_kv(receiver.port))._groups
    groups[way.transport].close("broken by the test")
    for transfer_id in ("a", "b"):
        claim = receiver.claim(transfer_id)
        push_all(open_to(outbox, receiver.port, transfer_id))
        assert result(outbox).delivered
        assert transport_of(claim.get(timeout=WAIT_S)) == (True, "grpc", way.transport)
    monkeypatch.setattr(peer_module, "RETRY_AFTER_S", 0.0)
    outbox.sender.peer(send_kv(receiver.port))._no_group_until_s.clear()
    wait_until("the broken group's threads end", lambda: not group_threads())
    claim = receiver.claim("after")
    push_all(open_to(outbox, receiver.port, "after"))
    assert result(outbox).delivered
    assert transport_of(claim.get(timeout=WAIT_S)) == (True, way.transport, "")


@pytest.mark.parametrize("way", WAYS[:1], indirect=True)
def test_a_group_that_has_ended_keeps_no_connection(
    receiver: GroupReceiver, outbox: Outbox, way: Way
) -> None:
    push_all(open_to(outbox, receiver.port))
    assert result(outbox).delivered
    ended = outbox.sender.peer(send_kv(receiver.port))._groups[way.transport]
    assert isinstance(ended, collective._Outgoing) and ended._pair is not None
    pair = weakref.ref(ended._pair)
    ended.close("broken by the test")
    wait_until("its connection is closed", lambda: pair() is None)


@needs_nixl
@pytest.mark.parametrize(
    ("there", "refusing", "taken"),
    [
        (["nixl", "collective"], None, "nixl"),
        (["nixl", "collective"], "nixl", "collective"),
        (["collective"], None, "collective"),
        ([], None, "grpc"),
    ],
)
def test_auto_is_the_first_that_both_have_and_can_use(
    loop: Loop,
    start: Callable[[GroupReceiver], GroupReceiver],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    there: list[str],
    refusing: str | None,
    taken: str,
) -> None:
    receiver = start(GroupReceiver(loop, *(transport(name, "receiver") for name in there)))
    if refusing is not None:
        refuses = mock.Mock(**{"accept.side_effect": RuntimeError("no group today")})
        monkeypatch.setitem(receiver.transports, refusing, refuses)
    sent: queue.Queue[Sent] = queue.Queue()
    here = make_transports("auto", "127.0.0.1", "sender")
    sender = Sender(Identity(*SENDER, FINGERPRINT), 1 << 30, LONG_S, sent.put, here, "auto")
    claim = receiver.claim()
    with caplog.at_level(logging.WARNING):
        push_all(sender.open(send_kv(receiver.port), TOKENS, b"digest"))
        assert sent.get(timeout=WAIT_S).delivered
    assert transport_of(claim.get(timeout=WAIT_S)) == (True, taken, "")
    assert len(caplog.records) == (refusing is not None)
    sender.close(timeout_s=0)


# --- the other end dies or freezes ------------------------------------------------------------


class Peer:
    """The other end, in a process."""

    def __init__(self, way: Way, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.unit.group_peer", way.transport, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | way.env,
        )

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.line()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def peer(way: Way) -> Iterator[Callable[..., Peer]]:
    peers: list[Peer] = []

    def start_one(*arguments: str) -> Peer:
        peers.append(Peer(way, *arguments))
        return peers[-1]

    yield start_one
    for each in peers:
        each.close()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_receiver_that_dies_or_freezes_holds_nothing_up(
    peer: Callable[..., Peer],
    outbox: Outbox,
    monkeypatch: pytest.MonkeyPatch,
    how: signal.Signals,
) -> None:
    monkeypatch.setattr(group, "GROUP_DEADLINE_S", DEADLINE_S)
    receiver = peer("receive")
    port = int(receiver.line())
    monkeypatch.setattr(group, "GROUP_DEADLINE_S", WAIT_S)
    push_all(open_to(outbox, port, "before"))
    assert result(outbox).delivered
    monkeypatch.setattr(group, "GROUP_DEADLINE_S", DEADLINE_S)
    transfer = open_to(outbox, port)
    assert transfer.credit.wait(WAIT_S)
    receiver.process.send_signal(how)
    push_all(transfer)
    sent = result(outbox)
    assert not sent.delivered
    if how is signal.SIGSTOP:
        receiver.process.send_signal(signal.SIGCONT)
        # What was there before waits for its decode leg; the other is gone.
        wait_until("it frees what it got", lambda: receiver.ask() == str(WHOLE_BYTES))
    wait_until("the group's threads end", lambda: not group_threads())
    outbox.assert_at_rest()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_sender_that_dies_or_freezes_holds_nothing(
    receiver: GroupReceiver, peer: Callable[..., Peer], how: signal.Signals
) -> None:
    claim = receiver.claim()
    sender = peer("send", str(receiver.port))
    assert sender.line() == "sending"
    assert receiver.inbox.bytes_held == WHOLE_BYTES
    # One that is being read from is another test's: its memory is kept while it is frozen.
    wait_until("a layer has come", lambda: bool(receiver.inbox._transfers["t"].frames))
    sender.process.send_signal(how)
    # A frozen one is found by gRPC's keepalive.
    assert not claim.get(timeout=WAIT_S).whole
    assert receiver.inbox.bytes_held == 0
    wait_until("the group's thread ends", lambda: not group_threads())


@needs_nixl
@pytest.mark.parametrize("way", WAYS[1:], indirect=True)
def test_a_sender_that_is_killed_before_it_is_read_from_is_forgotten(
    receiver: GroupReceiver, peer: Callable[..., Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    nixl = receiver.transports["nixl"]
    assert isinstance(nixl, Nixl)
    claim = receiver.claim()
    start_read = nixl.agent.start_read

    def killed(*arguments: Any) -> Read:
        if arguments[2] > TRIAL_BYTES:
            sender.process.kill()
            sender.process.wait()
        return start_read(*arguments)

    monkeypatch.setattr(nixl.agent, "start_read", killed)
    sender = peer("send", str(receiver.port))
    assert not claim.get(timeout=WAIT_S).whole
    wait_until("the group's thread ends", lambda: not group_threads())
    assert (receiver.inbox.bytes_held, nixl.unfinished_bytes, nixl._peers) == (0, 0, {})


@needs_nixl
@pytest.mark.parametrize("way", WAYS[2:], indirect=True)
@pytest.mark.parametrize("then", [signal.SIGCONT, signal.SIGKILL])
def test_a_sender_that_freezes_while_it_is_read_from_keeps_memory_only_until_it_goes_on_or_dies(
    receiver: GroupReceiver,
    peer: Callable[..., Peer],
    monkeypatch: pytest.MonkeyPatch,
    then: signal.Signals,
) -> None:
    nixl = receiver.transports["nixl"]
    assert isinstance(nixl, Nixl)
    claim = receiver.claim()
    start_read = nixl.agent.start_read

    def frozen(*arguments: Any) -> Read:
        # The first read is the trial, which `peer` waits for.
        if arguments[2] > TRIAL_BYTES:
            sender.process.send_signal(signal.SIGSTOP)
            stopped = psutil.Process(sender.process.pid)
            wait_until("it stands", lambda: stopped.status() == psutil.STATUS_STOPPED)
        return start_read(*arguments)

    monkeypatch.setattr(nixl.agent, "start_read", frozen)
    sender = peer("send", str(receiver.port))
    assert not claim.get(timeout=WAIT_S).whole
    assert receiver.inbox.bytes_held == 0
    wait_until("it is kept", lambda: nixl.unfinished_bytes > 0)
    sender.process.send_signal(then)
    wait_until("it is let go of", lambda: nixl.unfinished_bytes == 0)
    wait_until("the group's thread ends", lambda: not group_threads())
    # Of one that is dead nothing is kept.
    assert len(nixl._peers) == (then is signal.SIGCONT)
