"""The inbox: KV that prefill workers pushed here, until a decode leg adopts it.

A transfer that is opened waits until there is room for all of it, first come, first served; then
its sender has credit. It is whole when every layer, KV head and token of the prompt has arrived
exactly once, undamaged, from the incarnation that opened it. Anything else fails it, and a failed
transfer is recomputed, never adopted in part. All of this is bookkeeping over bytes: no gRPC, no
vLLM, and the clock is handed in, so the fault tests drive it directly.
"""

from __future__ import annotations

import contextlib
import enum
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from cluster.wire import kv_pb2
from workers.kv.codecs import GroupCodec, group_codec
from workers.kv.frames import Frame
from workers.kv.shared import SharedMemory

WAITING_MAX = 1000
"""Transfers that may wait for room."""
OVER_MAX = 10_000
"""Failed transfers that are remembered, and as many that were dropped or adopted."""


class TransferState(enum.Enum):
    ARRIVING = "arriving"
    """Also one that was only claimed, and not opened yet."""
    WAITING = "waiting"
    """Opened, and there is no room for it."""
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
    bytes: int = 0
    tokens: int = 0
    """That came, beside those that were held here."""
    held_tokens: int = 0
    credit_wait_s: float = 0.0
    """Until there was room for it."""
    first_layer_s: float = 0.0
    """From then until something came: prefill computes."""
    wire_s: float = 0.0
    """From then until all had come."""
    transport: str = ""
    instead_of: str = ""
    codec: int = kv_pb2.CODEC_NONE


class Whole(NamedTuple):
    """A transfer of which all is here."""

    tokens: int
    """Of the prompt."""
    prompt_digest: bytes
    held_tokens: int
    """The first ones, which did not come because the prefix cache has them."""


@dataclass(slots=True)
class _Part:
    """What one stream brings: all KV heads, or those of one of the sender's ranks."""

    heads: range
    arrived_head_tokens: int = 0
    """Layer x head x token cells."""


@dataclass(slots=True)
class _Transfer:
    transfer_id: str
    changed_at_s: float
    state: TransferState = TransferState.ARRIVING
    reason: str = ""
    open: kv_pb2.OpenTransfer | None = None
    opened_at_s: float = 0.0
    credit_at_s: float = 0.0
    first_kv_at_s: float | None = None
    last_kv_at_s: float = 0.0
    codec: int = kv_pb2.CODEC_NONE
    bytes: int = 0
    """What it takes of the budget: the payloads that came, and the rest as if it came uncoded."""
    held_tokens: int | None = None
    """None: the engine has not said yet."""
    missing_head_tokens: int = 0
    """Of all parts, those too that are not opened yet."""
    parts: list[_Part] = field(default_factory=list)
    frames: dict[int, list[Frame]] = field(default_factory=dict)
    on_credit: list[Callable[[str], None]] = field(default_factory=list)
    """Of each part that waits for it."""
    on_end: Callable[[str], None] | None = None
    shared: SharedMemory | None = None
    """Where the payloads are, if not in `frames`."""
    on_settled: Callable[[Settled], None] | None = None
    expected_sender: tuple[str, str] | None = None

    def settled(self) -> Settled:
        if self.state is not TransferState.WHOLE:
            return Settled(self.transfer_id, False, self.reason)
        assert self.open is not None and self.first_kv_at_s is not None
        held = self.held_tokens or 0
        return Settled(
            transfer_id=self.transfer_id,
            whole=True,
            reason="",
            bytes=self.bytes,
            tokens=self.open.tokens - held,
            held_tokens=held,
            credit_wait_s=self.credit_at_s - self.opened_at_s,
            first_layer_s=self.first_kv_at_s - self.credit_at_s,
            wire_s=self.last_kv_at_s - self.first_kv_at_s,
            transport=self.open.transport,
            instead_of=self.open.instead_of,
            codec=self.codec,
        )


