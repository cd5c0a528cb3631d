"""The receiving end of the hand-off: `KvInbox` over gRPC."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
import grpc.aio

from cluster.wire import kv_pb2, kv_pb2_grpc, worker_pb2
from workers.kv.frames import BadFrame, decode_frames
from workers.kv.inbox import Inbox, TransferState
from workers.kv.sender import TRANSFER_KEY

_ENDED_EARLY = "the sender's stream ended before the KV was whole"


def fingerprint_mismatch(mine: worker_pb2.Fingerprint, theirs: worker_pb2.Fingerprint) -> str:
    """What differs, with both values; empty when KV of one is right on the other."""
    differences = [
        f"{field.name} is {getattr(theirs, field.name)!r} at the sender and "
        f"{getattr(mine, field.name)!r} at the receiver"
        for field in mine.DESCRIPTOR.fields
        if getattr(mine, field.name) != getattr(theirs, field.name)
    ]
    return "; ".join(differences)


class KvInboxService(kv_pb2_grpc.KvInboxServicer):
    def __init__(
        self, inbox: Inbox, worker_id: str, incarnation: str, fingerprint: worker_pb2.Fingerprint
    ) -> None:
        self._inbox = inbox
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
        mismatch = fingerprint_mismatch(self._fingerprint, request.fingerprint)
        if mismatch:
            return kv_pb2.PairReply(
                reason=f"KV of {request.worker_id} would be wrong on {self._worker_id}: {mismatch}"
            )
        return kv_pb2.PairReply(accepted=True)

    async def push(
        self,
        frames: AsyncIterator[bytes],
        context: grpc.aio.ServicerContext[bytes, bytes],
    ) -> bytes:
        """Take frames until the stream ends. The stream carries one transfer."""
        # Told beside the frames, so that one whose first frame is damaged fails at once as well.
        transfer_id = dict(context.invocation_metadata() or ()).get(TRANSFER_KEY, "")
        state = TransferState.ARRIVING
        try:
            async for message in frames:
                try:
                    for frame in decode_frames(message):
                        if frame.header.transfer_id != transfer_id:
                            raise BadFrame(
                                f"a frame of {frame.header.transfer_id} in the stream of "
                                f"{transfer_id}"
                            )
                        state, reason = self._inbox.receive(frame)
                        if state is TransferState.FAILED:
                            return _result(False, reason)
                except BadFrame as error:
                    self._inbox.fail(transfer_id, str(error))
                    return _result(False, str(error))
        finally:
            # Also when the sender's process or connection is gone.
            if transfer_id and state is TransferState.ARRIVING:
                self._inbox.fail(transfer_id, _ENDED_EARLY)
        whole = state is TransferState.WHOLE
        return _result(whole, "" if whole else _ENDED_EARLY)

    def register(self, server: grpc.aio.Server) -> None:
        kv_pb2_grpc.add_KvInboxServicer_to_server(self, server)  # type: ignore[no-untyped-call]
        # A raw method of the same service: no protobuf between the socket and the inbox.
        handler = grpc.stream_unary_rpc_method_handler(self.push)
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("baton.v1.KvInbox", {"Push": handler}),)
        )


def _result(delivered: bool, reason: str) -> bytes:
    return kv_pb2.TransferResult(delivered=delivered, reason=reason).SerializeToString()
