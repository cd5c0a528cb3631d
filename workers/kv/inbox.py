"""The inbox: KV that prefill workers pushed here, until a decode leg adopts it.

A transfer is whole when every layer, KV head and token of the prompt has arrived exactly once,
undamaged, from the incarnation that opened it. Anything else fails it, and a failed transfer is
recomputed, never adopted in part. All of this is bookkeeping over bytes: no gRPC, no vLLM, and the
clock is handed in, so the fault tests drive it directly.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from cluster.wire import kv_pb2
from workers.kv.codecs import GroupCodec, group_codec
from workers.kv.frames import Frame


class TransferState(enum.Enum):
    ARRIVING = "arriving"
    WHOLE = "whole"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class KvGeometry:
    """What one token's KV looks like on this worker (or on this rank of it)."""

    layers: int
    first_head: int
    heads: int
    head_size: int
    element_bytes: int

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.layers * self.heads * self.head_size * self.element_bytes

    def frame_bytes(self, tokens: int, heads: int, codec: GroupCodec | None = None) -> int:
        """Bytes of one layer's keys and values."""
        if codec is not None:
            return codec.payload_bytes(tokens, heads, self.head_size)
        return 2 * tokens * heads * self.head_size * self.element_bytes


@dataclass(frozen=True, slots=True)
class Settled:
    """A transfer that is whole or has failed."""

    transfer_id: str
    whole: bool
    reason: str
    bytes: int
    tokens: int
    wire_s: float


@dataclass(slots=True)
class _Transfer:
    transfer_id: str
    changed_at_s: float
    state: TransferState = TransferState.ARRIVING
    reason: str = ""
    open: kv_pb2.OpenTransfer | None = None
    first_frame_at_s: float = 0.0
    last_frame_at_s: float = 0.0
    bytes: int = 0
    """What it takes of the budget: the payloads that came, and the rest as if it came uncoded."""
    missing_head_tokens: int = 0
    """Layer x head x token cells still to come."""
    frames: dict[int, list[Frame]] = field(default_factory=dict)
    on_settled: Callable[[Settled], None] | None = None
    expected_sender: tuple[str, str] | None = None

    def settled(self) -> Settled:
        return Settled(
            transfer_id=self.transfer_id,
            whole=self.state is TransferState.WHOLE,
            reason=self.reason,
            bytes=self.bytes,
            tokens=self.open.tokens if self.open else 0,
            wire_s=self.last_frame_at_s - self.first_frame_at_s if self.open else 0.0,
        )