class Inbox:
    """Transfers by id, within a budget of bytes. Safe to call from several threads.

    `max_idle_s` bounds how long a transfer stays without a frame, a claim or an adoption, and
    `max_unclaimed_s` how long one does that is whole and was never claimed: its sender or its
    router is gone. Callbacks come without the lock, on the thread that made the
    change. With `shared`, payloads are kept where other processes can map them.
    """

    def __init__(
        self,
        geometry: KvGeometry,
        incarnation: str,
        max_bytes: int,
        max_idle_s: float,
        clock: Callable[[], float],
        shared: bool = False,
        max_unclaimed_s: float = math.inf,
    ) -> None:
        self.geometry = geometry
        self.incarnation = incarnation
        self.max_bytes = max_bytes
        self._max_idle_s = max_idle_s
        self._max_unclaimed_s = min(max_unclaimed_s, max_idle_s)
        self._clock = clock
        self._shared = shared
        self._lock = threading.Lock()
        self._transfers: dict[str, _Transfer] = {}
        self._waiting: dict[str, _Transfer] = {}
        self._failed: dict[str, None] = {}
        self._over: dict[str, float] = {}
        """Dropped or adopted, and when: what still comes of them is refused."""
        self._bytes = 0
        self._calls: list[Callable[[], None]] = []

    @property
    def bytes_held(self) -> int:
        return self._bytes

    @property
    def transfers_held(self) -> int:
        """Without failed ones, of which no more is here than why."""
        return len(self._transfers) - len(self._failed)

    @property
    def transfers_waiting(self) -> int:
        """For room."""
        return len(self._waiting)

    def receive(self, frame: Frame) -> tuple[TransferState, str]:
        """Take a frame in. Returns whether going on makes sense, and if not, why: WHOLE if this was
        the last frame of its part."""
        transfer_id = frame.header.transfer_id
        with self._changing():
            if transfer_id in self._over:
                return TransferState.FAILED, "the transfer is over"
            transfer = self._get(transfer_id)
            if transfer.state in (TransferState.ARRIVING, TransferState.WAITING):
                reason = self._take(transfer, frame)
                if reason:
                    self._fail(transfer, reason)
                else:
                    self._give_credit()
            elif (
                transfer.state is TransferState.WHOLE and frame.header.WhichOneof("kind") != "abort"
            ):
                self._fail(transfer, "a frame arrived after the transfer was whole")
            self._notice(transfer)
            state = transfer.state
            if state is TransferState.ARRIVING and frame.header.WhichOneof("kind") == "kv":
                part = _part_with(transfer.parts, _heads(frame.header.kv))
                if part is not None and self._has_come(transfer, part):
                    state = TransferState.WHOLE
            return state, transfer.reason

    def await_credit(self, transfer_id: str, on_credit: Callable[[str], None]) -> None:
        """`on_credit` is called once, maybe at once: when there is room for an opened transfer,
        with nothing, or else with why it failed."""
        with self._changing():
            transfer = self._transfers.get(transfer_id)
            if transfer is None:
                self._calls.append(lambda: on_credit("the transfer is over"))
            else:
                transfer.on_credit.append(on_credit)
                self._notice(transfer)

    def await_end(self, transfer_id: str, on_end: Callable[[str], None]) -> None:
        """`on_end` is called once, maybe at once: when the transfer is whole, with nothing, or else
        with why it failed."""
        with self._changing():
            transfer = self._transfers.get(transfer_id)
            if transfer is None:
                self._calls.append(lambda: on_end("the transfer is over"))
            else:
                transfer.on_end = on_end
                self._notice(transfer)

    def expect(
        self,
        transfer_id: str,
        sender: tuple[str, str],
        on_settled: Callable[[Settled], None],
    ) -> None:
        """A decode leg claims the transfer. `on_settled` is called once, maybe at once."""
        with self._changing():
            refused = "the transfer is over" if transfer_id in self._over else ""
            if not refused:
                transfer = self._get(transfer_id)
                if transfer.expected_sender is None:
                    self._claim(transfer, sender, on_settled)
                    return
                refused = "another decode leg has claimed the transfer"
            self._calls.append(lambda: on_settled(Settled(transfer_id, False, refused)))

    def hold(self, transfer_id: str, tokens: int) -> bool:
        """The prompt's first `tokens` are in the prefix cache, and need not come. False if that is
        of no use any more."""
        with self._changing():
            if transfer_id in self._over:
                return False
            transfer = self._get(transfer_id)
            early = transfer.open is None and transfer.state is TransferState.ARRIVING
            if transfer.held_tokens is not None or not (
                early or transfer.state is TransferState.WAITING
            ):
                return False
            if transfer.open is not None and tokens >= transfer.open.tokens:
                return False
            transfer.held_tokens = tokens
            self._give_credit()
            return True

    def held(self, transfer_id: str) -> int:
        """Tokens that need not come."""
        with self._lock:
            transfer = self._transfers.get(transfer_id)
            return (transfer.held_tokens or 0) if transfer else 0

    def peek(self, transfer_id: str) -> Whole | None:
        """None if not all is here."""
        with self._lock:
            transfer = self._transfers.get(transfer_id)
            if transfer is None or transfer.state is not TransferState.WHOLE:
                return None
            assert transfer.open is not None
            opened = transfer.open
            return Whole(opened.tokens, opened.prompt_digest, transfer.held_tokens or 0)

    def take(self, transfer_id: str) -> dict[int, list[Frame]] | None:
        """The frames of a whole transfer by layer; the inbox holds nothing of it afterwards."""
        with self._changing():
            transfer = self._transfers.get(transfer_id)
            if transfer is None or transfer.state is not TransferState.WHOLE:
                return None
            self._forget(transfer)
            self._is_over(transfer_id)
            return transfer.frames

    def take_shared(self, transfer_id: str) -> SharedMemory | None:
        """As `take`, of an inbox that shares payloads. The caller closes it."""
        with self._changing():
            transfer = self._transfers.get(transfer_id)
            if transfer is None or transfer.state is not TransferState.WHOLE:
                return None
            self._forget(transfer)
            self._is_over(transfer_id)
            return transfer.shared

    def drop(self, transfer_id: str, reason: str) -> None:
        """Free what a transfer holds; frames that still come are refused."""
        with self._changing():
            transfer = self._transfers.get(transfer_id)
            self._is_over(transfer_id)
            if transfer is None:
                return
            if transfer.state is not TransferState.FAILED:
                self._fail(transfer, reason)
            self._notice(transfer)
            self._forget(transfer)

    def fail(self, transfer_id: str, reason: str) -> None:
        """The sender's stream broke, or the time to wait for room or for the KV has passed."""
        with self._changing():
            transfer = self._transfers.get(transfer_id)
            if transfer is None or transfer.state in (TransferState.WHOLE, TransferState.FAILED):
                return
            self._fail(transfer, reason)
            self._notice(transfer)

    def sweep(self) -> list[str]:
        """Fail and forget transfers that nobody touched in time. Returns their ids."""
        now = self._clock()
        with self._lock:
            idle = [
                t for t in self._transfers.values() if now - t.changed_at_s > self._may_idle_s(t)
            ]
            for old in [i for i, at in self._over.items() if now - at > 4 * self._max_idle_s]:
                del self._over[old]
        for transfer in idle:
            reason = f"nobody touched it for {self._may_idle_s(transfer):g} s"
            self.drop(transfer.transfer_id, reason)
        return [transfer.transfer_id for transfer in idle]

    def _may_idle_s(self, transfer: _Transfer) -> float:
        unclaimed = transfer.state is TransferState.WHOLE and transfer.expected_sender is None
        return self._max_unclaimed_s if unclaimed else self._max_idle_s

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Holds the lock, and then tells those whom the change concerns."""
        with self._lock:
            try:
                yield
            finally:
                calls, self._calls = self._calls, []
        for call in calls:
            call()

    def _get(self, transfer_id: str) -> _Transfer:
        transfer = self._transfers.get(transfer_id)
        if transfer is None:
            transfer = _Transfer(transfer_id, changed_at_s=self._clock())
            self._transfers[transfer_id] = transfer
        return transfer

    def _claim(
        self,
        transfer: _Transfer,
        sender: tuple[str, str],
        on_settled: Callable[[Settled], None],
    ) -> None:
        transfer.changed_at_s = self._clock()
        transfer.on_settled = on_settled
        transfer.expected_sender = sender
        if transfer.open is not None and self._sender(transfer.open) != sender:
            self._fail(transfer, self._foreign_sender(transfer.open, sender))
        self._notice(transfer)

    def _take(self, transfer: _Transfer, frame: Frame) -> str:
        """Returns why the transfer fails, or an empty string."""
        now = self._clock()
        transfer.changed_at_s = now
        kind = frame.header.WhichOneof("kind")
        if kind == "open":
            return self._take_open(transfer, frame.header.open, now)
        if kind == "abort":
            return f"the sender gave up: {frame.header.abort.reason}"
        if transfer.open is None:
            return "a frame arrived before the transfer was opened"
        if transfer.state is TransferState.WAITING:
            return "a frame arrived before there was room for the transfer"
        return self._take_kv(transfer, frame, now)

    def _take_open(self, transfer: _Transfer, opened: kv_pb2.OpenTransfer, now: float) -> str:
        geometry = self.geometry
        heads = range(geometry.first_head, geometry.first_head + geometry.heads)
        if opened.heads:
            heads = range(opened.first_head, opened.first_head + opened.heads)
        if any(_common(heads, part.heads) for part in transfer.parts):
            return "the transfer was opened twice"
        if opened.to_incarnation != self.incarnation:
            return (
                f"it is meant for incarnation {opened.to_incarnation}, this is {self.incarnation}"
            )
        expected = transfer.expected_sender
        if expected is not None and self._sender(opened) != expected:
            return self._foreign_sender(opened, expected)
        part = _Part(heads)
        if transfer.open is not None:
            if not _same_transfer(opened, transfer.open):
                return "its parts are of different prompts or senders"
            transfer.parts.append(part)
            return ""
        held_tokens = transfer.held_tokens or 0
        if opened.tokens == 0:
            return "a transfer of no tokens"
        if opened.tokens <= held_tokens:
            return f"a transfer of {opened.tokens} tokens, of which {held_tokens} are held here"
        whole_bytes = (opened.tokens - held_tokens) * self.geometry.bytes_per_token
        if whole_bytes > self.max_bytes:
            return f"the inbox is too small: {whole_bytes} bytes asked, it holds {self.max_bytes}"
        if len(self._waiting) >= WAITING_MAX:
            return f"the inbox is full, and {WAITING_MAX} transfers wait for room"
        if self._shared:
            try:
                transfer.shared = SharedMemory()
            except OSError as error:
                return f"there is no memory to share: {error}"
        transfer.open = opened
        transfer.parts.append(part)
        transfer.opened_at_s = now
        transfer.state = TransferState.WAITING
        self._waiting[transfer.transfer_id] = transfer
        return ""

    def _has_come(self, transfer: _Transfer, part: _Part) -> bool:
        assert transfer.open is not None
        tokens = transfer.open.tokens - (transfer.held_tokens or 0)
        return part.arrived_head_tokens == tokens * len(part.heads) * self.geometry.layers

    def _give_credit(self) -> None:
        """To those that wait for room, in the order in which they came."""
        for transfer in list(self._waiting.values()):
            assert transfer.open is not None
            if transfer.open.expects_held and transfer.held_tokens is None:
                # In no one's way: the engine says it at its next step.
                continue
            tokens = transfer.open.tokens - (transfer.held_tokens or 0)
            whole_bytes = tokens * self.geometry.bytes_per_token
            if self._bytes + whole_bytes > self.max_bytes:
                return
            del self._waiting[transfer.transfer_id]
            self._bytes += whole_bytes
            transfer.bytes = whole_bytes
            transfer.missing_head_tokens = tokens * self.geometry.heads * self.geometry.layers
            transfer.state = TransferState.ARRIVING
            transfer.changed_at_s = transfer.credit_at_s = self._clock()
            self._notice(transfer)

    def _take_kv(self, transfer: _Transfer, frame: Frame, now: float) -> str:
        assert transfer.open is not None
        kv, geometry = frame.header.kv, self.geometry
        try:
            codec = group_codec(kv.codec)
        except KeyError:
            return f"codec {kv.codec} is not known here"
        if kv.key_order not in kv_pb2.KeyOrder.values():
            return f"key order {kv.key_order} is not known here"
        in_blocks = kv.key_order == kv_pb2.KEY_ORDER_BLOCKS
        if in_blocks and (kv.block_tokens == 0 or kv.tokens % kv.block_tokens):
            return f"{kv.tokens} tokens in blocks of {kv.block_tokens}"
        if kv.layer >= geometry.layers:
            return f"layer {kv.layer} of a model of {geometry.layers} layers"
        if kv.tokens == 0 or kv.first_token + kv.tokens > transfer.open.tokens:
            return (
                f"tokens {kv.first_token} to {kv.first_token + kv.tokens} "
                f"of a prompt of {transfer.open.tokens}"
            )
        held_tokens = min(max(0, (transfer.held_tokens or 0) - kv.first_token), kv.tokens)
        if held_tokens == kv.tokens:
            return f"tokens {kv.first_token} to {kv.first_token + kv.tokens} are held here"
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
        part = _part_with(transfer.parts, _heads(kv))
        if part is None:
            return f"KV heads {kv.first_head} to {kv.first_head + kv.heads} of no part opened"
        payload_bytes = geometry.frame_bytes(kv.tokens, kv.heads, codec)
        if len(frame.payload) != payload_bytes:
            return f"a payload of {len(frame.payload)} bytes where {payload_bytes} belong"
        if payload_bytes > geometry.frame_bytes(kv.tokens, kv.heads):
            return f"codec {kv.codec} makes KV of this shape larger"
        # Room was set aside for what is not held; the frame may begin before that.
        spared_bytes = geometry.frame_bytes(kv.tokens - held_tokens, kv.heads) - payload_bytes
        if codec is not None and kv.key_order != kv_pb2.KEY_ORDER_TOKENS_CHANNELS:
            return f"codec {kv.codec} with key order {kv.key_order}"
        present = transfer.frames.setdefault(kv.layer, [])
        if any(_overlap(kv, other.header.kv) for other in present):
            return f"layer {kv.layer}, tokens from {kv.first_token} arrived twice"
        if transfer.shared is not None:
            try:
                transfer.shared.append(frame)
            except OSError as error:
                return f"there is no memory to share: {error}"
            frame = Frame(frame.header, memoryview(b""))
        present.append(frame)
        if transfer.first_kv_at_s is None:
            transfer.first_kv_at_s = now
        transfer.last_kv_at_s = now
        transfer.codec = kv.codec
        transfer.bytes -= spared_bytes
        self._bytes -= spared_bytes
        part.arrived_head_tokens += (kv.tokens - held_tokens) * kv.heads
        transfer.missing_head_tokens -= (kv.tokens - held_tokens) * kv.heads
        if transfer.missing_head_tokens == 0:
            transfer.state = TransferState.WHOLE
        return ""

    def _fail(self, transfer: _Transfer, reason: str) -> None:
        self._bytes -= transfer.bytes
        transfer.bytes = 0
        transfer.open = None
        transfer.state = TransferState.FAILED
        transfer.reason = reason
        transfer.frames = {}
        if transfer.shared is not None:
            transfer.shared.close()
        self._waiting.pop(transfer.transfer_id, None)
        self._failed[transfer.transfer_id] = None
        if len(self._failed) > OVER_MAX:
            self._forget(self._transfers[next(iter(self._failed))])
        self._give_credit()

    def _forget(self, transfer: _Transfer) -> None:
        """One that is whole or has failed."""
        del self._transfers[transfer.transfer_id]
        self._failed.pop(transfer.transfer_id, None)
        self._bytes -= transfer.bytes
        self._give_credit()

    def _is_over(self, transfer_id: str) -> None:
        # The newest last, so that the oldest is forgotten first.
        self._over.pop(transfer_id, None)
        self._over[transfer_id] = self._clock()
        if len(self._over) > OVER_MAX:
            del self._over[next(iter(self._over))]

    def _notice(self, transfer: _Transfer) -> None:
        """Tell those who wait for credit or for the end, once, if it is there."""
        state, reason = transfer.state, transfer.reason
        on_credit, on_end, on_settled = transfer.on_credit, transfer.on_end, transfer.on_settled
        ended = state in (TransferState.WHOLE, TransferState.FAILED)
        if on_credit and state is not TransferState.WAITING:
            transfer.on_credit = []
            self._calls += [partial(tell, reason) for tell in on_credit]
        if on_end is not None and ended:
            transfer.on_end = None
            self._calls.append(lambda: on_end(reason))
        if on_settled is not None and ended:
            transfer.on_settled = None
            settled = transfer.settled()
            self._calls.append(lambda: on_settled(settled))

    @staticmethod
    def _sender(opened: kv_pb2.OpenTransfer) -> tuple[str, str]:
        return opened.from_worker_id, opened.from_incarnation

    @classmethod
    def _foreign_sender(cls, opened: kv_pb2.OpenTransfer, expected: tuple[str, str]) -> str:
        return f"it comes from {'/'.join(cls._sender(opened))}, not from {'/'.join(expected)}"


def _heads(kv: kv_pb2.KvFrame) -> range:
    return range(kv.first_head, kv.first_head + kv.heads)


def _common(a: range, b: range) -> bool:
    return a.start < b.stop and b.start < a.stop


def _part_with(parts: list[_Part], heads: range) -> _Part | None:
    for part in parts:
        if part.heads.start <= heads.start and heads.stop <= part.heads.stop:
            return part
    return None


def _same_transfer(a: kv_pb2.OpenTransfer, b: kv_pb2.OpenTransfer) -> bool:
    return (a.tokens, a.prompt_digest, a.from_worker_id, a.from_incarnation) == (
        *(b.tokens, b.prompt_digest),
        *(b.from_worker_id, b.from_incarnation),
    )


def _overlap(a: kv_pb2.KvFrame, b: kv_pb2.KvFrame) -> bool:
    return (
        a.first_token < b.first_token + b.tokens
        and b.first_token < a.first_token + a.tokens
        and a.first_head < b.first_head + b.heads
        and b.first_head < a.first_head + a.heads
    )
