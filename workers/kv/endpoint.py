"""This process's end of every hand-off: the inbox, the sender, and how the vLLM connector, which
vLLM constructs by name, finds them."""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from cluster.wire import kv_pb2, worker_pb2
from workers.kv.inbox import Inbox
from workers.kv.incoming import KvGeometry
from workers.kv.sender import Sender
from workers.kv.sending import RanksSending, Sending
from workers.kv.shared import SharedFrames
from workers.kv.transfer import Transfer
from workers.kv.undelivered import RanksUndelivered

if TYPE_CHECKING:
    from cluster.wire.kv_pb2 import Codec

ENDPOINT_KEY = "baton_endpoint"
"""Key of `kv_connector_extra_config` that names an endpoint of this process."""

_endpoints: dict[str, KvEndpoint] = {}


@dataclass(slots=True)
class KvEndpoint:
    inbox: Inbox
    sender: Sender
    codec: Codec = kv_pb2.CODEC_NONE
    """How this end writes what it sends."""
    overlap: Literal["auto", "always", "never"] = "auto"
    one_go_s: float = 0.02
    """auto: a transfer that is expected to take no longer goes in one go, after its prefill."""
    ranks_sending: RanksSending | None = None
    """Where the model's ranks send, and not this process."""
    ranks_undelivered: RanksUndelivered | None = None
    _sending: dict[str, Transfer | None] = field(default_factory=dict)
    _after_step: deque[tuple[int, Callable[[], None]]] = field(default_factory=deque)
    _released: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def geometry(self) -> KvGeometry:
        return self.inbox.geometry

    @property
    def outgoing(self) -> Sending:
        """What is held for transfers to others, here and in the ranks."""
        own = self.sender.sending
        return own if self.ranks_sending is None else own + self.ranks_sending.total()

    def overlaps(self, send: worker_pb2.SendKv, tokens: int) -> bool:
        """Whether a prompt's KV is pushed layer by layer while it is computed.

        That hides the transfer, but slows the computing: it shares its core, its interpreter or its
        memory with the sending. A short transfer is rather waited for.
        """
        if self.overlap != "auto":
            return self.overlap == "always"
        size_bytes = tokens * self.inbox.geometry.bytes_per_token
        return self.sender.estimated_s(send, size_bytes) > self.one_go_s

    def begin(self, transfer_id: str) -> None:
        """A prefill leg is here, whose KV is to be sent."""
        with self._lock:
            self._sending[transfer_id] = None

    def sending(
        self, send: worker_pb2.SendKv, tokens: int, prompt_digest: Callable[[], bytes]
    ) -> Transfer | None:
        """The transfer of a prefill leg, opened when first asked for. None if it has ended."""
        with self._lock:
            if send.transfer_id not in self._sending:
                return None
            transfer = self._sending[send.transfer_id]
            if transfer is None:
                transfer = self.sender.open(send, tokens, prompt_digest())
                self._sending[send.transfer_id] = transfer
            return transfer

    def release_held(self, transfer_id: str) -> None:
        """The prompt's beginning need not be kept for this transfer any more."""
        self._released.append(transfer_id)

    def take_released(self) -> list[str]:
        released, self._released = self._released, []
        return released

    def received(
        self, transfer_id: str, shared: SharedFrames | None
    ) -> Iterable[tuple[kv_pb2.KvFrame, memoryview]] | None:
        """The frames of a whole transfer. None if it was dropped."""
        frames = self.inbox.take(transfer_id)
        if frames is None:
            return None
        return ((frame.header.kv, frame.payload) for frame in itertools.chain(*frames.values()))

    def after_step(self, step: int, push: Callable[[], None]) -> None:
        """Do it when the engine's step of this number is over and its outputs are on their way."""
        self._after_step.append((step, push))

    def step_ended(self, step: int) -> None:
        """Called in the order of steps. Others may have begun by then."""
        while self._after_step and self._after_step[0][0] <= step:
            _, push = self._after_step.popleft()
            push()

    def finish(self, transfer_id: str) -> None:
        with self._lock:
            transfer = self._sending.pop(transfer_id, None)
        if transfer is not None:
            transfer.finish()

    def abort(self, transfer_id: str, reason: str) -> None:
        with self._lock:
            transfer = self._sending.pop(transfer_id, None)
        if transfer is not None:
            transfer.abort(reason)


def publish(name: str, endpoint: KvEndpoint) -> None:
    """Make an endpoint known to connectors that name it. One engine a process uses one."""
    _endpoints[name] = endpoint


def published(name: str) -> KvEndpoint:
    endpoint = _endpoints.get(name)
    if endpoint is None:
        raise LookupError(
            f"no KV endpoint {name!r} in this process: BatonConnector runs only inside a Baton "
            "worker, whose engine is in the worker's own process"
        )
    return endpoint


def withdraw(name: str) -> None:
    _endpoints.pop(name, None)
