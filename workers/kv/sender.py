"""Pushing KV to another worker's inbox: one gRPC stream a transfer, fed by the engine's thread.

A transfer's frames are sent when the inbox has given credit for all of it. Until then they wait
here, within a bound on the bytes of all transfers. Nobody holds the engine up for long: at that
bound, transfers that don't move are given up, and so is one that has made the engine wait too long.
What is given up is recomputed where it was to go.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc

from cluster.wire import GRPC_OPTIONS, kv_pb2, kv_pb2_grpc, worker_pb2
from workers.kv import collective
from workers.kv.collective import GroupBroken, OutgoingGroup, Place
from workers.kv.frames import encode_header, padding

logger = logging.getLogger(__name__)

PUSH_METHOD = "/baton.v1.KvInbox/Push"
PAIR_DEADLINE_S = 5.0
FRAME_BYTES_MAX = 2 << 20
"""Of KV in one frame, before it is coded."""
MESSAGE_BYTES_MIN = 1 << 20
"""A message with less takes the frames that wait behind it along."""
GRPC = "grpc"
"""The transport that every worker has: payloads in the transfer's own stream."""
REJOIN_AFTER_S = 10.0
"""After a group could not be made, payloads go by gRPC for this long."""
TRANSFER_KEY = "baton-transfer"
"""gRPC metadata of a push: the transfer's id."""
ENGINE_WAIT_MAX_S = 1.0
"""That one transfer may hold up the engine, waiting for room to stage its frames."""
STALLED_S = 0.5
"""A transfer of which nothing was sent for this long gives its room to others."""
RATE_ASSUMED_BYTES_S = 1e9
"""What a peer is taken to receive before anything was sent to it."""
RATE_SAMPLE_BYTES_MIN = 1 << 20
"""A smaller transfer tells more of delays than of the rate."""
RATE_WEIGHT = 0.3
"""Of the newest transfer in a peer's rate."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this worker is to the one that receives."""

    worker_id: str
    incarnation: str
    fingerprint: worker_pb2.Fingerprint


@dataclass(frozen=True, slots=True)
class Sent:
    transfer_id: str
    delivered: bool
    reason: str
    bytes: int
    credit_wait_s: float = 0.0


class _Peer:
    """A channel to one worker incarnation, paired before its first transfer."""

    def __init__(self, address: str, incarnation: str) -> None:
        self.address = address
        self.incarnation = incarnation
        self._said = ""
        self.channel = grpc.insecure_channel(address, options=GRPC_OPTIONS)
        self.push = self.channel.stream_stream(PUSH_METHOD, None, None)
        self._inbox = kv_pb2_grpc.KvInboxStub(self.channel)  # type: ignore[no-untyped-call]
        self._accepted: kv_pb2.PairReply | None = None
        self._group: OutgoingGroup | None = None
        self._group_lock = threading.Lock()
        self._no_group_until_s = 0.0
        self.rate_bytes_s = RATE_ASSUMED_BYTES_S

    def measured(self, sent_bytes: int, taken_s: float) -> None:
        """`taken_s`: while there was something to send."""
        if sent_bytes >= RATE_SAMPLE_BYTES_MIN and taken_s > 0:
            newest = sent_bytes / taken_s
            self.rate_bytes_s += RATE_WEIGHT * (newest - self.rate_bytes_s)

    def pair(self, request: kv_pb2.PairRequest, deadline_s: float) -> kv_pb2.PairReply:
        # Without a lock: who waits for another's pairing would outlive its own deadline.
        reply = self._accepted
        if reply is None:
            reply = self._inbox.Pair(request, timeout=min(PAIR_DEADLINE_S, deadline_s))
            if reply.accepted:
                self._accepted = reply
        return reply

    def group(self, member: kv_pb2.GroupMember, place: Place) -> OutgoingGroup | None:
        """The group with it, made when there is none. None: it cannot be made."""
        with self._group_lock:
            if self._group is not None and not self._group.broken:
                return self._group
            if time.monotonic() < self._no_group_until_s:
                return None
            try:
                self._group = OutgoingGroup(self._inbox.JoinGroup, member, place)
            except GroupBroken as error:
                self._no_group_until_s = time.monotonic() + REJOIN_AFTER_S
                self.say_once(f"no group with {self.address}, KV goes by gRPC: {error}")
                return None
            return self._group

    def say_once(self, what: str) -> None:
        if self._said != what:
            self._said = what
            logger.warning("collective transport: %s", what)

    def close(self) -> None:
        if self._group is not None:
            self._group.close("the worker is stopping, or its peer was replaced")
        self.channel.close()


@dataclass(frozen=True, slots=True)
class _Staged:
    """A frame that waits to be sent."""

    header: bytes
    payload: bytes | memoryview = b""
    size_bytes: int = 0
    """What it takes of the sender's bound."""
    end_token: int | None = None
    """Of the prompt, behind the last one whose KV it has."""


