"""One prompt's KV on its way to another worker's inbox: a gRPC stream, which the engine's thread
feeds."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc

from cluster.wire import kv_pb2, worker_pb2
from workers.kv.frames import encode_header, padding
from workers.kv.group import GroupBroken, OutgoingGroup

if TYPE_CHECKING:
    from workers.kv.sender import Sender

logger = logging.getLogger(__name__)

FRAME_BYTES_MAX = 2 << 20
"""Of KV in one frame, before it is coded."""
MESSAGE_BYTES_MIN = 1 << 20
"""A message with less takes the frames that wait behind it along."""
GRPC = "grpc"
"""The transport that every worker has: payloads in the transfer's own stream."""
TRANSFER_KEY = "baton-transfer"
"""gRPC metadata of a push: the transfer's id."""
ENGINE_WAIT_MAX_S = 1.0
"""That one transfer may hold up the engine, waiting for room to stage its frames."""
STALLED_S = 0.5
"""A transfer of which nothing was sent for this long gives its room to others."""


@dataclass(frozen=True, slots=True)
class Sent:
    transfer_id: str
    delivered: bool
    reason: str
    bytes: int


@dataclass(frozen=True, slots=True)
class _Staged:
    """A frame that waits to be sent."""

    header: bytes
    payload: bytes | memoryview = b""
    frame: bytes = b""
    """Both of them and their padding, if they were put together already."""
    size_bytes: int = 0
    """What it takes of the sender's bound."""
    end_token: int | None = None
    """Of the prompt, behind the last one whose KV it has."""

    def parts(self) -> tuple[bytes | memoryview, ...]:
        """That make the frame."""
        if self.frame:
            return (self.frame,)
        return self.header, self.payload, padding(len(self.payload))


@dataclass(frozen=True, slots=True)
class _Posted:
    """A batch that a group has under way."""

    sent: Iterator[int]
    """Each step waits for some of its bytes."""
    size_bytes: int
    started_s: float


