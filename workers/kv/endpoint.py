"""This process's end of every hand-off: the inbox, the sender, and how the vLLM connector, which
vLLM constructs by name, finds them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cluster.wire import kv_pb2, worker_pb2
from workers.kv.inbox import Inbox
from workers.kv.sender import Sender, Transfer

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
    _sending: dict[str, Transfer] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def sending(
        self, send: worker_pb2.SendKv, tokens: int, prompt_digest: Callable[[], bytes]
    ) -> Transfer:
        """The transfer of a prefill leg, opened when first asked for."""
        with self._lock:
            transfer = self._sending.get(send.transfer_id)
            if transfer is None:
                transfer = self.sender.open(send, tokens, prompt_digest())
                self._sending[send.transfer_id] = transfer
            return transfer

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
