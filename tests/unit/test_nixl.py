"""The nixl transport by itself: what is there without the package, whose memory is used when, and
what happens to reads that don't end."""

from __future__ import annotations

import logging
import queue
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.unit.ends import FINGERPRINT, LONG_S, SENDER, Loop
from tests.unit.group_peer import GEOMETRY, TOKENS, GroupReceiver, push_layer, send_kv
from tests.unit.test_groups import WAIT_S, needs_nixl, wait_until
from workers.kv import group, nixl
from workers.kv.nixl import PIECES, Nixl
from workers.kv.nixl_agent import NoNixl, Read, ReadFailed
from workers.kv.sender import Identity, Sender
from workers.kv.transfer import Sent
from workers.kv.transports import make_transports


class Ends:
    """A sender and a receiver in this process, each with an agent of its own."""

    def __init__(self, loop: Loop) -> None:
        self.nixl_there, self.nixl_here = Nixl("receiver"), Nixl("sender")
        self.receiver = GroupReceiver(loop, self.nixl_there)
        self.receiver.start()
        self.sent: queue.Queue[Sent] = queue.Queue()
        identity = Identity(*SENDER, FINGERPRINT)
        ways = [self.nixl_here]
        self.sender = Sender(identity, 1 << 30, LONG_S, self.sent.put, ways, "nixl")

    def hand_over(self, transfer_id: str) -> Sent:
        transfer = self.sender.open(send_kv(self.receiver.port, transfer_id), TOKENS, b"digest")
        for layer in range(GEOMETRY.layers):
            push_layer(transfer, layer)
        transfer.finish()
        return self.sent.get(timeout=WAIT_S)

    def free_pieces(self) -> int:
        assert self.nixl_here._pieces is not None
        return self.nixl_here._pieces._free.qsize()

    def close(self) -> None:
        self.sender.close(timeout_s=0)
        self.receiver.stop()
        self.nixl_here.close()
        self.nixl_there.close()


@pytest.fixture
def ends() -> Iterator[Ends]:
    loop = Loop()
    ends = Ends(loop)
    yield ends
    ends.close()
    loop.close()


# --- without the package ----------------------------------------------------------------------


@pytest.fixture
def no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nixl", None)


@pytest.mark.usefixtures("no_package")
def test_without_the_package_it_says_what_to_install() -> None:
    with pytest.raises(NoNixl, match=r"nixl is not installed: `make setup-nixl`"):
        Nixl("worker")


