"""Both ends of a hand-off without an engine: a receiver's service, and a sender."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import struct
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc.aio

from cluster.wire import GRPC_OPTIONS, kv_pb2, worker_pb2
from workers.kv.frames import ALIGNMENT_BYTES, checksum
from workers.kv.inbox import Inbox
from workers.kv.incoming import KvGeometry, Settled
from workers.kv.sender import Sender
from workers.kv.service import KvInboxService
from workers.kv.transfer import Sent, Transfer

GEOMETRY = KvGeometry(layers=3, first_head=0, heads=2, head_size=4, element_bytes=2)
TOKENS = 8
LAYER_BYTES = GEOMETRY.frame_bytes(TOKENS, GEOMETRY.heads)
HERE = ("decode", "decode-1")
SENDER = ("prefill", "prefill-1")
FINGERPRINT = worker_pb2.Fingerprint(model="tiny", dtype="float32", layers=3)
LONG_S = 30.0
"""A deadline that no test comes near."""
BUSY_S = 60.0
"""What it waits for something that takes its time."""
SOON_S = 10.0
"""What a test waits for something that should happen at once."""

T = TypeVar("T")
Frames = AsyncIterator[bytes]
Context = grpc.aio.ServicerContext[Any, Any]


class Loop:
    """An event loop in a thread of its own, for servers."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(SOON_S)

    def soon(self, work: Callable[[], object]) -> None:
        self._loop.call_soon_threadsafe(work)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(SOON_S)
        self._loop.close()


class Receiver(KvInboxService):
    """A decode worker's end. `frames_seen` gets a frame's number when the frame is taken in."""

    def __init__(
        self,
        loop: Loop,
        incarnation: str = HERE[1],
        fingerprint: worker_pb2.Fingerprint = FINGERPRINT,
        inbox: Inbox | None = None,
        credit_deadline_s: float = LONG_S,
    ) -> None:
        self.inbox = inbox or Inbox(GEOMETRY, incarnation, 1 << 20, LONG_S, time.monotonic)
        super().__init__(self.inbox, HERE[0], incarnation, fingerprint, credit_deadline_s)
        self.incarnation = incarnation
        self.frames_seen: queue.Queue[int] = queue.Queue()
        self.pushes = 0
        self._loop = loop
        self.port = 0

    def start(self, port: int = 0) -> None:
        self._loop.call(self._start(port))

    async def _start(self, port: int) -> None:
        self._server = grpc.aio.server(options=GRPC_OPTIONS)
        self.register(self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        await self._server.start()

    def stop(self) -> None:
        self._loop.call(self._server.stop(0))

    async def push(self, frames: Frames, context: Context) -> AsyncIterator[bytes]:
        self.pushes += 1
        watched = self._watched(self.on_the_wire(single(frames)))
        # Closed with the stream, as the method itself is.
        async with contextlib.aclosing(super().push(watched, context)) as replies:
            async for reply in replies:
                yield reply

    async def _watched(self, frames: Frames) -> Frames:
        number = 0
        async for frame in frames:
            # Asked for when the one before has been taken in.
            if number:
                self.frames_seen.put(number - 1)
            number += 1
            yield frame

    def on_the_wire(self, frames: Frames) -> Frames:
        return frames

    def send_kv(self, transfer_id: str = "t") -> worker_pb2.SendKv:
        return worker_pb2.SendKv(
            transfer_id=transfer_id,
            address=f"127.0.0.1:{self.port}",
            worker_id=HERE[0],
            incarnation=self.incarnation,
        )

    def claim(self, transfer_id: str = "t") -> queue.Queue[Settled]:
        settled: queue.Queue[Settled] = queue.Queue()
        self.inbox.expect(transfer_id, SENDER, settled.put)
        return settled


async def single(messages: Frames) -> Frames:
    """One frame a message, whichever shared one."""
    async for message in messages:
        first = 0
        while first < len(message):
            header_bytes, _, payload_bytes = struct.unpack_from("<IIQ", message, first)
            end = first + 16 + header_bytes
            end += -header_bytes % ALIGNMENT_BYTES + payload_bytes
            end += -payload_bytes % ALIGNMENT_BYTES
            yield message[first:end]
            first = end


@dataclass
class Outbox:
    """A prefill worker's end."""

    sender: Sender
    sent: queue.Queue[Sent]
    threads_before: set[threading.Thread]

    def open(self, receiver: Receiver, transfer_id: str = "t") -> Transfer:
        return self.sender.open(receiver.send_kv(transfer_id), TOKENS, b"digest")

    def result(self) -> Sent:
        return self.sent.get(timeout=SOON_S)

    def assert_at_rest(self) -> None:
        """Nothing is staged, no transfer is open, and no thread is left."""
        for thread in set(threading.enumerate()) - self.threads_before:
            thread.join(SOON_S)
            assert not thread.is_alive(), thread.name
        assert self.sender.sending[:2] == (0, 0)
        assert self.sent.empty()


MakeOutbox = Callable[..., Outbox]


def layer_payload(layer: int) -> memoryview:
    return memoryview(bytes((layer * 31 + i) % 256 for i in range(LAYER_BYTES)))


def push_layer(transfer: Transfer, layer: int, payload: memoryview | None = None) -> None:
    payload = layer_payload(layer) if payload is None else payload
    kv = kv_pb2.KvFrame(
        layer=layer, tokens=TOKENS, heads=GEOMETRY.heads, checksum=checksum(payload)
    )
    transfer.push(kv_pb2.FrameHeader(transfer_id=transfer.transfer_id, kv=kv), payload)


def push_all(transfer: Transfer) -> None:
    for layer in range(GEOMETRY.layers):
        push_layer(transfer, layer)
    transfer.finish()


def wait_until(what: str, condition: Callable[[], bool]) -> None:
    until_s = time.monotonic() + BUSY_S
    while not condition():
        assert time.monotonic() < until_s, what
        time.sleep(0.02)


class Silent(Receiver):
    """Answers nothing until it is let go."""

    def __init__(self, loop: Loop, method: str) -> None:
        super().__init__(loop)
        self._method = method
        self._go = asyncio.Event()
        self.asked: queue.Queue[str] = queue.Queue()

    async def Pair(  # noqa: N802 - gRPC's name
        self, request: kv_pb2.PairRequest, context: Context
    ) -> kv_pb2.PairReply:
        await self._wait("Pair")
        return await super().Pair(request, context)

    async def push(self, frames: Frames, context: Context) -> AsyncIterator[bytes]:
        await self._wait("Push")
        result = kv_pb2.TransferResult(reason="at last")
        yield kv_pb2.PushReply(result=result).SerializeToString()

    async def _wait(self, method: str) -> None:
        self.asked.put(method)
        if method == self._method:
            await self._go.wait()

    def let_go(self) -> None:
        self._loop.soon(self._go.set)


def inbox_of(size_bytes: int) -> Inbox:
    return Inbox(GEOMETRY, HERE[1], size_bytes, LONG_S, time.monotonic)
