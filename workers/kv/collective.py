"""The collective transport: payloads go by torch.distributed, point to point, in a group of two.

Gloo on CPUs, NCCL on GPUs, by the same code. A group is made when one worker start first sends to
another, over a store of its own, and never joins the process's default group. Headers go over gRPC
(`JoinGroup`), in the order of the payloads in the group, so that nothing is received that was not
announced, and the end of that stream is the end of the group: no end waits for one that is gone.
Whatever goes wrong breaks the group; its transfers fail, and the next one makes another.
"""

from __future__ import annotations

import datetime
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import torch
import torch.distributed as torch_distributed

from cluster.wire import kv_pb2
from workers.kv.frames import BadFrame, Frame, check_payload, decode_header
from workers.kv.inbox import Inbox

logger = logging.getLogger(__name__)

# Which of it is there depends on torch's build, and its stubs don't follow.
distributed: Any = torch_distributed

NAME = "collective"
SENDER_RANK, RECEIVER_RANK = 0, 1
GROUP_DEADLINE_S = 5.0
"""To make a group; and for a batch of payloads, for one that is alive takes them at once."""
BATCH_BYTES_MIN = 32 << 20
"""Payloads that are announced together, if as much waits."""
PAYLOAD_BYTES_MAX = 64 << 20
NCCL_POLL_S = 0.0002


class GroupBroken(Exception):
    """The group cannot be used any more."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where this end of its groups is."""

    host: str
    """Of the interface that other workers reach."""
    device: torch.device


class Group:
    """Two processes of which one sends and the other receives. For one thread at each end at a
    time. Methods raise whatever torch.distributed does, mostly RuntimeError."""

    def __init__(self, store: Any, rank: int, place: Place) -> None:
        self._device = place.device
        timeout = datetime.timedelta(seconds=GROUP_DEADLINE_S)
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

    def send(self, payloads: Sequence[memoryview]) -> Callable[[], None]:
        """Returns what waits until they are sent; until then they must stay as they are."""
        posted = []
        for payload in payloads:
            tensor = torch.frombuffer(payload, dtype=torch.uint8).to(self._device)
            posted.append((self._group.send([tensor], RECEIVER_RANK, 0), tensor))

        def wait() -> None:
            for work, _ in posted:
                self._wait(work)

        return wait

    def receive(self, sizes_bytes: Sequence[int]) -> Iterator[memoryview]:
        """Ready to take them from now on; each is waited for when it is asked for."""
        posted = []
        for size_bytes in sizes_bytes:
            tensor = torch.empty(size_bytes, dtype=torch.uint8, device=self._device)
            posted.append((self._group.recv([tensor], SENDER_RANK, 0), tensor))
        return (self._received(work, tensor) for work, tensor in posted)

    def _received(self, work: Any, tensor: torch.Tensor) -> memoryview:
        self._wait(work)
        return tensor.cpu().numpy().data

    def _wait(self, work: Any) -> None:
        if self._device.type != "cuda":
            work.wait(datetime.timedelta(seconds=GROUP_DEADLINE_S))
            return
        # NCCL's own wait is the stream's, which does not end when the peer is gone.
        until_s = time.monotonic() + GROUP_DEADLINE_S
        while not work.is_completed():
            if time.monotonic() > until_s:
                self._group.abort()
                raise GroupBroken(f"the peer took or gave nothing for {GROUP_DEADLINE_S:g} s")
            time.sleep(NCCL_POLL_S)
        work.wait()
        torch.cuda.current_stream(self._device).synchronize()


def _store(host: str, port: int, is_master: bool) -> Any:
    return distributed.TCPStore(
        host,
        port,
        is_master=is_master,
        timeout=datetime.timedelta(seconds=GROUP_DEADLINE_S),
        wait_for_workers=False,
    )


