"""KV on its way from a prefill worker into another's inbox, in real frames.

Frames come late, never, twice or out of order. Every byte tells whose KV it is, so what is adopted
can be compared with what should have come.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from cluster.scheduler.view import WorkerKey
from cluster.wire import kv_pb2
from tests.simulation.violation import Violation
from workers.kv.frames import Frame
from workers.kv.inbox import Inbox
from workers.kv.incoming import KvGeometry

if TYPE_CHECKING:
    from tests.simulation.worker import SimWorker

GEOMETRY = KvGeometry(layers=2, first_head=0, heads=1, head_size=1, element_bytes=1)
STREAM_ENDED = "the sender's stream ended before the KV was whole"


def digest_of(text: str) -> bytes:
    """What tells one request's prompt from another's."""
    return zlib.crc32(text.encode()).to_bytes(4, "little")


class Push:
    """One transfer, as its sender sees it."""

    def __init__(
        self, sender: SimWorker, receiver: WorkerKey, transfer_id: str, text: str, tokens: int
    ) -> None:
        self._sender = sender
        self._receiver = receiver
        self.transfer_id = transfer_id
        self._digest = digest_of(text)
        self._tokens = tokens
        self._last_at_s = 0.0
        self._open = True
        opened = kv_pb2.OpenTransfer(
            tokens=tokens,
            prompt_digest=self._digest,
            from_worker_id=sender.key.worker_id,
            from_incarnation=sender.key.incarnation,
            to_incarnation=receiver.incarnation,
        )
        self._send(kv_pb2.FrameHeader(transfer_id=transfer_id, open=opened))

    def send(self, first_token: int, end_token: int) -> None:
        """All layers of these tokens."""
        tokens = end_token - first_token
        if tokens == 0:
            return
        for layer in range(GEOMETRY.layers):
            kv = kv_pb2.KvFrame(layer=layer, first_token=first_token, tokens=tokens, heads=1)
            header = kv_pb2.FrameHeader(transfer_id=self.transfer_id, kv=kv)
            self._send(header, self._digest[:1] * (2 * tokens))

    def abort(self, reason: str) -> None:
        if self._open:
            abort = kv_pb2.AbortTransfer(reason=reason)
            self._send(kv_pb2.FrameHeader(transfer_id=self.transfer_id, abort=abort))
            self._open = False

    def finish(self) -> None:
        """The stream ends after its last frame. Also that its sender died is seen so."""
        self._open = False
        self._carry(self._last_at_s, lambda inbox: inbox.fail(self.transfer_id, STREAM_ENDED))

    def _send(self, header: kv_pb2.FrameHeader, payload: bytes = b"") -> None:
        world, timeline = self._sender.world, self._sender.timeline
        frame = Frame(header, memoryview(payload))
        at_s = max(self._last_at_s, timeline.now_s + world.network.delay_s())
        faults = world.faults
        if timeline.chance(faults.kv_lost):
            timeline.note("KV lost", self.transfer_id)
            return
        if timeline.chance(faults.kv_overtaken):
            timeline.note("KV overtaken", self.transfer_id)
            at_s += timeline.random.uniform(0.0, 1.0)
        else:
            self._last_at_s = at_s
        self._carry(at_s, lambda inbox: inbox.receive(frame))
        if timeline.chance(faults.kv_repeated):
            timeline.note("KV repeated", self.transfer_id)
            later_s = at_s + timeline.random.choice((0.0, 0.5, 5.0)) * timeline.random.random()
            self._carry(later_s, lambda inbox: inbox.receive(frame))

    def _carry(self, at_s: float, take: Callable[[Inbox], object]) -> None:
        """To whoever has the receiver's address by then."""
        world = self._sender.world
        receiver = world.workers.get(self._receiver.worker_id)
        if receiver is not None:
            world.network.carry(self._sender, receiver, at_s, lambda: take(receiver.inbox))


def check_adopted(frames: dict[int, list[Frame]], tokens: int, text: str) -> None:
    """Every layer and token once, and all of this request's.

    Raises:
        Violation
    """
    expected = digest_of(text)[:1]
    for layer in range(GEOMETRY.layers):
        cells: list[int] = []
        for frame in frames.get(layer, []):
            kv = frame.header.kv
            cells.extend(range(kv.first_token, kv.first_token + kv.tokens))
            if set(bytes(frame.payload)) != set(expected):
                raise Violation(f"{text} adopts KV of another")
        if sorted(cells) != list(range(tokens)):
            raise Violation(f"{text} adopts {len(cells)} of {tokens} tokens of layer {layer}")