class Inbox:
    """Transfers by id, within a budget of bytes. Safe to call from several threads.

    `max_idle_s` bounds how long a transfer stays without a frame, a claim or an adoption: its
    sender or its router is gone.
    """

    def __init__(
        self,
        geometry: KvGeometry,
        incarnation: str,
        max_bytes: int,
        max_idle_s: float,
        clock: Callable[[], float],
    ) -> None:
        self.geometry = geometry
        self.incarnation = incarnation
        self.max_bytes = max_bytes
        self._max_idle_s = max_idle_s
        self._clock = clock
        self._lock = threading.Lock()
        self._transfers: dict[str, _Transfer] = {}
        self._over: dict[str, float] = {}
        """Dropped or adopted, and when: what still comes of them is refused."""
        self._bytes = 0

    @property
    def bytes_held(self) -> int:
        return self._bytes

    @property
    def transfers_held(self) -> int:
        return len(self._transfers)

    def receive(self, frame: Frame) -> tuple[TransferState, str]:
        """Take a frame in. Returns whether going on makes sense, and if not, why."""
        transfer_id = frame.header.transfer_id
        with self._lock:
            if transfer_id in self._over:
                return TransferState.FAILED, "the transfer is over"
            transfer = self._get(transfer_id)
            if transfer.state is TransferState.ARRIVING:
                reason = self._take(transfer, frame)
                if reason:
                    self._fail(transfer, reason)
            elif (
                transfer.state is TransferState.WHOLE and frame.header.WhichOneof("kind") != "abort"
            ):
                self._fail(transfer, "a frame arrived after the transfer was whole")
            callback, settled = self._notice(transfer)
            state = transfer.state
        if callback:
            callback(settled)
        return state, settled.reason

    def expect(
        self,
        transfer_id: str,
        sender: tuple[str, str],
        on_settled: Callable[[Settled], None],
    ) -> None:
        """A decode leg claims the transfer. `on_settled` is called once, maybe at once."""
        with self._lock:
            if transfer_id in self._over:
                settled: Settled | None = Settled(
                    transfer_id, False, "the transfer is over", 0, 0, 0.0
                )
            else:
                settled = None
                transfer = self._get(transfer_id)
                transfer.changed_at_s = self._clock()
                transfer.on_settled = on_settled
                transfer.expected_sender = sender
                if transfer.open is not None and self._sender(transfer.open) != sender:
                    self._fail(transfer, self._foreign_sender(transfer.open, sender))
                callback, noticed = self._notice(transfer)
        if settled is not None:
            on_settled(settled)
        elif callback:
            callback(noticed)

    def peek(self, transfer_id: str) -> tuple[int, bytes] | None:
        """Tokens and prompt digest of a whole transfer."""
        with self._lock:
            transfer = self._transfers.get(transfer_id)
            if transfer is None or transfer.state is not TransferState.WHOLE:
                return None
            assert transfer.open is not None
            return transfer.open.tokens, transfer.open.prompt_digest

    def take(self, transfer_id: str) -> dict[int, list[Frame]] | None:
        """The frames of a whole transfer by layer; the inbox holds nothing of it afterwards."""
        with self._lock:
            transfer = self._transfers.get(transfer_id)
            if transfer is None or transfer.state is not TransferState.WHOLE:
                return None
            self._forget(transfer)
            self._over[transfer_id] = self._clock()
            return transfer.frames

    def drop(self, transfer_id: str, reason: str) -> None:
        """Free what a transfer holds; frames that still come are refused."""
        with self._lock:
            transfer = self._transfers.get(transfer_id)
            self._over[transfer_id] = self._clock()
            if transfer is None:
                return
            if transfer.state is not TransferState.FAILED:
                self._fail(transfer, reason)
            callback, settled = self._notice(transfer)
            self._forget(transfer)
        if callback:
            callback(settled)

    def fail(self, transfer_id: str, reason: str) -> None:
        """The sender's stream broke, or the claim's deadline passed."""
        with self._lock:
            transfer = self._transfers.get(transfer_id)
            if transfer is None or transfer.state is not TransferState.ARRIVING:
                return
            self._fail(transfer, reason)
            callback, settled = self._notice(transfer)
        if callback:
            callback(settled)

    def sweep(self) -> list[str]:
        """Fail and forget transfers nobody touched for `max_idle_s`. Returns their ids."""
        now = self._clock()
        with self._lock:
            idle = [t for t in self._transfers.values() if now - t.changed_at_s > self._max_idle_s]
            for old in [i for i, at in self._over.items() if now - at > 4 * self._max_idle_s]:
                del self._over[old]
        for transfer in idle:
            self.drop(transfer.transfer_id, f"nobody touched it for {self._max_idle_s:g} s")
        return [transfer.transfer_id for transfer in idle]

    def _get(self, transfer_id: str) -> _Transfer:
        transfer = self._transfers.get(transfer_id)
        if transfer is None:
            transfer = _Transfer(transfer_id, changed_at_s=self._clock())
            self._transfers[transfer_id] = transfer
        return transfer

    def _take(self, transfer: _Transfer, frame: Frame) -> str:
        """Returns why the transfer fails, or an empty string."""
        now = self._clock()
        transfer.changed_at_s = transfer.last_frame_at_s = now
        kind = frame.header.WhichOneof("kind")
        if kind == "open":
            return self._take_open(transfer, frame.header.open, now)
        if kind == "abort":
            return f"the sender gave up: {frame.header.abort.reason}"
        if transfer.open is None:
            return "a frame arrived before the transfer was opened"
        return self._take_kv(transfer, frame)

    def _take_open(self, transfer: _Transfer, opened: kv_pb2.OpenTransfer, now: float) -> str:
        if transfer.open is not None:
            return "the transfer was opened twice"
        if opened.to_incarnation != self.incarnation:
            return (
                f"it is meant for incarnation {opened.to_incarnation}, this is {self.incarnation}"
            )
        expected = transfer.expected_sender
        if expected is not None and self._sender(opened) != expected:
            return self._foreign_sender(opened, expected)
        whole_bytes = opened.tokens * self.geometry.bytes_per_token
        if self._bytes + whole_bytes > self.max_bytes:
            return (
                f"the inbox is full: {whole_bytes} bytes asked, "
                f"{self.max_bytes - self._bytes} of {self.max_bytes} free"
            )
        transfer.open = opened
        transfer.first_frame_at_s = now
        transfer.bytes = whole_bytes
        transfer.missing_head_tokens = opened.tokens * self.geometry.heads * self.geometry.layers
        self._bytes += whole_bytes
        return ""

    def _take_kv(self, transfer: _Transfer, frame: Frame) -> str:
        assert transfer.open is not None
        kv, geometry = frame.header.kv, self.geometry
        try:
            codec = group_codec(kv.codec)
        except KeyError:
            return f"codec {kv.codec} is not known here"
        if kv.key_order not in kv_pb2.KeyOrder.values():
            return f"key order {kv.key_order} is not known here"
        if kv.layer >= geometry.layers:
            return f"layer {kv.layer} of a model of {geometry.layers} layers"
        if kv.tokens == 0 or kv.first_token + kv.tokens > transfer.open.tokens:
            return (
                f"tokens {kv.first_token} to {kv.first_token + kv.tokens} "
                f"of a prompt of {transfer.open.tokens}"
            )
        last_head = geometry.first_head + geometry.heads
        if (
            kv.heads == 0
            or kv.first_head < geometry.first_head
            or kv.first_head + kv.heads > last_head
        ):
            return (
                f"KV heads {kv.first_head} to {kv.first_head + kv.heads}, "
                f"this worker holds {geometry.first_head} to {last_head}"
            )
        payload_bytes = geometry.frame_bytes(kv.tokens, kv.heads, codec)
        if len(frame.payload) != payload_bytes:
            return f"a payload of {len(frame.payload)} bytes where {payload_bytes} belong"
        spared_bytes = geometry.frame_bytes(kv.tokens, kv.heads) - payload_bytes
        if spared_bytes < 0:
            return f"codec {kv.codec} makes KV of this shape larger"
        if codec is not None and kv.key_order != kv_pb2.KEY_ORDER_TOKENS_CHANNELS:
            return f"codec {kv.codec} with key order {kv.key_order}"
        present = transfer.frames.setdefault(kv.layer, [])
        if any(_overlap(kv, other.header.kv) for other in present):
            return f"layer {kv.layer}, tokens from {kv.first_token} arrived twice"
        present.append(frame)
        transfer.bytes -= spared_bytes
        self._bytes -= spared_bytes
        transfer.missing_head_tokens -= kv.tokens * kv.heads
        if transfer.missing_head_tokens == 0:
            transfer.state = TransferState.WHOLE
        return ""

    def _fail(self, transfer: _Transfer, reason: str) -> None:
        if transfer.open is not None:
            self._bytes -= transfer.bytes
            transfer.open = None
        transfer.state = TransferState.FAILED
        transfer.reason = reason
        transfer.frames = {}
        transfer.bytes = 0

    def _forget(self, transfer: _Transfer) -> None:
        if transfer.open is not None:
            self._bytes -= transfer.bytes
        del self._transfers[transfer.transfer_id]

    def _notice(self, transfer: _Transfer) -> tuple[Callable[[Settled], None] | None, Settled]:
        """The claim's callback, once, when the transfer is settled."""
        callback = None
        if transfer.state is not TransferState.ARRIVING:
            callback, transfer.on_settled = transfer.on_settled, None
        return callback, transfer.settled()

    @staticmethod
    def _sender(opened: kv_pb2.OpenTransfer) -> tuple[str, str]:
        return opened.from_worker_id, opened.from_incarnation

    @classmethod
    def _foreign_sender(cls, opened: kv_pb2.OpenTransfer, expected: tuple[str, str]) -> str:
        return f"it comes from {'/'.join(cls._sender(opened))}, not from {'/'.join(expected)}"


def _overlap(a: kv_pb2.KvFrame, b: kv_pb2.KvFrame) -> bool:
    return (
        a.first_token < b.first_token + b.tokens
        and b.first_token < a.first_token + a.tokens
        and a.first_head < b.first_head + b.heads
        and b.first_head < a.first_head + a.heads
    )
