"""A worker that KV is sent to: its channel, its groups, and how fast it receives."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence

import grpc

from cluster.wire import GRPC_OPTIONS, kv_pb2, kv_pb2_grpc
from workers.kv.group import GroupBroken, OutgoingGroup, Transport

logger = logging.getLogger(__name__)

PUSH_METHOD = "/baton.v1.KvInbox/Push"
PAIR_DEADLINE_S = 5.0
RETRY_AFTER_S = 10.0
"""A peer that has not answered is not waited for again for this long; after a group could not be
made, or broke, payloads go another way for so long."""
RATE_ASSUMED_BYTES_S = 1e9
"""What a peer is taken to receive before anything was sent to it."""
RATE_SAMPLE_BYTES_MIN = 1 << 20
"""A smaller transfer tells more of delays than of the rate."""
RATE_WEIGHT = 0.3
"""Of the newest transfer in a peer's rate."""


class Peer:
    """A channel to one worker incarnation, paired before its first transfer."""

    def __init__(self, worker_id: str, address: str, incarnation: str) -> None:
        self.worker_id = worker_id
        self.address = address
        self.incarnation = incarnation
        self._said: dict[str, str] = {}
        """By transport."""
        self.channel = grpc.insecure_channel(address, options=GRPC_OPTIONS)
        self.push = self.channel.stream_stream(PUSH_METHOD, None, None)
        self._inbox = kv_pb2_grpc.KvInboxStub(self.channel)  # type: ignore[no-untyped-call]
        self._accepted: kv_pb2.PairReply | None = None
        self._silent_until_s = 0.0
        self._groups: dict[str, OutgoingGroup] = {}
        self._groups_lock = threading.Lock()
        self._no_group_until_s: dict[str, float] = {}
        self.rate_bytes_s = RATE_ASSUMED_BYTES_S
        self.asked_for_at_s = time.monotonic()

    def measured(self, sent_bytes: int, taken_s: float) -> None:
        """`taken_s`: while there was something to send."""
        if sent_bytes >= RATE_SAMPLE_BYTES_MIN and taken_s > 0:
            newest = sent_bytes / taken_s
            self.rate_bytes_s += RATE_WEIGHT * (newest - self.rate_bytes_s)

    def pair(self, request: kv_pb2.PairRequest, deadline_s: float) -> kv_pb2.PairReply:
        """
        Raises:
            grpc.RpcError: it cannot be reached, or has not answered in time.
        """
        # Without a lock: who waits for another's pairing would outlive its own deadline.
        if self._accepted is not None:
            return self._accepted
        if time.monotonic() < self._silent_until_s:
            return kv_pb2.PairReply(
                reason=f"{self.address} did not answer within {PAIR_DEADLINE_S:g} s, and is not "
                f"asked again for {RETRY_AFTER_S:g} s"
            )
        try:
            reply: kv_pb2.PairReply = self._inbox.Pair(
                request, timeout=min(PAIR_DEADLINE_S, deadline_s)
            )
        except grpc.RpcError as error:
            if deadline_s >= PAIR_DEADLINE_S and _is_late(error):
                # Where no packets arrive, every transfer would wait as long, and its KV with it.
                self._silent_until_s = time.monotonic() + RETRY_AFTER_S
            raise
        if reply.accepted:
            self._accepted = reply
        return reply

    def group(
        self, member: kv_pb2.GroupMember, transports: Sequence[Transport]
    ) -> OutgoingGroup | None:
        """A group with it, of the first of these transports that can make one. None: of no one."""
        with self._groups_lock:
            for transport in transports:
                group = self._group_of(transport, member)
                if group is not None:
                    return group
            return None

    def _group_of(self, transport: Transport, member: kv_pb2.GroupMember) -> OutgoingGroup | None:
        name = transport.name
        if time.monotonic() < self._no_group_until_s.get(name, 0.0):
            return None
        reason = ""
        group = self._groups.pop(name, None)
        if group is None:
            member.transport = name
            try:
                group = transport.join(self._inbox.JoinGroup, member)
            except GroupBroken as error:
                reason = f"no group with {self.address}: {error}"
        elif group.broken:
            reason = f"the group with {self.address} broke: {group.broken}"
        if group is None or reason:
            self._no_group_until_s[name] = time.monotonic() + RETRY_AFTER_S
            self.say_once(name, f"{reason}; KV goes another way for {RETRY_AFTER_S:g} s")
            return None
        self._groups[name] = group
        return group

    def say_once(self, transport: str, what: str) -> None:
        if self._said.get(transport) != what:
            self._said[transport] = what
            logger.warning("%s transport: %s", transport, what)

    def close(self) -> None:
        for group in list(self._groups.values()):
            group.close("the worker is stopping, or its peer is not needed any more")
        self.channel.close()


def _is_late(error: grpc.RpcError) -> bool:
    return isinstance(error, grpc.Call) and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
