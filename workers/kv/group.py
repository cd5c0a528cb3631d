"""A group of two processes, one of which sends payloads to the other by another way than gRPC.

A group is made when one worker start first sends to another. Headers go over gRPC (`JoinGroup`), so
that nothing is received that was not announced, and the end of that stream is the end of the group:
no end waits for one that is gone. Whatever goes wrong breaks the group; its transfers fail, and the
next one makes another. Which way the payloads take is up to the transport.
"""

from __future__ import annotations

import logging
import queue
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import grpc

from cluster.handoff_failure import HandoffFailure
from cluster.wire import kv_pb2
from workers.kv.frames import BadFrame, Frame, check_payload, decode_header
from workers.kv.inbox import Inbox
from workers.kv.incoming import TransferState

logger = logging.getLogger(__name__)

GROUP_DEADLINE_S = 5.0
"""To make a group; and for a batch of payloads, for one that is alive takes them at once."""
PAYLOAD_BYTES_MAX = 64 << 20

JoinGroup = Callable[..., Any]
"""Of a KvInboxStub."""
Reply = Callable[[kv_pb2.FromGroup], None]
"""To the sending end."""


class GroupBroken(Exception):
    """The group cannot be used, or not by this transfer."""


class Transport(Protocol):
    """This worker's end of a way for payloads beside gRPC."""

    @property
    def name(self) -> str: ...

    def join(self, call: JoinGroup, member: kv_pb2.GroupMember) -> OutgoingGroup:
        """Make a group to send in.

        Raises:
            GroupBroken: the other end does not join in time.
        """

    def accept(
        self,
        member: kv_pb2.GroupMember,
        inbox: Inbox,
        reply: Reply,
        on_end: Callable[[str], None],
    ) -> IncomingGroup:
        """The end of a group that receives. `on_end` is called once, with why it ended.

        Raises:
            whatever the transport does, if there can be none.
        """

    def close(self) -> None:
        """No more groups."""


class OutgoingGroup(ABC):
    """The sending end. Several transfers may use it at once."""

    transport: str
    """Its name."""
    batch_bytes_min: int
    """Payloads that are announced together, if as much waits."""

    def __init__(self, call: JoinGroup, member: kv_pb2.GroupMember) -> None:
        self.broken = ""
        self.moved_at_s = 0.0
        """When any transfer's bytes were last sent, by the monotonic clock."""
        self._lock = threading.Lock()
        self._up: queue.SimpleQueue[kv_pb2.ToGroup | None] = queue.SimpleQueue()
        self._up.put(kv_pb2.ToGroup(join=member))
        self._answers: queue.SimpleQueue[kv_pb2.FromGroup | None] = queue.SimpleQueue()
        self._call = call(iter(self._up.get, None))
        self._watcher = threading.Thread(target=self._watch, name="kv-group", daemon=True)
        self._watcher.start()

    @abstractmethod
    def send(self, headers: Sequence[bytes], payloads: Sequence[memoryview]) -> Iterator[int]:
        """Announce payloads and send them. Each step of what it returns waits until some of their
        bytes are sent, and gives how many; until its end they must stay as they are.

        Raises:
            GroupBroken; so does what it returns.
        """

    def close(self, reason: str) -> None:
        self.broken = self.broken or reason
        self._up.put(None)
        self._call.cancel()

    def _joined(self) -> kv_pb2.FromGroup:
        """The other end's answer."""
        try:
            answer = self._answers.get(timeout=GROUP_DEADLINE_S)
        except queue.Empty:
            raise self._break(f"nobody joined it within {GROUP_DEADLINE_S:g} s") from None
        if answer is None:
            raise GroupBroken(self.broken)
        return answer

    def _announce(self, headers: Sequence[bytes], address: int = 0) -> None:
        announced = kv_pb2.FrameHeaders(headers=headers, address=address)
        self._up.put(kv_pb2.ToGroup(headers=announced))

    def _break(self, reason: object) -> GroupBroken:
        self.close(str(reason).partition("\n")[0])
        return GroupBroken(self.broken)

    def _on_answer(self, answer: kv_pb2.FromGroup) -> None:
        self._answers.put(answer)

    def _watch(self) -> None:
        """Until the stream ends, and the group with it."""
        reason = "the receiver left it"
        try:
            for answer in self._call:
                self._on_answer(answer)
        except grpc.RpcError as error:
            reason = str(error.details()) if isinstance(error, grpc.Call) else str(error)
        self.broken = self.broken or reason
        self._up.put(None)
        self._answers.put(None)
        self._ended()

    def _ended(self) -> None:  # noqa: B027 - not every transport has something to do
        """Nobody takes anything any more."""


