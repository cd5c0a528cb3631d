"""The receiving end of the hand-off: `KvInbox` over gRPC."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

import grpc
import grpc.aio

from cluster.fingerprints import why_not_joined
from cluster.handoff_failure import HandoffFailure
from cluster.wire import kv_pb2, kv_pb2_grpc, worker_pb2
from workers.kv.frames import BadFrame, Frame, decode_frames
from workers.kv.group import IncomingGroup, Transport
from workers.kv.inbox import Inbox
from workers.kv.incoming import TransferState
from workers.kv.transfer import GRPC, TRANSFER_KEY

HELD_WAIT_S = 0.5
"""For the engine to say what of a prompt it holds; without a word all of it is sent."""
_ENDED_EARLY = "the sender's stream ended before the KV was whole"


class KvInboxService(kv_pb2_grpc.KvInboxServicer):
    """`credit_deadline_s`: how long a transfer may wait for room in the inbox. `transports`: the
    ways beside gRPC by which payloads may come."""

    def __init__(
        self,
        inbox: Inbox,
        worker_id: str,
        incarnation: str,
        fingerprint: worker_pb2.Fingerprint,
        credit_deadline_s: float,
        transports: Sequence[Transport] = (),
    ) -> None:
        self._inbox = inbox
        self._transports = {transport.name: transport for transport in transports}
        self._credit_deadline_s = credit_deadline_s
        self._worker_id = worker_id
        self._incarnation = incarnation
        self._fingerprint = fingerprint

    async def Pair(  # noqa: N802 - gRPC's name
        self,
        request: kv_pb2.PairRequest,
        context: grpc.aio.ServicerContext[kv_pb2.PairRequest, kv_pb2.PairReply],
    ) -> kv_pb2.PairReply:
        asked = (request.to_worker_id, request.to_incarnation)
        if asked != (self._worker_id, self._incarnation):
            return kv_pb2.PairReply(
                reason=f"asked for {'/'.join(asked)}, this is {self._worker_id}/{self._incarnation}"
            )
        if refused := why_not_joined(
            *(request.worker_id, request.fingerprint), *(self._worker_id, self._fingerprint)
        ):
            return kv_pb2.PairReply(reason=refused)
        return kv_pb2.PairReply(accepted=True, transports=[GRPC, *self._transports])

    async def JoinGroup(  # noqa: N802 - gRPC's name
        self,
        requests: AsyncIterator[kv_pb2.ToGroup],
        context: grpc.aio.ServicerContext[kv_pb2.ToGroup, kv_pb2.FromGroup],
    ) -> AsyncIterator[kv_pb2.FromGroup]:
        member = (await anext(requests)).join
        here = f"{self._worker_id}/{self._incarnation}"
        refused = f"{here} joins no {member.transport} group with {member.worker_id}"
        transport = self._transports.get(member.transport)
        if transport is None or member.to_incarnation != self._incarnation:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, refused)
        assert transport is not None
        loop = asyncio.get_running_loop()
        # Bounded by what is announced: an answer or none for each. A reason is the last one.
        answers: asyncio.Queue[kv_pb2.FromGroup | str] = asyncio.Queue()

        def answer(what: kv_pb2.FromGroup | str) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: so is the stream
                loop.call_soon_threadsafe(answers.put_nowait, what)

        try:
            group = transport.accept(member, self._inbox, answer, answer)
        except Exception as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"{refused}: {error}")
        announced = asyncio.create_task(_announced(requests, group))
        try:
            while not isinstance(what := await answers.get(), str):
                yield what
            await context.abort(grpc.StatusCode.ABORTED, what)
        finally:
            group.close()
            announced.cancel()
            await asyncio.gather(announced, return_exceptions=True)

    async def push(
        self,
        frames: AsyncIterator[bytes],
        context: grpc.aio.ServicerContext[bytes, bytes],
    ) -> AsyncIterator[bytes]:
        """Take frames until the stream ends. The stream carries one transfer; what it holds is free
        again as soon as the stream breaks."""
        # Told beside the frames, so that one whose first frame is damaged fails at once as well.
        transfer_id = dict(context.invocation_metadata() or ()).get(TRANSFER_KEY, "")
        opened: kv_pb2.OpenTransfer | None = None
        coming = _frames(frames, transfer_id)
        try:
            first = await anext(coming, None)
            if first is None:
                yield _result(_ENDED_EARLY)
                return
            _, reason = self._inbox.receive(first)
            if first.header.WhichOneof("kind") == "open":
                opened = first.header.open
                ended = _Answer()
                self._inbox.await_end(transfer_id, ended)
                reason = reason or await self._credit(transfer_id, opened.expects_held)
            if reason or opened is None:
                yield _result(reason)
                return
            yield _credit(self._inbox.held(transfer_id))
            if opened.transport in self._transports:
                # Its payloads don't come in this stream.
                yield _result(await ended.future)
                return
            # When it fails, no other frame may come: its sender may be alive and stand still. The
            # read that is under way ends with the stream, and is not to be cancelled before.
            taken = asyncio.create_task(self._take(coming), name="kv-take")
            taken.add_done_callback(lambda task: task.cancelled() or task.exception())
            await asyncio.wait((taken, ended.future), return_when=asyncio.FIRST_COMPLETED)
            reason = ended.future.result() if ended.future.done() else ""
            yield _result(reason or await taken)
        except BadFrame as error:
            self._inbox.fail(transfer_id, str(error), HandoffFailure.WRONG)
            yield _result(str(error))
        finally:
            # Also when the sender's process or connection is gone. Other parts may be on their way.
            self._inbox.stream_broke(transfer_id, opened, _ENDED_EARLY)

    async def _take(self, coming: AsyncIterator[Frame]) -> str:
        """Until the stream ends. Returns why not all has come."""
        state = TransferState.ARRIVING
        async for frame in coming:
            state, reason = self._inbox.receive(frame)
            if reason:
                return reason
        return "" if state is TransferState.WHOLE else _ENDED_EARLY

    async def _credit(self, transfer_id: str, expects_held: bool) -> str:
        """Wait for it. Returns why there is none."""
        if expects_held:
            loop = asyncio.get_running_loop()
            loop.call_later(HELD_WAIT_S, self._inbox.hold, transfer_id, 0)
        answer = _Answer()
        self._inbox.await_credit(transfer_id, answer)
        try:
            async with asyncio.timeout(self._credit_deadline_s):
                return await answer.future
        except TimeoutError:
            reason = f"the inbox had no room for it within {self._credit_deadline_s:g} s"
            self._inbox.fail(transfer_id, reason, HandoffFailure.NO_ROOM)
            return reason

    def register(self, server: grpc.aio.Server) -> None:
        kv_pb2_grpc.add_KvInboxServicer_to_server(self, server)  # type: ignore[no-untyped-call]
        # A raw method of the same service: no protobuf between the socket and the inbox.
        handler = grpc.stream_stream_rpc_method_handler(self.push)
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("baton.v1.KvInbox", {"Push": handler}),)
        )


async def _announced(requests: AsyncIterator[kv_pb2.ToGroup], group: IncomingGroup) -> None:
    try:
        async for message in requests:
            group.announce(message.headers)
    finally:
        # Its thread ends, and says so.
        group.close()


async def _frames(messages: AsyncIterator[bytes], transfer_id: str) -> AsyncIterator[Frame]:
    """Those of this transfer, for no others belong into its stream."""
    async for message in messages:
        for frame in decode_frames(message):
            if frame.header.transfer_id != transfer_id:
                raise BadFrame(
                    f"a frame of {frame.header.transfer_id} in the stream of {transfer_id}"
                )
            yield frame


class _Answer:
    """What the inbox calls, on any thread, and the event loop waits for."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.future: asyncio.Future[str] = self._loop.create_future()

    def __call__(self, reason: str) -> None:
        self._loop.call_soon_threadsafe(self._settle, reason)

    def _settle(self, reason: str) -> None:
        if not self.future.done():
            self.future.set_result(reason)


def _result(reason: str) -> bytes:
    result = kv_pb2.TransferResult(delivered=not reason, reason=reason)
    return kv_pb2.PushReply(result=result).SerializeToString()


def _credit(held_tokens: int) -> bytes:
    credit = kv_pb2.Credit(held_tokens=held_tokens)
    return kv_pb2.PushReply(credit=credit).SerializeToString()
