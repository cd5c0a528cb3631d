"""Pushing KV to other workers' inboxes: all transfers of this worker, and what bounds them.

A transfer's frames are sent when the inbox has given credit for all of it. Until then they wait
here, within a bound on the bytes of all transfers. Nobody holds the engine up for long: at that
bound, transfers that don't move are given up, and so is one that has made the engine wait too long.
What is given up is recomputed where it was to go.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cluster.wire import kv_pb2, worker_pb2
from workers.kv.group import OutgoingGroup, Transport
from workers.kv.peer import RATE_ASSUMED_BYTES_S, Peer
from workers.kv.sending import Sending
from workers.kv.transfer import GRPC, STALLED_S, Sent, Transfer

AUTO = "auto"
PEER_IDLE_S = 600.0
"""A peer that nothing is sent to for this long may be gone. One that is not is met again."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this worker is to the one that receives."""

    worker_id: str
    incarnation: str
    fingerprint: worker_pb2.Fingerprint


class Sender:
    """All transfers of this worker, and a bound on the bytes that wait to be sent."""

    def __init__(
        self,
        identity: Identity,
        max_staged_bytes: int,
        transfer_deadline_s: float,
        on_sent: Callable[[Sent], None],
        transports: Sequence[Transport] = (),
        wanted: str = GRPC,
        heads: tuple[int, int] = (0, 0),
        on_change: Callable[[Sending], None] | None = None,
    ) -> None:
        """`transports`: the ways beside gRPC to be tried, the best first. `wanted`: the one asked
        for, or `auto`: then a peer without one is nothing to warn of. `heads`: the first of
        those sent from here, and how many; 0 for all of the model. `on_change` is told what is
        held whenever it is more or less than before."""
        self._identity = identity
        self._transports = transports
        self._wanted = wanted
        self.max_staged_bytes = max_staged_bytes
        self._deadline_s = transfer_deadline_s
        self._on_sent = on_sent
        self._first_head, self._heads = heads
        self._on_change = on_change
        self._staged = 0
        self._room = threading.Condition()
        self._peers: dict[tuple[str, str], Peer] = {}
        self._peers_lock = threading.Lock()
        self._transfers: set[Transfer] = set()

    @property
    def sending(self) -> Sending:
        return Sending(len(self._transfers), self._staged, len(self._peers))

    def _changed(self) -> None:
        if self._on_change is not None:
            self._on_change(self.sending)

    def open(self, send: worker_pb2.SendKv, tokens: int, prompt_digest: bytes) -> Transfer:
        transfer = Transfer(self, send, self._deadline_s)
        self._transfers.add(transfer)
        self._changed()
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
                    self._changed()
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
            self._changed()
            self._room.notify_all()

    def peer(self, send: worker_pb2.SendKv) -> Peer:
        key = (send.address, send.incarnation)
        with self._peers_lock:
            peer = self._peers.get(key)
            is_new = peer is None
            if peer is None:
                peer = self._peers[key] = Peer(send.worker_id, *key)
                self._changed()
            peer.asked_for_at_s = time.monotonic()
        if is_new:
            self._leave_peers()
        return peer

    def _leave_peers(self) -> None:
        """Those whose worker has started anew or may be gone, when nothing is on its way there."""
        idle_since_s = time.monotonic() - PEER_IDLE_S
        with self._peers_lock:
            used = {transfer.to for transfer in list(self._transfers)}
            newest = {peer.worker_id: peer for peer in self._peers.values()}
            left = [
                key
                for key, peer in self._peers.items()
                if key not in used
                and (newest[peer.worker_id] is not peer or peer.asked_for_at_s < idle_since_s)
            ]
            peers = [self._peers.pop(key) for key in left]
            if peers:
                self._changed()
        for peer in peers:
            peer.close()

    def lost(self, send: worker_pb2.SendKv) -> None:
        """Nobody answers there: a worker that comes again has a new address or incarnation."""
        with self._peers_lock:
            peer = self._peers.pop((send.address, send.incarnation), None)
            self._changed()
        if peer is not None:
            peer.channel.close()

    def instead_of(self, transport: str) -> str:
        """The transport that was asked for, if it is another."""
        return "" if self._wanted in (AUTO, transport) else self._wanted

    def group(self, peer: Peer, paired: kv_pb2.PairReply) -> OutgoingGroup | None:
        """None: payloads go by gRPC."""
        common = [each for each in self._transports if each.name in paired.transports]
        if self._wanted != AUTO:
            for transport in self._transports:
                if transport not in common:
                    lacks = f"{peer.address} is not configured for it or lacks it"
                    peer.say_once(transport.name, f"{lacks}, KV goes by gRPC")
        if not common:
            return None
        member = kv_pb2.GroupMember(
            worker_id=self._identity.worker_id,
            incarnation=self._identity.incarnation,
            to_incarnation=peer.incarnation,
        )
        return peer.group(member, common)

    def estimated_s(self, send: worker_pb2.SendKv, size_bytes: int) -> float:
        """How long a transfer would take if all of it were there to be sent."""
        # Without making a peer: where ranks send, this process does not.
        peer = self._peers.get((send.address, send.incarnation))
        return size_bytes / (RATE_ASSUMED_BYTES_S if peer is None else peer.rate_bytes_s)

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
        self._changed()
        self._leave_peers()
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