@pytest.mark.usefixtures("no_package")
@pytest.mark.parametrize(
    ("wanted", "names", "warns"),
    [
        ("grpc", [], False),
        ("collective", ["collective"], False),
        ("nixl", [], True),
        ("auto", ["collective"], False),
    ],
)
def test_without_the_package_others_are_tried(
    wanted: str, names: list[str], warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert [each.name for each in make_transports(wanted, "127.0.0.1", "w")] == names
    assert bool(caplog.records) == warns
    assert all("KV goes by gRPC" in record.getMessage() for record in caplog.records)


@pytest.mark.usefixtures("no_package")
def test_a_sender_without_the_package_sends_by_grpc_and_says_so() -> None:
    loop = Loop()
    receiver = GroupReceiver(loop)
    receiver.start()
    sent: queue.Queue[Sent] = queue.Queue()
    ways = make_transports("nixl", "127.0.0.1", "w")
    sender = Sender(Identity(*SENDER, FINGERPRINT), 1 << 30, LONG_S, sent.put, ways, "nixl")
    try:
        claim = receiver.claim()
        transfer = sender.open(send_kv(receiver.port), TOKENS, b"digest")
        for layer in range(GEOMETRY.layers):
            push_layer(transfer, layer)
        transfer.finish()
        assert sent.get(timeout=WAIT_S).delivered
        settled = claim.get(timeout=WAIT_S)
        assert (settled.transport, settled.instead_of) == ("grpc", "nixl")
    finally:
        sender.close(timeout_s=0)
        receiver.stop()
        loop.close()


# --- whose memory -----------------------------------------------------------------------------


@needs_nixl
def test_the_senders_memory_is_free_again(ends: Ends) -> None:
    for number in range(3):
        assert ends.hand_over(f"t{number}").delivered
    wait_until("all pieces are free", lambda: ends.free_pieces() == PIECES)
    assert ends.nixl_there.unfinished_bytes == 0


@needs_nixl
def test_memory_that_was_used_again_before_it_was_read_is_found_out(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a receiver was frozen for so long that the sender gave it up."""
    assert ends.hand_over("before").delivered
    start = nixl._Incoming._start

    def late(incoming: nixl._Incoming, address: int, size_bytes: int) -> Read:
        assert ends.nixl_here._pieces is not None
        ends.nixl_here._pieces._memory.fill_(255)
        return start(incoming, address, size_bytes)

    monkeypatch.setattr(nixl._Incoming, "_start", late)
    claim = ends.receiver.claim("late")
    sent = ends.hand_over("late")
    assert not sent.delivered and "does not match its checksum" in sent.reason
    assert not claim.get(timeout=WAIT_S).whole
    assert ends.receiver.inbox.take("late") is None


@needs_nixl
def test_an_agent_whose_memory_cannot_be_read_is_no_fault_of_the_transfer(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another machine's agent may be known, and still be out of reach."""

    def unreadable(incoming: nixl._Incoming, address: int, size_bytes: int) -> Read:
        raise RuntimeError("no route to it")

    monkeypatch.setattr(nixl._Incoming, "_start", unreadable)
    claim = ends.receiver.claim("t")
    assert ends.hand_over("t").delivered
    settled = claim.get(timeout=WAIT_S)
    assert (settled.transport, settled.instead_of) == ("grpc", "nixl")
    assert ends.free_pieces() == PIECES


@needs_nixl
def test_without_memory_to_register_kv_goes_by_grpc(
    ends: Ends, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none_left(memory: object) -> None:
        raise RuntimeError("too much is locked")

    monkeypatch.setattr(ends.nixl_here.agent, "register", none_left)
    claim = ends.receiver.claim("t")
    assert ends.hand_over("t").delivered
    assert claim.get(timeout=WAIT_S).transport == "grpc"
    assert "no memory can be registered: too much is locked" in caplog.text


class Frozen:
    """An agent whose reads stay under way until they are let go on."""

    def __init__(self, agent: Any) -> None:
        self._agent = agent
        self.is_frozen = threading.Event()
        self.finished = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._agent, name)

    def is_over(self, read: Read) -> bool:
        return not self.is_frozen.is_set() and bool(self._agent.is_over(read))

    def finish(self, read: Read) -> None:
        self.finished += 1
        self._agent.finish(read)


@needs_nixl
def test_memory_of_a_read_that_does_not_end_is_kept_until_it_does(
    ends: Ends, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    frozen = Frozen(ends.nixl_there.agent)
    monkeypatch.setattr(ends.nixl_there, "agent", frozen)
    monkeypatch.setattr(nixl, "UNFINISHED_POLL_S", 0.01)
    monkeypatch.setattr(nixl, "UNFINISHED_BYTES_MAX", 0)
    assert ends.hand_over("before").delivered
    frozen.is_frozen.set()
    monkeypatch.setattr(group, "GROUP_DEADLINE_S", 0.5)
    claim = ends.receiver.claim("t")
    assert not ends.hand_over("t").delivered
    assert not claim.get(timeout=WAIT_S).whole
    assert ends.receiver.inbox.take("before") is not None
    assert ends.receiver.inbox.bytes_held == 0
    wait_until("it is kept", lambda: ends.nixl_there.unfinished_bytes > 0)
    finished = frozen.finished
    # The sender needs its own no more.
    wait_until("all pieces are free", lambda: ends.free_pieces() == PIECES)
    # While so much is kept, nobody may join; KV goes by gRPC.
    for transfer_id in ("finds it broken", "may not join"):
        ends.sender.peer(send_kv(ends.receiver.port))._no_group_until_s.clear()
        claim = ends.receiver.claim(transfer_id)
        assert ends.hand_over(transfer_id).delivered
        assert claim.get(timeout=WAIT_S).transport == "grpc"
    assert "bytes wait for reads from frozen peers" in caplog.text
    assert frozen.finished == finished and ends.nixl_there.unfinished_bytes > 0
    frozen.is_frozen.clear()
    wait_until("it is let go of", lambda: ends.nixl_there.unfinished_bytes == 0)
    assert frozen.finished > finished
    monkeypatch.undo()
    wait_until("the group has ended", lambda: not any(ends.nixl_there._peers.values()))
    ends.sender.peer(send_kv(ends.receiver.port))._no_group_until_s.clear()
    claim = ends.receiver.claim("after")
    assert ends.hand_over("after").delivered
    assert claim.get(timeout=WAIT_S).transport == "nixl"


@needs_nixl
@pytest.mark.parametrize("failing", ["start_read", "is_over"])
def test_a_peer_is_met_once_and_forgotten_when_it_is_lost(
    ends: Ends, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """What UCX keeps of a connection would otherwise grow with each group."""
    calls: list[str] = []
    for name in ("meet", "leave"):
        call = getattr(ends.nixl_there.agent, name)

        def counted(told: object, name: str = name, call: Any = call) -> None:
            calls.append(name)
            call(told)

        monkeypatch.setattr(ends.nixl_there.agent, name, counted)
    peer = ends.sender.peer(send_kv(ends.receiver.port))
    for number in range(3):
        assert ends.hand_over(f"t{number}").delivered
        peer._groups.pop("nixl").close("the test")
        wait_until("its thread ends", lambda: not any(ends.nixl_there._peers.values()))
    assert calls == ["meet"]
    assert ends.hand_over("before").delivered

    def failed(*arguments: object) -> None:
        raise ReadFailed("its connection broke")

    monkeypatch.setattr(ends.nixl_there.agent, failing, failed)
    assert not ends.hand_over("lost").delivered
    wait_until("it is left", lambda: calls == ["meet", "leave"])
    assert ends.nixl_there._peers == {}