class Transfer:
    """One prompt's KV on its way. `push` may block, for ENGINE_WAIT_MAX_S in all."""

    def __init__(self, sender: Sender, send: worker_pb2.SendKv, deadline_s: float) -> None:
        self.transfer_id = send.transfer_id
        self._sender = sender
        self._send = send
        # Bounded by the bytes that `Sender.stage` lets through.
        self._frames: queue.SimpleQueue[_Staged | None] = queue.SimpleQueue()
        self._opened_at_s = time.monotonic()
        self._deadline_at_s = self._opened_at_s + deadline_s
        self._closed = False
        self._bytes = 0
        self._staged = 0
        self._moved_at_s = 0.0
        self._engine_waited_s = 0.0
        self._busy_s = 0.0
        self._credit_wait_s = 0.0
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
        if self._closed or self.done.is_set():
            return
        encoded = encode_header(header, len(payload))
        size_bytes = len(encoded) + len(payload)
        started_s = time.monotonic()
        wait_s = min(ENGINE_WAIT_MAX_S - self._engine_waited_s, self._remaining_s())
        if not self._sender.stage(size_bytes, wait_s, self.done):
            bound = self._sender.max_staged_bytes
            self.give_up(f"no room for more within {bound} bytes that wait to be sent")
            return
        with self._lock:
            now = time.monotonic()
            self._engine_waited_s += now - started_s
            if self.done.is_set():
                self._sender.unstage(size_bytes)
                return
            if self._staged == 0:
                self._moved_at_s = now
            self._staged += size_bytes
            self._bytes += len(payload)
        end_token = header.kv.first_token + header.kv.tokens
        self._frames.put(_Staged(encoded, payload, size_bytes, end_token))

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
        stands_s = now_s - self._moved_at_s
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
        sent = Sent(self.transfer_id, delivered, reason, self._bytes, self._credit_wait_s)
        self._sender.ended(self, sent)

    def _deliver(self) -> tuple[bool, str]:
        peer = self._sender.peer(self._send)
        paired = peer.pair(self._sender.pair_request(self._send), self._remaining_s())
        if not paired.accepted:
            return False, paired.reason
        self._group = self._sender.group(peer, paired)
        self._opened.transport = GRPC if self._group is None else collective.NAME
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
                self._credit_wait_s = time.monotonic() - self._opened_at_s
                self.held_tokens = reply.credit.held_tokens
                self.credit.set()
            else:
                result = reply.result
        peer.measured(self._bytes, self._busy_s)
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
            # Joined here and not when they were pushed: what waits is then in memory once, and each
            # message takes the memory that the one before has left warm.
            yield b"".join(
                part
                for frame in frames
                for part in (frame.header, frame.payload, padding(len(frame.payload)))
            )

    def _send_by(self, group: OutgoingGroup) -> None:
        """Two batches are under way at a time."""
        waits: deque[Callable[[], None]] = deque()
        try:
            for frames in self._batches(collective.BATCH_BYTES_MIN):
                headers = [frame.header for frame in frames]
                payloads = [memoryview(frame.payload) for frame in frames if frame.payload]
                waits.append(group.send(headers, payloads))
                if len(waits) > 1:
                    waits.popleft()()
            if not self.done.is_set():
                waits.append(group.send([self._header(end=kv_pb2.EndTransfer())], []))
            for wait in waits:
                wait()
        except GroupBroken as error:
            self.give_up(f"its group broke: {error}")

    def _batches(self, bytes_min: int) -> Iterator[list[_Staged]]:
        """The frames. Small ones that wait already come together. Whoever asks for the next has
        sent the one before."""
        while not self.done.is_set():
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
                started_s = time.monotonic()
                yield frames
                now = time.monotonic()
                self._busy_s += now - started_s
                self._moved_at_s = now
                self._unstage(size_bytes)
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


