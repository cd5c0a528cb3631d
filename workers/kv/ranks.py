"""Tensor parallelism: the model runs in several processes, the ranks, each with some KV heads.

The worker's own process schedules and has the inbox, which holds all heads of what arrives. It
keeps payloads where the ranks map them (shared.py), and tells each step's ranks what to copy from
there. Each rank sends what it computes by itself: the frames of its heads are one part of a
transfer.
"""

from __future__ import annotations

import ctypes
import dataclasses
import logging
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.logs import configure_logs
from cluster.wire import kv_pb2, worker_pb2
from workers.kv.incoming import KvGeometry
from workers.kv.sender import Identity, Sender
from workers.kv.sending import RankSending
from workers.kv.shared import SharedFrames
from workers.kv.transfer import Transfer
from workers.kv.transports import make_transports
from workers.kv.undelivered import RankUndelivered
from workers.memory import keep_freed_memory

if TYPE_CHECKING:
    from cluster.wire.kv_pb2 import Codec

logger = logging.getLogger(__name__)

RANKS_KEY = "baton_ranks"
"""Key of `kv_connector_extra_config`: a RankSettings, if the model runs in several processes."""
PR_SET_PDEATHSIG = 1
"""From linux/prctl.h."""


@dataclass(frozen=True, slots=True)
class RankSettings:
    """What a worker tells its ranks when it starts them."""

    worker_pid: int
    worker_id: str
    incarnation: str
    fingerprint: bytes
    geometry: KvGeometry
    """Of all KV heads."""
    ranks: int
    codec: Codec
    staged_bytes: int
    transfer_deadline_s: float
    host: str
    """Of the interface that other workers reach."""
    transport: str
    """As in the configuration."""
    sending: str
    """Where a rank tells what its sender holds: the path of a RanksSending."""
    undelivered: str
    """Where it tells what was not delivered: the path of a RanksUndelivered."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, tuple(getattr(self, field.name) for field in dataclasses.fields(self))


def _received(worker_pid: int, *others: Any) -> RankSettings:
    """The first of Baton's code that runs in a rank's process: unpickling what it is started with.

    vLLM ends its ranks when their parent is gone, but neither one that still loads nor one that
    waits for another rank.
    """
    if worker_pid != os.getpid():
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if worker_pid != os.getppid():
            sys.exit("the worker of this rank has ended")
    return RankSettings(worker_pid, *others)


@dataclass(frozen=True, slots=True)
class Part:
    """The KV heads of one rank."""

    first_head: int
    heads: int
    sends: bool
    """Of ranks with the same heads, one does."""


def part_of(kv_heads: int, ranks: int, rank: int) -> Part:
    """As vLLM shares heads out: equally, or each of them to several ranks.

    Raises:
        ValueError: neither is possible.
    """
    if kv_heads % ranks == 0:
        heads = kv_heads // ranks
        return Part(rank * heads, heads, sends=True)
    if ranks % kv_heads == 0:
        copies = ranks // kv_heads
        return Part(rank // copies, 1, sends=rank % copies == 0)
    raise ValueError(
        f"{kv_heads} KV heads cannot be shared out to {ranks} ranks: --tensor-parallel-size must "
        "divide their number, or be a multiple of it"
    )


class RankEndpoint:
    """A rank's end of hand-offs: it sends as a worker does, and reads what its worker received."""

    def __init__(self, settings: RankSettings, rank: int) -> None:
        part = part_of(settings.geometry.heads, settings.ranks, rank)
        self.geometry = dataclasses.replace(
            settings.geometry, first_head=part.first_head, heads=part.heads
        )
        self.codec = settings.codec
        self._sends = part.sends
        fingerprint = worker_pb2.Fingerprint.FromString(settings.fingerprint)
        self._transports = (
            make_transports(
                settings.transport,
                settings.host,
                f"{settings.worker_id}/{settings.incarnation}/{rank}",
                rank,
            )
            if part.sends
            else []
        )
        self._undelivered = RankUndelivered(settings.undelivered)
        self._sender = Sender(
            Identity(settings.worker_id, settings.incarnation, fingerprint),
            settings.staged_bytes // settings.ranks,
            settings.transfer_deadline_s,
            self._undelivered.tell,
            self._transports,
            settings.transport,
            (part.first_head, part.heads),
            on_change=RankSending(settings.sending, rank).tell,
        )
        self._sending: dict[str, Transfer] = {}

    def sending(
        self, send: worker_pb2.SendKv, tokens: int, prompt_digest: Callable[[], bytes]
    ) -> Transfer | None:
        if not self._sends:
            return None
        transfer = self._sending.get(send.transfer_id)
        if transfer is None:
            transfer = self._sender.open(send, tokens, prompt_digest())
            self._sending[send.transfer_id] = transfer
        return transfer

    def after_step(self, step: int, push: Callable[[], None]) -> None:
        """At once: nothing tells a rank that the step's outputs are on their way."""
        push()

    def finish(self, transfer_id: str) -> None:
        transfer = self._sending.pop(transfer_id, None)
        if transfer is not None:
            transfer.finish()

    def abort(self, transfer_id: str, reason: str) -> None:
        transfer = self._sending.pop(transfer_id, None)
        if transfer is not None:
            transfer.abort(reason)

    def received(
        self, transfer_id: str, shared: SharedFrames | None
    ) -> list[tuple[kv_pb2.KvFrame, memoryview]] | None:
        if shared is None:
            return None
        try:
            return shared.read()
        except OSError:
            logger.exception("the KV of transfer %s cannot be read", transfer_id)
            return None

    def close(self) -> None:
        self._sender.close()
        for transport in self._transports:
            transport.close()
        self._undelivered.close()


def enter_rank(settings: RankSettings, rank: int) -> RankEndpoint:
    """Called once in a rank's process, on the way to its first step."""
    configure_logs()
    keep_freed_memory()
    return RankEndpoint(settings, rank)
