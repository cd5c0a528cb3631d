"""One transfer's KV as it comes: what of it is here, and whether that is right.

A frame is taken only if its layer, KV heads, tokens, codec and size are this worker's and none of
it came before. Pure bookkeeping over bytes, without a lock or a clock: the inbox has both.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from cluster.handoff_failure import HandoffFailure
from cluster.wire import kv_pb2
from workers.kv.codecs import GroupCodec, group_codec
from workers.kv.frames import Frame
from workers.kv.shared import SharedMemory


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
    """Until there was room for it. This and the next two add up to the time until it failed."""
    first_layer_s: float = 0.0
    """From then until something came: prefill computes."""
    wire_s: float = 0.0
    """From then until all had come."""
    transport: str = ""
    instead_of: str = ""
    codec: int | None = None
    """None: nothing came."""
    failure: HandoffFailure | None = None


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
class Incoming:
    """`changed_at_s`: when someone last touched it."""

    transfer_id: str
    geometry: KvGeometry
    changed_at_s: float
    state: TransferState = TransferState.ARRIVING
    failed: Settled | None = None
    open: kv_pb2.OpenTransfer | None = None
    opened_at_s: float = 0.0
    credit_at_s: float | None = None
    first_kv_at_s: float | None = None
    last_kv_at_s: float = 0.0
    codec: int | None = None
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
    on_end: list[Callable[[str], None]] = field(default_factory=list)
    """As `on_credit`."""
    shared: SharedMemory | None = None
    """Where the payloads are, if not in `frames`."""
    on_settled: Callable[[Settled], None] | None = None
    expected_sender: tuple[str, str] | None = None
    admitted: bool = False
    """Its decode leg is in the engine's queue."""

    @property
    def is_only_held(self) -> bool:
        """Neither opened nor claimed."""
        fresh = self.open is None and self.state is TransferState.ARRIVING
        return fresh and self.expected_sender is None

    @property
    def reason(self) -> str:
        """Why it failed."""
        return "" if self.failed is None else self.failed.reason

    def settled(self) -> Settled:
        if self.failed is not None:
            return self.failed
        assert self.open is not None
        held = self.held_tokens or 0
        return replace(
            self._how_it_came(self.open, self.last_kv_at_s),
            whole=True,
            bytes=self.bytes,
            tokens=self.open.tokens - held,
            held_tokens=held,
        )

    def fail(self, reason: str, failure: HandoffFailure, now_s: float) -> None:
        """Nothing of it is kept but why, and how far it came."""
        so_far = Settled(self.transfer_id, False, "")
        if self.open is not None:
            until_s = self.last_kv_at_s if self.state is TransferState.WHOLE else now_s
            so_far = self._how_it_came(self.open, until_s)
        self.failed = replace(so_far, reason=reason, failure=failure)
        self.state = TransferState.FAILED
        self.open, self.bytes, self.frames = None, 0, {}
        if self.shared is not None:
            self.shared.close()

    def _how_it_came(self, opened: kv_pb2.OpenTransfer, until_s: float) -> Settled:
        credit_at_s = until_s if self.credit_at_s is None else self.credit_at_s
        first_kv_at_s = until_s if self.first_kv_at_s is None else self.first_kv_at_s
        return Settled(
            transfer_id=self.transfer_id,
            whole=False,
            reason="",
            credit_wait_s=credit_at_s - self.opened_at_s,
            first_layer_s=first_kv_at_s - credit_at_s,
            wire_s=until_s - first_kv_at_s,
            transport=opened.transport,
            instead_of=opened.instead_of,
            codec=self.codec,
        )

    def whole(self) -> Whole | None:
        if self.state is not TransferState.WHOLE:
            return None
        assert self.open is not None
        return Whole(self.open.tokens, self.open.prompt_digest, self.held_tokens or 0)

    def part_has_come(self, heads: range) -> bool:
        """All of the part that these KV heads belong to."""
        part = _part_with(self.parts, heads)
        if part is None or self.open is None:
            return False
        tokens = self.open.tokens - (self.held_tokens or 0)
        return part.arrived_head_tokens == tokens * len(part.heads) * self.geometry.layers

    def take_open(self, opened: kv_pb2.OpenTransfer) -> str:
        """Its first part is opened, or another one. Returns why that is wrong, or ""."""
        heads = self.heads_of(opened)
        if any(_common(heads, part.heads) for part in self.parts):
            return "the transfer was opened twice"
        expected, sender = self.expected_sender, sender_of(opened)
        if expected is not None and sender != expected:
            return foreign_sender(sender, expected)
        if self.open is not None and not _same_transfer(opened, self.open):
            return "its parts are of different prompts or senders"
        held_tokens = self.held_tokens or 0
        if opened.tokens == 0:
            return "a transfer of no tokens"
        if opened.tokens <= held_tokens:
            return f"a transfer of {opened.tokens} tokens, of which {held_tokens} are held here"
        self.parts.append(_Part(heads))
        if self.open is None:
            self.open = opened
        return ""

    def heads_of(self, opened: kv_pb2.OpenTransfer) -> range:
        """Those of the part that it opens."""
        if opened.heads:
            return range(opened.first_head, opened.first_head + opened.heads)
        return range(self.geometry.first_head, self.geometry.first_head + self.geometry.heads)

    def uncoded_bytes(self) -> int:
        """What is to come, without a codec."""
        assert self.open is not None
        return (self.open.tokens - (self.held_tokens or 0)) * self.geometry.bytes_per_token

    def begin(self, now_s: float) -> None:
        """There is room for it."""
        assert self.open is not None
        tokens = self.open.tokens - (self.held_tokens or 0)
        self.bytes = self.uncoded_bytes()
        self.missing_head_tokens = tokens * self.geometry.heads * self.geometry.layers
        self.state = TransferState.ARRIVING
        self.changed_at_s = self.credit_at_s = now_s

    def take_kv(self, frame: Frame, now_s: float) -> str:
        """Returns why the frame is wrong, or an empty string. `bytes` shrinks by what a codec has
        spared.

        Raises:
            OSError: there is no memory to share it.
        """
        kv, geometry = frame.header.kv, self.geometry
        wrong = self._wrong_shape(kv) or self._wrong_payload(kv, len(frame.payload))
        if wrong:
            return wrong
        part = _part_with(self.parts, _heads(kv))
        if part is None:
            return f"KV heads {kv.first_head} to {kv.first_head + kv.heads} of no part opened"
        present = self.frames.setdefault(kv.layer, [])
        if any(_overlap(kv, other.header.kv) for other in present):
            return f"layer {kv.layer}, tokens from {kv.first_token} arrived twice"
        payload_bytes = len(frame.payload)
        if self.shared is not None:
            self.shared.append(frame)
            frame = Frame(frame.header, memoryview(b""))
        present.append(frame)
        if self.first_kv_at_s is None:
            self.first_kv_at_s = now_s
        self.last_kv_at_s = now_s
        self.codec = kv.codec
        # Room was set aside for what is not held; the frame may begin before that.
        new_tokens = kv.tokens - self._held_of(kv)
        self.bytes -= geometry.frame_bytes(new_tokens, kv.heads) - payload_bytes
        part.arrived_head_tokens += new_tokens * kv.heads
        self.missing_head_tokens -= new_tokens * kv.heads
        if self.missing_head_tokens == 0:
            self.state = TransferState.WHOLE
        return ""

    def _wrong_shape(self, kv: kv_pb2.KvFrame) -> str:
        assert self.open is not None
        geometry, last_token = self.geometry, kv.first_token + kv.tokens
        if kv.layer >= geometry.layers:
            return f"layer {kv.layer} of a model of {geometry.layers} layers"
        if kv.tokens == 0 or last_token > self.open.tokens:
            return f"tokens {kv.first_token} to {last_token} of a prompt of {self.open.tokens}"
        if self._held_of(kv) == kv.tokens:
            return f"tokens {kv.first_token} to {last_token} are held here"
        first_head, last_head = geometry.first_head, geometry.first_head + geometry.heads
        if kv.heads == 0 or kv.first_head < first_head or kv.first_head + kv.heads > last_head:
            return (
                f"KV heads {kv.first_head} to {kv.first_head + kv.heads}, "
                f"this worker holds {first_head} to {last_head}"
            )
        return ""

    def _wrong_payload(self, kv: kv_pb2.KvFrame, payload_bytes: int) -> str:
        try:
            codec = group_codec(kv.codec)
        except KeyError:
            return f"codec {kv.codec} is not known here"
        if kv.key_order not in kv_pb2.KeyOrder.values():
            return f"key order {kv.key_order} is not known here"
        in_blocks = kv.key_order == kv_pb2.KEY_ORDER_BLOCKS
        if in_blocks and (kv.block_tokens == 0 or kv.tokens % kv.block_tokens):
            return f"{kv.tokens} tokens in blocks of {kv.block_tokens}"
        if codec is not None and kv.key_order != kv_pb2.KEY_ORDER_TOKENS_CHANNELS:
            return f"codec {kv.codec} with key order {kv.key_order}"
        expected_bytes = self.geometry.frame_bytes(kv.tokens, kv.heads, codec)
        if payload_bytes != expected_bytes:
            return f"a payload of {payload_bytes} bytes where {expected_bytes} belong"
        if payload_bytes > self.geometry.frame_bytes(kv.tokens, kv.heads):
            return f"codec {kv.codec} makes KV of this shape larger"
        return ""

    def _held_of(self, kv: kv_pb2.KvFrame) -> int:
        """Tokens of the frame that are held here."""
        return min(max(0, (self.held_tokens or 0) - kv.first_token), kv.tokens)


def sender_of(opened: kv_pb2.OpenTransfer) -> tuple[str, str]:
    return opened.from_worker_id, opened.from_incarnation


def foreign_sender(sender: tuple[str, str], expected: tuple[str, str]) -> str:
    return f"it comes from {'/'.join(sender)}, not from {'/'.join(expected)}"


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
