"""The nixl transport: the receiver reads payloads out of the sender's memory, by UCX.

The sender copies a batch into a piece of memory that it has registered, and announces it; the
receiver reads it into memory of its own, says so, and checks it. So nobody writes into another
process's memory, and each end keeps its own by what it knows itself:

- A piece is used again when its reader has it, or the group has ended. A reader that was frozen and
  goes on then may still read it: what it gets does not match the checksum that was announced.
- The memory of a read is let go of when the read is over: done, or failed because the other end is
  gone. One that is neither within its deadline breaks the group, and UCX, which has no way to take
  it back, may still write there: the group's thread keeps the memory until it is over. While more
  than UNFINISHED_BYTES_MAX are kept so, nobody may join.

Payloads pass through host memory at both ends.
"""

from __future__ import annotations

import queue
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch

from cluster.wire import kv_pb2
from workers.kv import group
from workers.kv.group import GroupBroken, IncomingGroup, JoinGroup, OutgoingGroup, Reply
from workers.kv.inbox import Inbox
from workers.kv.nixl_agent import Agent, Read, ReadFailed

NAME = "nixl"
PIECE_BYTES = 8 << 20
"""Within a machine UCX copies it in one go, and the interpreter stands for as long: some ms."""
PIECES = 16
PIECES_OF_GROUP_MAX = 8
"""A frozen peer leaves others some."""
FRAME_BYTES_MAX = 3 << 20
"""What a batch may have too much, for it ends with the frame that makes it large enough."""
ALIGNMENT_BYTES = 64
TRIAL_BYTES = 64
POLL_S = 0.0001
UNFINISHED_POLL_S = 0.5
UNFINISHED_BYTES_MAX = 256 << 20
KNOWN_MAX = 256
"""Agents that are kept known, those of running groups not counted."""


class Nixl:
    """This end of the transport: the `Transport` of groups that read."""

    def __init__(self, worker: str) -> None:
        """`worker`: what names this worker start.

        Raises:
            NoNixl
        """
        self.agent = Agent(worker)
        self.unfinished_bytes = 0
        self._lock = threading.Lock()
        self._pieces: _Pieces | None = None
        self._peers: dict[str, bool] = {}
        """Agents that are known, and whether a group reads from them."""

    @property
    def name(self) -> str:
        return NAME

    def join(self, call: JoinGroup, member: kv_pb2.GroupMember) -> OutgoingGroup:
        with self._lock:
            if self._pieces is None:
                try:
                    self._pieces = _Pieces(self.agent)
                except Exception as error:  # of nixl's own classes
                    raise GroupBroken(f"no memory can be registered: {error}") from error
        return _Outgoing(call, member, self._pieces)

    def accept(
        self,
        member: kv_pb2.GroupMember,
        inbox: Inbox,
        reply: Reply,
        on_end: Callable[[str], None],
    ) -> IncomingGroup:
        if self.unfinished_bytes > UNFINISHED_BYTES_MAX:
            raise GroupBroken(f"{self.unfinished_bytes} bytes wait for reads from frozen peers")
        return _Incoming(inbox, self, member, reply, on_end)

    def close(self) -> None:
        with self._lock:
            pieces, self._pieces = self._pieces, None
        if pieces is not None:
            pieces.close()

    def meet(self, told: kv_pb2.NixlMemory) -> str:
        """For a group that reads from it. Returns its name."""
        peer = told.agent
        with self._lock:
            if self._peers.get(peer):
                # Its reads are of the same connection.
                raise GroupBroken(f"an older group with {peer} has not ended yet")
            # UCX does not close the connection of one that is alive: each time it were one more.
            if self._peers.pop(peer, None) is None:
                self.agent.meet(told.metadata)
            self._peers[peer] = True
        return peer

    def part(self, peer: str, is_lost: bool) -> None:
        """The group has ended. `is_lost`: nothing can be read from it any more."""
        with self._lock:
            self._peers[peer] = False
            idle = [known for known, is_read in self._peers.items() if not is_read]
            for known in [peer] if is_lost else idle[:-KNOWN_MAX]:
                del self._peers[known]
                self.agent.leave(known)

    def keep(self, size_bytes: int) -> None:
        with self._lock:
            self.unfinished_bytes += size_bytes


def aligned(size_bytes: int) -> int:
    return size_bytes + -size_bytes % ALIGNMENT_BYTES


# --- the sending end --------------------------------------------------------------------------


