"""A worker whose outgoing KV is spoilt in the way that a file names, for the tests beside it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from cluster.wire import kv_pb2, worker_pb2
from workers import __main__ as worker_main
from workers.kv import sender
from workers.kv.frames import checksum

FAULT_FILE = "BATON_TEST_FAULT_FILE"


def spoilt(payload: memoryview) -> memoryview:
    changed = bytearray(payload)
    # The exponent of every float: large changes, so that no answer survives them by chance.
    for position in range(3, len(changed), 4):
        changed[position] ^= 0x41
    return memoryview(bytes(changed))


def sent_to(send: worker_pb2.SendKv, address: str = "", incarnation: str = "") -> worker_pb2.SendKv:
    other = worker_pb2.SendKv.FromString(send.SerializeToString())
    other.MergeFrom(worker_pb2.SendKv(address=address, incarnation=incarnation))
    return other


class TamperingTransfer(sender.Transfer):
    def push_copy(self, header: kv_pb2.FrameHeader, parts: Sequence[memoryview]) -> None:
        self.push(header, memoryview(b"".join(parts)))

    def push(self, header: kv_pb2.FrameHeader, payload: memoryview) -> None:
        match Path(os.environ[FAULT_FILE]).read_text():
            case "silent":
                payload = spoilt(payload)
                header.kv.checksum = checksum(payload)
            case "flipped":
                payload = spoilt(payload)
            case "truncated":
                payload = payload[: len(payload) // 2]
            case "missing" if header.kv.layer == 1:
                return
            case "duplicated" if header.kv.layer == 1:
                super().push(header, payload)
            case "foreign":
                header.transfer_id = "another transfer"
        super().push(header, payload)

    def start(self, opened: kv_pb2.OpenTransfer) -> None:
        match Path(os.environ[FAULT_FILE]).read_text():
            case "other prompt":
                opened.prompt_digest = bytes(16)
            case "stale receiver":
                opened.to_incarnation = "an older one"
            case "stale sender":
                opened.from_incarnation = "an older one"
            case "no way":
                # Where nobody listens: routers reach the worker, and other workers do not.
                self._send = sent_to(self._send, address="127.0.0.1:9")
            case "no pair":
                self._send = sent_to(self._send, incarnation="an older one")
        super().start(opened)


def open_tampering(
    self: sender.Sender, send: worker_pb2.SendKv, tokens: int, prompt_digest: bytes
) -> sender.Transfer:
    original = sender.Transfer
    sender.Transfer = TamperingTransfer  # type: ignore[misc]
    try:
        return OPEN(self, send, tokens, prompt_digest)
    finally:
        sender.Transfer = original  # type: ignore[misc]


OPEN = sender.Sender.open

if __name__ == "__main__":
    sender.Sender.open = open_tampering  # type: ignore[method-assign]
    worker_main.main()