class Sender:
    """All transfers of this worker, and a bound on the bytes that wait to be sent."""

    def __init__(
        self,
        identity: Identity,
        max_staged_bytes: int,
        transfer_deadline_s: float,
        on_sent: Callable[[Sent], None],
        group_place: Place | None = None,
        auto: bool = False,
        heads: tuple[int, int] = (0, 0),
    ) -> None:
        """`group_place`: this end of the collective transport's groups. Without it, payloads go by
        gRPC. `auto`: a peer without that transport is nothing to warn of. `heads`: the first of
        those sent from here, and how many; 0 for all of the model."""
        self._identity = identity
        self._group_place = group_place
        self._auto = auto
        self.max_staged_bytes = max_staged_bytes
        self._deadline_s = transfer_deadline_s
        self._on_sent = on_sent
        self._first_head, self._heads = heads
        self._staged = 0
        self._room = threading.Condition()
        self._peers: dict[tuple[str, str], _Peer] = {}
        self._peers_lock = threading.Lock()
        self._transfers: set[Transfer] = set()

    @property
    def staged_bytes(self) -> int:
        return self._staged

    @property
    def transfers(self) -> int:
        return len(self._transfers)

    @property
    def peers(self) -> int:
        return len(self._peers)

    def open(self, send: worker_pb2.SendKv, tokens: int, prompt_digest: bytes) -> Transfer:
        transfer = Transfer(self, send, self._deadline_s)
        self._transfers.add(transfer)
        transfer.start(
            kv_pb2.OpenTransfer(
                tokens=tokens,
                prompt_digest=prompt_digest,
                from_worker_id=self._identity.worker_id,
                from_incarnation=self._identity.incarnation,
                to_incarnation=send.incarnation,
                expects_held=send.expects_held,
                first_head=self._first_head,
                heads=self._heads,
            )
        )
        return transfer

    def stage(self, size_bytes: int, wait_s: float, ended: threading.Event) -> bool:
        """Wait for room, or until the transfer has ended. A frame larger than the whole bound goes
        alone."""
        until_s = time.monotonic() + wait_s
        while True:
            with self._room:
                if ended.is_set():
                    return False
                if self._staged == 0 or self._staged + size_bytes <= self.max_staged_bytes:
                    self._staged += size_bytes
                    return True
                now = time.monotonic()
                if now >= until_s:
                    return False
                stalled = [t for t in list(self._transfers) if t.is_stalled(now)]
                if not stalled:
                    self._room.wait(min(until_s - now, STALLED_S / 4))
            for transfer in stalled:
                transfer.give_up(f"nothing of it was sent for {STALLED_S:g} s")

    def unstage(self, size_bytes: int) -> None:
        with self._room:
            self._staged -= size_bytes
            self._room.notify_all()

    def peer(self, send: worker_pb2.SendKv) -> _Peer:
        key = (send.address, send.incarnation)
        with self._peers_lock:
            peer = self._peers.get(key)
            if peer is None:
                for stale in [k for k in self._peers if k[0] == send.address]:
                    self._peers.pop(stale).close()
                peer = self._peers[key] = _Peer(send.address, send.incarnation)
            return peer

    def lost(self, send: worker_pb2.SendKv) -> None:
        """Nobody answers there: a worker that comes again has a new address or incarnation."""
        with self._peers_lock:
            peer = self._peers.pop((send.address, send.incarnation), None)
        if peer is not None:
            peer.channel.close()

    def instead_of(self, transport: str) -> str:
        """The transport that was asked for, if it is another."""
        strict = self._group_place is not None and not self._auto
        return collective.NAME if strict and transport != collective.NAME else ""

    def group(self, peer: _Peer, paired: kv_pb2.PairReply) -> OutgoingGroup | None:
        """None: payloads go by gRPC."""
        if self._group_place is None:
            return None
        if collective.NAME not in paired.transports:
            if not self._auto:
                peer.say_once(f"{peer.address} is not configured for it, KV goes by gRPC")
            return None
        member = kv_pb2.GroupMember(
            worker_id=self._identity.worker_id,
            incarnation=self._identity.incarnation,
            to_incarnation=peer.incarnation,
        )
        return peer.group(member, self._group_place)

    def estimated_s(self, send: worker_pb2.SendKv, size_bytes: int) -> float:
        """How long a transfer would take if all of it were there to be sent."""
        return size_bytes / self.peer(send).rate_bytes_s

    def pair_request(self, send: worker_pb2.SendKv) -> kv_pb2.PairRequest:
        return kv_pb2.PairRequest(
            worker_id=self._identity.worker_id,
            incarnation=self._identity.incarnation,
            fingerprint=self._identity.fingerprint,
            to_worker_id=send.worker_id,
            to_incarnation=send.incarnation,
        )

    def ended(self, transfer: Transfer, sent: Sent) -> None:
        self._transfers.discard(transfer)
        self._on_sent(sent)

    def close(self, timeout_s: float = 2.0) -> None:
        for transfer in list(self._transfers):
            transfer.abort("the worker is stopping")
        with self._peers_lock:
            peers, self._peers = list(self._peers.values()), {}
        deadline_at_s = time.monotonic() + timeout_s
        for transfer in list(self._transfers):
            transfer.join(max(0.0, deadline_at_s - time.monotonic()))
        for peer in peers:
            peer.close()


def log_undelivered(sent: Sent) -> None:
    if not sent.delivered:
        logger.warning("transfer %s was not delivered: %s", sent.transfer_id, sent.reason)


def _describe(error: grpc.RpcError) -> str:
    if isinstance(error, grpc.Call):
        return f"{error.code().name}: {error.details()}"
    return str(error)