@dataclass(slots=True)
class _Part:
    """What this sender brings of a transfer. Other ranks of it may still have to bring theirs."""

    has_come: bool = False


class IncomingGroup(ABC):
    """The receiving end: a thread that takes announced payloads in, and calls `on_end` at its end.

    A transfer that has failed here is still received, for the order's sake, and thrown away.
    """

    def __init__(self, inbox: Inbox, on_end: Callable[[str], None]) -> None:
        self._inbox = inbox
        self._on_end = on_end
        # Bounded by the sender, which announces no more than two batches a transfer ahead.
        self._announced: queue.SimpleQueue[kv_pb2.FrameHeaders | None] = queue.SimpleQueue()
        self._open: dict[str, _Part] = {}
        """By transfer, until it is whole or has failed; no frame may tell of that."""
        self._thread = threading.Thread(target=self._run, name="kv-group", daemon=True)

    @abstractmethod
    def _enter(self) -> None:
        """Meet the sender. Called once, in the group's thread."""

    @abstractmethod
    def _receive(
        self, announced: kv_pb2.FrameHeaders, sizes_bytes: Sequence[int]
    ) -> Iterator[memoryview]:
        """Ready to take these payloads from now on; each is waited for when it is asked for."""

    @abstractmethod
    def _leave(self) -> None:
        """Give up what belongs to the group. Called last, in its thread."""

    def announce(self, announced: kv_pb2.FrameHeaders) -> None:
        self._announced.put(announced)

    def close(self) -> None:
        """Does not wait: the thread ends after what it receives, or at that one's deadline."""
        self._announced.put(None)

    def _run(self) -> None:
        reason = "the sender left the group"
        try:
            self._enter()
            self._take_all()
        except Exception as error:
            reason = f"the group broke: {str(error).partition(chr(10))[0]}"
            logger.warning("%s", reason)
        for transfer_id, part in list(self._open.items()):
            if not part.has_come:
                self._inbox.fail(transfer_id, reason)
        self._on_end(reason)
        self._leave()

    def _take_all(self) -> None:
        """Until the end of the stream. What is announced is received while what came before it is
        checked."""
        coming: deque[Iterator[Frame]] = deque()
        while True:
            try:
                announced = self._announced.get(block=not coming)
                if announced is None:
                    return
                coming.append(self._frames(announced))
            except queue.Empty:
                frame = next(coming[0], None)
                if frame is None:
                    coming.popleft()
                else:
                    self._take_frame(frame)

    def _frames(self, announced: kv_pb2.FrameHeaders) -> Iterator[Frame]:
        headers = [decode_header(encoded) for encoded in announced.headers]
        sizes = [size_bytes for _, size_bytes in headers if size_bytes]
        if any(size_bytes > PAYLOAD_BYTES_MAX for size_bytes in sizes):
            raise BadFrame(f"a payload of {max(sizes)} bytes")
        payloads = self._receive(announced, sizes)
        return (
            Frame(header, next(payloads) if size_bytes else memoryview(b""))
            for header, size_bytes in headers
        )

    def _take_frame(self, frame: Frame) -> None:
        transfer_id = frame.header.transfer_id
        match frame.header.WhichOneof("kind"):
            case "kv":
                part = self._open.get(transfer_id) or self._follow(transfer_id)
                try:
                    check_payload(frame.header, frame.payload)
                except BadFrame as error:
                    self._inbox.fail(transfer_id, str(error), HandoffFailure.WRONG)
                else:
                    state, _ = self._inbox.receive(frame)
                    part.has_come = state is TransferState.WHOLE
            case "end":
                ended = self._open.get(transfer_id)
                if ended is None or not ended.has_come:
                    self._inbox.fail(
                        transfer_id, "the sender's frames ended before the KV was whole"
                    )
            case "abort":
                self._inbox.receive(frame)
            case kind:
                raise BadFrame(f"a frame of kind {kind} in a group")

    def _follow(self, transfer_id: str) -> _Part:
        """Until it ends: at once if it is over."""
        part = self._open[transfer_id] = _Part()

        def forget(reason: str) -> None:
            self._open.pop(transfer_id, None)

        self._inbox.await_end(transfer_id, forget)
        return part