class _Pieces:
    """Registered memory for what is announced, in pieces of the same size."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self._memory = torch.empty(PIECES * PIECE_BYTES, dtype=torch.uint8)
        self._registered = agent.register(self._memory)
        self.metadata = agent.metadata(self._registered)
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for number in range(PIECES):
            self._free.put(number)

    def take(self) -> int:
        """The number of one that nobody reads.

        Raises:
            GroupBroken: none gets free.
        """
        try:
            return self._free.get(timeout=group.GROUP_DEADLINE_S)
        except queue.Empty:
            raise GroupBroken(f"all {PIECES} pieces of memory wait for their readers") from None

    def give_back(self, number: int) -> None:
        self._free.put(number)

    def fill(self, number: int, payloads: Sequence[memoryview | bytearray]) -> int:
        """Returns the address of the first payload."""
        first = number * PIECE_BYTES
        at = first
        for payload in payloads:
            source = torch.frombuffer(payload, dtype=torch.uint8)
            self._memory[at : at + len(payload)].copy_(source)
            at += aligned(len(payload))
        return int(self._memory.data_ptr()) + first

    def close(self) -> None:
        self.agent.deregister(self._registered)


class _Outgoing(OutgoingGroup):
    transport = NAME
    batch_bytes_min = PIECE_BYTES - FRAME_BYTES_MAX

    def __init__(self, call: JoinGroup, member: kv_pb2.GroupMember, pieces: _Pieces) -> None:
        self._pieces = pieces
        self._window = threading.Semaphore(PIECES_OF_GROUP_MAX)
        self._under_way: deque[tuple[int, threading.Event]] = deque()
        trial = secrets.token_bytes(TRIAL_BYTES)
        piece = pieces.take()
        try:
            member.nixl.agent, member.nixl.metadata = pieces.agent.name, pieces.metadata
            member.nixl.trial = trial
            member.nixl.trial_address = pieces.fill(piece, [bytearray(trial)])
            super().__init__(call, member)
            self._joined()
        finally:
            pieces.give_back(piece)

    def send(self, headers: Sequence[bytes], payloads: Sequence[memoryview]) -> Iterator[int]:
        if not payloads:
            with self._lock:
                self._announce(headers)
            return iter(())
        size_bytes = sum(aligned(len(payload)) for payload in payloads)
        if size_bytes > PIECE_BYTES:
            raise GroupBroken(f"{size_bytes} bytes do not fit into {PIECE_BYTES}")
        if not self._window.acquire(timeout=group.GROUP_DEADLINE_S):
            raise self._break(f"the receiver has read nothing for {group.GROUP_DEADLINE_S:g} s")
        try:
            piece = self._pieces.take()
        except GroupBroken:
            self._window.release()
            raise
        address = self._pieces.fill(piece, payloads)
        taken = threading.Event()
        with self._lock:
            if self.broken:
                self._free(piece)
                raise GroupBroken(self.broken)
            self._under_way.append((piece, taken))
            self._announce(headers, address)

        return self._waiting(taken, sum(map(len, payloads)))

    def _waiting(self, taken: threading.Event, sent_bytes: int) -> Iterator[int]:
        if not taken.wait(group.GROUP_DEADLINE_S):
            raise self._break(f"the receiver has read nothing for {group.GROUP_DEADLINE_S:g} s")
        if self.broken:
            raise GroupBroken(self.broken)
        yield sent_bytes

    def _on_answer(self, answer: kv_pb2.FromGroup) -> None:
        with self._lock:
            if not self._under_way:
                self._answers.put(answer)
                return
            piece, taken = self._under_way.popleft()
        self._free(piece)
        taken.set()

    def _ended(self) -> None:
        with self._lock:
            under_way, self._under_way = self._under_way, deque()
        for piece, taken in under_way:
            self._free(piece)
            taken.set()

    def _free(self, piece: int) -> None:
        self._pieces.give_back(piece)
        self._window.release()


# --- the receiving end ------------------------------------------------------------------------


class _Incoming(IncomingGroup):
    def __init__(
        self,
        inbox: Inbox,
        nixl: Nixl,
        member: kv_pb2.GroupMember,
        reply: Reply,
        on_end: Callable[[str], None],
    ) -> None:
        super().__init__(inbox, on_end)
        self._nixl = nixl
        self._agent = nixl.agent
        self._member = member
        self._reply = reply
        self._peer = ""
        self._is_lost = False
        self._reads: list[Read] = []
        """That are not known to be over."""
        self._thread.start()

    def _enter(self) -> None:
        told = self._member.nixl
        self._peer = self._nixl.meet(told)
        # An agent may be known and still be out of reach: then the sender has to know it now.
        read = self._start(told.trial_address, len(told.trial))
        self._finish(read)
        if bytes(read.buffer.numpy().data) != told.trial:
            raise GroupBroken(f"what is read from {self._peer} is not what is there")
        self._taken()

    def _receive(
        self, announced: kv_pb2.FrameHeaders, sizes_bytes: Sequence[int]
    ) -> Iterator[memoryview]:
        if not sizes_bytes:
            return iter(())
        size_bytes = sum(aligned(size) for size in sizes_bytes)
        if size_bytes > PIECE_BYTES:
            raise GroupBroken(f"{size_bytes} bytes announced at a time")
        return self._payloads(self._start(announced.address, size_bytes), sizes_bytes)

    def _payloads(self, read: Read, sizes_bytes: Sequence[int]) -> Iterator[memoryview]:
        self._finish(read)
        self._taken()
        buffer = read.buffer.numpy().data
        at = 0
        for size_bytes in sizes_bytes:
            yield buffer[at : at + size_bytes]
            at += aligned(size_bytes)

    def _taken(self) -> None:
        self._reply(kv_pb2.FromGroup(taken=kv_pb2.Taken()))

    def _start(self, address: int, size_bytes: int) -> Read:
        try:
            read = self._agent.start_read(self._peer, address, size_bytes)
        except Exception:
            self._is_lost = True
            raise
        self._reads.append(read)
        return read

    def _finish(self, read: Read) -> None:
        until_s = time.monotonic() + group.GROUP_DEADLINE_S
        while not self._agent.is_over(read):
            if time.monotonic() > until_s:
                raise GroupBroken(f"a read took more than {group.GROUP_DEADLINE_S:g} s")
            time.sleep(POLL_S)
        self._let_go(read)

    def _let_go(self, read: Read) -> None:
        self._reads.remove(read)
        self._agent.finish(read)

    def _leave(self) -> None:
        kept_bytes = sum(len(read.buffer) for read in self._reads)
        self._nixl.keep(kept_bytes)
        while self._reads:
            # First of all: what fails with a connection does not all do so at once.
            time.sleep(UNFINISHED_POLL_S)
            for read in [read for read in self._reads if self._is_over(read)]:
                self._let_go(read)
        self._nixl.keep(-kept_bytes)
        if self._peer:
            self._nixl.part(self._peer, self._is_lost)

    def _is_over(self, read: Read) -> bool:
        try:
            return self._agent.is_over(read)
        except ReadFailed:
            self._is_lost = True
            return True
