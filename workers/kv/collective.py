"""The collective transport: payloads go by torch.distributed, point to point, in a group of two.

Gloo on CPUs, NCCL on GPUs, by the same code. The group has a store of its own, and never joins the
process's default group.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as torch_distributed

from cluster.wire import kv_pb2
from workers.kv import group
from workers.kv.group import GroupBroken, IncomingGroup, JoinGroup, OutgoingGroup, Reply
from workers.kv.inbox import Inbox

# Which of it is there depends on torch's build, and its stubs don't follow.
distributed: Any = torch_distributed

NAME = "collective"
SENDER_RANK, RECEIVER_RANK = 0, 1
BATCH_BYTES_MIN = 32 << 20
NCCL_POLL_S = 0.0002


@dataclass(frozen=True, slots=True)
class Collective:
    """This end of the transport: the `Transport` of groups in torch.distributed."""

    host: str
    """Of the interface that other workers reach."""
    device: torch.device

    @property
    def name(self) -> str:
        return NAME

    def join(self, call: JoinGroup, member: kv_pb2.GroupMember) -> OutgoingGroup:
        return _Outgoing(call, member, self)

    def accept(
        self,
        member: kv_pb2.GroupMember,
        inbox: Inbox,
        reply: Reply,
        on_end: Callable[[str], None],
    ) -> IncomingGroup:
        return _Incoming(inbox, self, reply, on_end)

    def close(self) -> None:
        """Groups end with their streams."""


class _Pair:
    """Two processes of which one sends and the other receives. For one thread at each end at a
    time. Methods raise whatever torch.distributed does, mostly RuntimeError."""

    def __init__(self, store: Any, rank: int, place: Collective) -> None:
        self._device = place.device
        timeout = datetime.timedelta(seconds=group.GROUP_DEADLINE_S)
        if place.device.type == "cuda":
            torch.cuda.set_device(place.device)
            options = distributed.ProcessGroupNCCL.Options()
            options._timeout = timeout
            self._group: Any = distributed.ProcessGroupNCCL(store, rank, 2, options)
        else:
            options = distributed.ProcessGroupGloo._Options()
            options._timeout = timeout
            # Gloo would look its own host name up, which need not resolve.
            device = distributed.ProcessGroupGloo.create_device(hostname=place.host)
            options._devices = [device]
            self._group = distributed.ProcessGroupGloo(store, rank, 2, options)

    def send(self, payloads: Sequence[memoryview]) -> Iterator[int]:
        """Each step waits for one to be sent, and gives its bytes; until then it must stay as it
        is."""
        posted = []
        for payload in payloads:
            tensor = torch.frombuffer(payload, dtype=torch.uint8).to(self._device)
            posted.append((self._group.send([tensor], RECEIVER_RANK, 0), tensor))

        return (self._sent(work, tensor) for work, tensor in posted)

    def receive(self, sizes_bytes: Sequence[int]) -> Iterator[memoryview]:
        """Ready to take them from now on; each is waited for when it is asked for."""
        posted = []
        for size_bytes in sizes_bytes:
            tensor = torch.empty(size_bytes, dtype=torch.uint8, device=self._device)
            posted.append((self._group.recv([tensor], SENDER_RANK, 0), tensor))
        return (self._received(work, tensor) for work, tensor in posted)

    def _sent(self, work: Any, tensor: torch.Tensor) -> int:
        self._wait(work)
        return len(tensor)

    def _received(self, work: Any, tensor: torch.Tensor) -> memoryview:
        self._wait(work)
        return tensor.cpu().numpy().data

    def _wait(self, work: Any) -> None:
        if self._device.type != "cuda":
            work.wait(datetime.timedelta(seconds=group.GROUP_DEADLINE_S))
            return
        # NCCL's own wait is the stream's, which does not end when the peer is gone.
        until_s = time.monotonic() + group.GROUP_DEADLINE_S
        while not work.is_completed():
            if time.monotonic() > until_s:
                self._group.abort()
                raise GroupBroken(f"the peer took or gave nothing for {group.GROUP_DEADLINE_S:g} s")
            time.sleep(NCCL_POLL_S)
        work.wait()
        torch.cuda.current_stream(self._device).synchronize()


def _store(host: str, port: int, is_master: bool) -> Any:
    return distributed.TCPStore(
        host,
        port,
        is_master=is_master,
        timeout=datetime.timedelta(seconds=group.GROUP_DEADLINE_S),
        wait_for_workers=False,
    )


class _Outgoing(OutgoingGroup):
    transport = NAME
    batch_bytes_min = BATCH_BYTES_MIN

    def __init__(self, call: JoinGroup, member: kv_pb2.GroupMember, place: Collective) -> None:
        self._pair: _Pair | None = None
        super().__init__(call, member)
        met = self._joined().place
        try:
            pair = _Pair(_store(met.host, met.port, False), SENDER_RANK, place)
        except RuntimeError as error:
            raise self._break(f"it cannot be made: {error}") from error
        with self._lock:
            if self.broken:
                raise GroupBroken(self.broken)
            self._pair = pair

    def send(self, headers: Sequence[bytes], payloads: Sequence[memoryview]) -> Iterator[int]:
        with self._lock:
            if self.broken:
                raise GroupBroken(self.broken)
            assert self._pair is not None
            self._announce(headers)
            try:
                sent = self._pair.send(payloads)
            except RuntimeError as error:
                raise self._break(error) from error
        return self._waiting(sent)

    def _waiting(self, sent: Iterator[int]) -> Iterator[int]:
        try:
            yield from sent
        except (RuntimeError, GroupBroken) as error:
            raise self._break(error) from error

    def _ended(self) -> None:
        # The pair has threads and sockets, and is let go of without the lock.
        with self._lock:
            pair, self._pair = self._pair, None
        del pair


class _Incoming(IncomingGroup):
    def __init__(
        self, inbox: Inbox, place: Collective, reply: Reply, on_end: Callable[[str], None]
    ) -> None:
        super().__init__(inbox, on_end)
        self._place = place
        self._pair: _Pair | None = None
        self._store = _store(place.host, 0, True)
        reply(kv_pb2.FromGroup(place=kv_pb2.GroupPlace(host=place.host, port=self._store.port)))
        self._thread.start()

    def _enter(self) -> None:
        self._pair = _Pair(self._store, RECEIVER_RANK, self._place)

    def _receive(
        self, announced: kv_pb2.FrameHeaders, sizes_bytes: Sequence[int]
    ) -> Iterator[memoryview]:
        assert self._pair is not None
        return self._pair.receive(sizes_bytes)

    def _leave(self) -> None:
        self._pair = None