class Transfer:
    """One prompt's KV on its way. `push` may block, for ENGINE_WAIT_MAX_S in all."""

    def __init__(self, sender: Sender, send: worker_pb2.SendKv, deadline_s: float) -> None:
        self.transfer_id = send.transfer_id
        self.to = (send.address, send.incarnation)
        self._sender = sender
        self._send = send
        # Bounded by the bytes that `Sender.stage` lets through.
        self._frames: queue.SimpleQueue[_Staged | None] = queue.SimpleQueue()
        self._deadline_at_s = time.monotonic() + deadline_s
        self._closed = False
        self._bytes = 0
        self._staged = 0
        self._moved_at_s = 0.0
        self._engine_waited_s = 0.0
        self._moved_bytes = 0
        self._busy_s = 0.0
        """That `_moved_bytes` took."""
        self._busy_until_s = 0.0
        self._under_way: deque[_Posted] = deque()
        self.held_tokens = 0
        """The prompt's first tokens, which the receiver has. Known when it gives credit."""
        self.credit = threading.Event()
        """Also set when there is none to be waited for any more."""
        self._opened = kv_pb2.OpenTransfer()
        self._group: OutgoingGroup | None = None
        self._call: grpc.Call | None = None
        self._given_up = ""
        self._lock = threading.Lock()
        self.done = threading.Event()
        self._thread = threading.Thread(
            target=self._run, name=f"kv-send-{send.transfer_id[:8]}", daemon=True
        )

    def start(self, opened: kv_pb2.OpenTransfer) -> None:
        self._opened = opened
        self._thread.start()

    def push(self, header: kv_pb2.FrameHeader, payload: memoryview) -> None:
        """Stage one frame. A transfer that already ended takes it and forgets it.

        The payload is copied when gRPC asks for it: until then it must stay as it is.
        """
        encoded = encode_header(header, len(payload))
        if self._makes_room(len(encoded), len(payload)):
            self._put(header, encoded, payload)

    def push_copy(self, header: kv_pb2.FrameHeader, parts: Sequence[memoryview]) -> None:
        """As `push`, of a payload in parts that may change afterwards: the only copy of it is made
        at once."""
        payload_bytes = sum(len(part) for part in parts)
        encoded = encode_header(header, payload_bytes)
        if self._makes_room(len(encoded), payload_bytes):
            frame = b"".join((encoded, *parts, padding(payload_bytes)))
            payload = memoryview(frame)[len(encoded) : len(encoded) + payload_bytes]
            self._put(header, encoded, payload, frame)

    def _makes_room(self, header_bytes: int, payload_bytes: int) -> bool:
        """For a frame that is to be staged; False if it is of no use any more."""
        if self._closed or self.done.is_set():
            return False
        size_bytes = header_bytes + payload_bytes
        started_s = time.monotonic()
        wait_s = min(ENGINE_WAIT_MAX_S - self._engine_waited_s, self._remaining_s())
        if not self._sender.stage(size_bytes, wait_s, self.done):
            bound = self._sender.max_staged_bytes
            self.give_up(f"no room for more within {bound} bytes that wait to be sent")
            return False
        with self._lock:
            now = time.monotonic()
            self._engine_waited_s += now - started_s
            if self.done.is_set():
                self._sender.unstage(size_bytes)
                return False
            if self._staged == 0:
                self._moved_at_s = now
            self._staged += size_bytes
            self._bytes += payload_bytes
        return True

    def _put(
        self,
        header: kv_pb2.FrameHeader,
        encoded: bytes,
        payload: memoryview,
        frame: bytes = b"",
    ) -> None:
        end_token = header.kv.first_token + header.kv.tokens
        size_bytes = len(encoded) + len(payload)
        self._frames.put(_Staged(encoded, payload, frame, size_bytes, end_token))

    def finish(self) -> None:
        """All frames are pushed."""
        if not self._closed:
            self._closed = True
            self._frames.put(None)

    def abort(self, reason: str) -> None:
        """Tell the receiver that the rest will not come."""
        if self._closed:
            return
        if not self.credit.is_set():
            # The receiver reads nothing yet.
            self.give_up(reason)
            return
        self._discard_frames()
        self._frames.put(_Staged(self._header(abort=kv_pb2.AbortTransfer(reason=reason))))
        self.finish()

    def give_up(self, reason: str) -> None:
        """Break it off, and free what waits to be sent."""
        with self._lock:
            self._closed = True
            self._given_up = self._given_up or reason
            call = self._call
        if call is not None:
            call.cancel()  # type: ignore[no-untyped-call]

    def is_stalled(self, now_s: float) -> bool:
        moved_at_s = self._moved_at_s
        if self._group is not None and self._under_way:
            # It may only be behind another transfer's.
            moved_at_s = max(moved_at_s, self._group.moved_at_s)
        stands_s = now_s - moved_at_s
        return self._staged > 0 and stands_s >= STALLED_S and not self._given_up

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            delivered, reason = self._deliver()
        except grpc.RpcError as error:
            delivered, reason = False, f"{self._send.address}: {_describe(error)}"
            if isinstance(error, grpc.Call) and error.code() is grpc.StatusCode.UNAVAILABLE:
                self._sender.lost(self._send)
        except Exception as error:
            logger.exception("transfer %s failed", self.transfer_id)
            delivered, reason = False, str(error)
        if self._given_up and not delivered:
            reason = f"the sender gave up: {self._given_up}"
        with self._lock:
            self.done.set()
        # gRPC's thread may still wait for credit or for a frame.
        self.credit.set()
        self._discard_frames()
        self._frames.put(None)
        self._sender.ended(self, Sent(self.transfer_id, delivered, reason, self._bytes))

    def _deliver(self) -> tuple[bool, str]:
        peer = self._sender.peer(self._send)
        paired = peer.pair(self._sender.pair_request(self._send), self._remaining_s())
        if not paired.accepted:
            return False, paired.reason
        self._group = self._sender.group(peer, paired)
        self._opened.transport = GRPC if self._group is None else self._group.transport
        self._opened.instead_of = self._sender.instead_of(self._opened.transport)
        metadata = ((TRANSFER_KEY, self.transfer_id),)
        call = peer.push(self._messages(), timeout=self._remaining_s(), metadata=metadata)
        with self._lock:
            self._call = call
        if self._given_up:
            call.cancel()  # type: ignore[no-untyped-call]
        result = kv_pb2.TransferResult(reason="the receiver ended the stream without an answer")
        for encoded in call:
            reply = kv_pb2.PushReply.FromString(encoded)
            if reply.HasField("credit"):
                self.held_tokens = reply.credit.held_tokens
                self.credit.set()
            else:
                result = reply.result
        peer.measured(self._moved_bytes, self._busy_s)
        return result.delivered, result.reason

    def _remaining_s(self) -> float:
        return max(0.0, self._deadline_at_s - time.monotonic())

    def _discard_frames(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._frames.get_nowait()
        with self._lock:
            staged, self._staged = self._staged, 0
        self._sender.unstage(staged)

    def _messages(self) -> Iterator[bytes]:
        """What opens the transfer; and when there is credit, the frames, if they go this way."""
        yield self._header(open=self._opened)
        if not self.credit.wait(self._remaining_s()):
            return
        if self._group is not None:
            self._send_by(self._group)
            return
        for frames in self._batches(MESSAGE_BYTES_MIN):
            started_s = time.monotonic()
            # Joined here and not when they were pushed: what waits is then in memory once, and each
            # message takes the memory that the one before has left warm.
            parts = [part for frame in frames for part in frame.parts()]
            # A frame that is whole already is not copied again.
            yield b"".join(parts)
            # gRPC asks for the next when it has sent this one.
            self._moved(_size_bytes(frames), started_s)

    def _send_by(self, group: OutgoingGroup) -> None:
        """Two batches are under way at a time. What is said of a batch is said when it was sent:
        that a group has taken it on says nothing."""
        try:
            for frames in self._batches(group.batch_bytes_min, self._finish_batches):
                self._post(group, frames)
                self._finish_batches(1)
            if not self.done.is_set():
                self._post(group, [_Staged(self._header(end=kv_pb2.EndTransfer()))])
            self._finish_batches()
        except GroupBroken as error:
            self.give_up(f"its group broke: {error}")

    def _post(self, group: OutgoingGroup, frames: Sequence[_Staged]) -> None:
        started_s = time.monotonic()
        headers = [frame.header for frame in frames]
        payloads = [memoryview(frame.payload) for frame in frames if frame.payload]
        sent = group.send(headers, payloads)
        self._under_way.append(_Posted(sent, _size_bytes(frames), started_s))

    def _finish_batches(self, leave: int = 0) -> None:
        """Wait for those under way, but for the newest."""
        while len(self._under_way) > leave:
            posted = self._under_way[0]
            left_bytes = posted.size_bytes
            for sent_bytes in posted.sent:
                left_bytes -= sent_bytes
                self._moved(sent_bytes, posted.started_s)
            self._moved(left_bytes, posted.started_s)
            self._under_way.popleft()

    def _moved(self, size_bytes: int, started_s: float) -> None:
        now = time.monotonic()
        self._busy_s += now - max(started_s, self._busy_until_s)
        self._busy_until_s = self._moved_at_s = now
        self._moved_bytes += size_bytes
        if self._group is not None:
            self._group.moved_at_s = now
        self._unstage(size_bytes)

    def _batches(
        self, bytes_min: int, before_waiting: Callable[[], None] = lambda: None
    ) -> Iterator[list[_Staged]]:
        """The frames. Small ones that wait already come together."""
        while not self.done.is_set():
            if self._frames.empty():
                before_waiting()
            try:
                frame = self._frames.get(timeout=self._remaining_s())
            except queue.Empty:
                return
            frames: list[_Staged] = []
            size_bytes = 0
            while frame is not None:
                if frame.end_token is not None and frame.end_token <= self.held_tokens:
                    # Staged before that was known.
                    self._unstage(frame.size_bytes)
                    self._bytes -= len(frame.payload)
                    if self._frames.empty():
                        break
                    frame = self._frames.get()
                    continue
                frames.append(frame)
                size_bytes += frame.size_bytes
                if size_bytes >= bytes_min or self._frames.empty():
                    break
                frame = self._frames.get()
            if frames:
                yield frames
            if frame is None:
                return

    def _unstage(self, size_bytes: int) -> None:
        with self._lock:
            size_bytes = min(size_bytes, self._staged)
            self._staged -= size_bytes
        self._sender.unstage(size_bytes)

    def _header(self, **kind: Any) -> bytes:
        header = kv_pb2.FrameHeader(transfer_id=self.transfer_id, **kind)
        return encode_header(header, 0)


def _size_bytes(frames: Sequence[_Staged]) -> int:
    return sum(frame.size_bytes for frame in frames)


def _describe(error: grpc.RpcError) -> str:
    if isinstance(error, grpc.Call):
        return f"{error.code().name}: {error.details()}"
    return str(error)