class OutgoingGroup:
    """The sending end. Several transfers may use it at once."""

    def __init__(self, join: Callable[..., Any], member: kv_pb2.GroupMember, place: Place) -> None:
        """`join`: the JoinGroup of a stub.

        Raises:
            GroupBroken: the other end does not join in time.
        """
        self._lock = threading.Lock()
        self.broken = ""
        self._up: queue.SimpleQueue[kv_pb2.ToGroup | None] = queue.SimpleQueue()
        self._up.put(kv_pb2.ToGroup(join=member))
        self._places: queue.SimpleQueue[kv_pb2.GroupPlace | None] = queue.SimpleQueue()
        self._call = join(iter(self._up.get, None))
        self._watcher = threading.Thread(target=self._watch, name="kv-group", daemon=True)
        self._watcher.start()
        try:
            met = self._places.get(timeout=GROUP_DEADLINE_S)
            if met is None:
                raise GroupBroken(self.broken)
            self._group = Group(_store(met.host, met.port, False), SENDER_RANK, place)
        except queue.Empty:
            self.close(f"nobody joined it within {GROUP_DEADLINE_S:g} s")
            raise GroupBroken(self.broken) from None
        except RuntimeError as error:
            self.close(f"it cannot be made: {error}")
            raise GroupBroken(self.broken) from error

    def send(self, headers: Sequence[bytes], payloads: Sequence[memoryview]) -> Callable[[], None]:
        """Announce payloads and send them. Returns what waits until they are sent.

        Raises:
            GroupBroken; so does what it returns.
        """
        with self._lock:
            if self.broken:
                raise GroupBroken(self.broken)
            self._up.put(kv_pb2.ToGroup(headers=kv_pb2.FrameHeaders(headers=headers)))
            try:
                sent = self._group.send(payloads)
            except RuntimeError as error:
                raise self._break(error) from error

        def wait() -> None:
            try:
                sent()
            except RuntimeError as error:
                raise self._break(error) from error

        return wait

    def close(self, reason: str) -> None:
        self.broken = self.broken or reason
        self._up.put(None)
        self._call.cancel()

    def _break(self, error: Exception) -> GroupBroken:
        self.close(str(error).partition("\n")[0])
        return GroupBroken(self.broken)

    def _watch(self) -> None:
        """Until the stream ends, and the group with it."""
        reason = "the receiver left it"
        try:
            for place in self._call:
                self._places.put(place)
        except grpc.RpcError as error:
            reason = str(error.details()) if isinstance(error, grpc.Call) else str(error)
        self.broken = self.broken or reason
        self._up.put(None)
        self._places.put(None)


class IncomingGroup:
    """The receiving end: a thread that takes announced payloads in, and calls `on_end` at its end.

    A transfer that has failed here is still received, for the order's sake, and thrown away.
    """

    def __init__(self, inbox: Inbox, place: Place, on_end: Callable[[], None]) -> None:
        self._inbox = inbox
        self._place = place
        self._on_end = on_end
        self._store = _store(place.host, 0, True)
        # Bounded by the sender, which announces no more than two batches a transfer ahead.
        self._announced: queue.SimpleQueue[Sequence[bytes] | None] = queue.SimpleQueue()
        self._open: set[str] = set()
        self._thread = threading.Thread(target=self._run, name="kv-group", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self._store.port)

    def announce(self, headers: Sequence[bytes]) -> None:
        self._announced.put(headers)

    def close(self) -> None:
        """Does not wait: the thread ends after what it receives, or at that one's deadline."""
        self._announced.put(None)

    def _run(self) -> None:
        reason = "the sender left the group"
        try:
            group = Group(self._store, RECEIVER_RANK, self._place)
            self._take_all(group)
        except Exception as error:
            reason = f"the group broke: {str(error).partition(chr(10))[0]}"
            logger.warning("%s", reason)
        for transfer_id in self._open:
            self._inbox.fail(transfer_id, reason)
        self._on_end()

    def _take_all(self, group: Group) -> None:
        """Until the end of the stream. What is announced is received while what came before it is
        checked."""
        coming: deque[Iterator[Frame]] = deque()
        while True:
            try:
                announced = self._announced.get(block=not coming)
                if announced is None:
                    return
                coming.append(self._frames(group, announced))
            except queue.Empty:
                frame = next(coming[0], None)
                if frame is None:
                    coming.popleft()
                else:
                    self._take_frame(frame)

    def _frames(self, group: Group, announced: Sequence[bytes]) -> Iterator[Frame]:
        headers = [decode_header(encoded) for encoded in announced]
        sizes = [size_bytes for _, size_bytes in headers if size_bytes]
        if any(size_bytes > PAYLOAD_BYTES_MAX for size_bytes in sizes):
            raise BadFrame(f"a payload of {max(sizes)} bytes")
        payloads = group.receive(sizes)
        return (
            Frame(header, next(payloads) if size_bytes else memoryview(b""))
            for header, size_bytes in headers
        )

    def _take_frame(self, frame: Frame) -> None:
        transfer_id = frame.header.transfer_id
        match frame.header.WhichOneof("kind"):
            case "kv":
                self._open.add(transfer_id)
                try:
                    check_payload(frame.header, frame.payload)
                except BadFrame as error:
                    self._inbox.fail(transfer_id, str(error))
                else:
                    self._inbox.receive(frame)
            case "end":
                self._open.discard(transfer_id)
                self._inbox.fail(transfer_id, "the sender's frames ended before the KV was whole")
            case "abort":
                self._open.discard(transfer_id)
                self._inbox.receive(frame)
            case kind:
                raise BadFrame(f"a frame of kind {kind} in a group")
