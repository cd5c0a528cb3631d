"""A router's stream to one worker."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence

import grpc
import grpc.aio

from cluster.arrivals import Arrivals, MessageLost
from cluster.outgoing import WAITING_MAX, Outgoing
from cluster.wire import GRPC_OPTIONS, worker_pb2, worker_pb2_grpc
from router.keeping_up import KeepingUp

logger = logging.getLogger(__name__)

DESCRIBE_DEADLINE_S = 10.0


class WorkerLink:
    """Connects, describes, then carries messages both ways until either end stops.

    `on_messages` and `on_lost` are called on the event loop; `on_lost` once, and not after `close`.
    """

    def __init__(
        self,
        address: str,
        on_messages: Callable[[Sequence[worker_pb2.FromEngine]], None],
        on_lost: Callable[[str], None],
    ) -> None:
        self.address = address
        self._on_messages = on_messages
        self._on_lost = on_lost
        self._channel = grpc.aio.insecure_channel(address, options=GRPC_OPTIONS)
        self._stub = worker_pb2_grpc.WorkerStub(self._channel)  # type: ignore[no-untyped-call]
        self._outgoing: Outgoing[worker_pb2.ToEngine] = Outgoing()
        self._keeping_up = KeepingUp(self._tell_taken)
        self._reader: asyncio.Task[None] | None = None

    async def connect(self) -> worker_pb2.WorkerDescription:
        """Raises grpc.aio.AioRpcError when the worker does not answer."""
        description: worker_pb2.WorkerDescription = await self._stub.Describe(
            worker_pb2.DescribeRequest(), timeout=DESCRIBE_DEADLINE_S
        )
        return description

    def start(self) -> None:
        self._reader = asyncio.create_task(self._read(), name=f"link {self.address}")

    def send(self, message: worker_pb2.ToEngine) -> None:
        """Never blocks. A worker that does not take messages any more is given up."""
        try:
            self._outgoing.put(message)
        except asyncio.QueueFull:
            if self._reader is not None:
                self._reader.cancel()

    async def close(self) -> None:
        if self._reader is not None:
            reader, self._reader = self._reader, None
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
        await self._channel.close(None)

    async def _read(self) -> None:
        reason = "it closed the stream"
        arrivals = Arrivals()
        try:
            async for batch in self._stub.Engine(self._requests()):
                if not arrivals.is_new(batch.number):
                    continue
                failed = self._on_batch(batch)
                if failed is not None:
                    reason = f"its engine failed: {failed}"
                    break
        except asyncio.CancelledError:
            if self._reader is None:
                raise
            reason = f"it is {WAITING_MAX} messages behind"
        except grpc.aio.AioRpcError as error:
            reason = f"{error.code().name}: {error.details()}"
        except MessageLost as error:
            reason = str(error)
        except Exception as error:
            logger.exception("a message of %s cannot be handled", self.address)
            reason = f"{type(error).__name__}: {error}"
        finally:
            # gRPC's task would wait for the next message for good.
            self._outgoing.close()
        if self._reader is not None:
            self._on_lost(reason)

    def _on_batch(self, batch: worker_pb2.FromEngineBatch) -> str | None:
        """Why its engine failed, if it did."""
        self._on_messages(batch.messages)
        self._keeping_up.on_batch(batch.number)
        # Not always the last thing said: replies to calls may have been under way.
        failures = (m.failed.message for m in batch.messages if m.HasField("failed"))
        return next(failures, None)

    def _tell_taken(self, number: int, gather: bool) -> None:
        taken = worker_pb2.BatchesTaken(number=number, gather=gather)
        self.send(worker_pb2.ToEngine(taken=taken))

    async def _requests(self) -> AsyncIterator[worker_pb2.ToEngineBatch]:
        with contextlib.suppress(asyncio.CancelledError):
            while (batch := await self._outgoing.take()) is not None:
                number, messages = batch
                yield worker_pb2.ToEngineBatch(number=number, messages=messages)
