"""One end of a group in a process: `python -m tests.unit.group_peer TRANSPORT END`.

`receive` prints its port and answers each line with what its inbox holds. `send PORT` pushes one
layer of transfer `t`, prints a line, and then waits for ever.
"""

from __future__ import annotations

import sys
import threading
import time

import torch

from cluster.wire import kv_pb2, worker_pb2
from tests.unit.ends import FINGERPRINT, HERE, LONG_S, SENDER, Loop, Receiver
from workers.kv.collective import Collective
from workers.kv.frames import checksum
from workers.kv.group import Transport
from workers.kv.inbox import Inbox
from workers.kv.incoming import KvGeometry
from workers.kv.nixl import Nixl
from workers.kv.sender import Identity, Sender
from workers.kv.transfer import Transfer

GEOMETRY = KvGeometry(layers=24, first_head=0, heads=2, head_size=64, element_bytes=2)
TOKENS = 2048
LAYER_BYTES = GEOMETRY.frame_bytes(TOKENS, GEOMETRY.heads)
"""All layers are more than what waits in sockets for one that is frozen."""


def transport(name: str, worker: str) -> Transport:
    if name == "nixl":
        return Nixl(worker)
    return Collective("127.0.0.1", torch.device("cpu"))


class GroupReceiver(Receiver):
    def __init__(self, loop: Loop, *transports: Transport) -> None:
        inbox = Inbox(GEOMETRY, HERE[1], 1 << 30, LONG_S, time.monotonic)
        super().__init__(loop, inbox=inbox)
        self.transports = {transport.name: transport for transport in transports}
        self._transports = self.transports


def send_kv(port: int, transfer_id: str = "t") -> worker_pb2.SendKv:
    return worker_pb2.SendKv(
        transfer_id=transfer_id,
        address=f"127.0.0.1:{port}",
        worker_id=HERE[0],
        incarnation=HERE[1],
    )


def payload_of(layer: int, heads: int = GEOMETRY.heads) -> memoryview:
    return memoryview(bytearray([layer + 1]) * (LAYER_BYTES * heads // GEOMETRY.heads))


def push_layer(
    transfer: Transfer,
    layer: int,
    checksum_of: memoryview | None = None,
    heads: range = range(GEOMETRY.heads),
) -> None:
    payload = payload_of(layer, len(heads))
    kv = kv_pb2.KvFrame(
        layer=layer,
        tokens=TOKENS,
        first_head=heads.start,
        heads=len(heads),
        checksum=checksum(payload if checksum_of is None else checksum_of),
    )
    transfer.push(kv_pb2.FrameHeader(transfer_id=transfer.transfer_id, kv=kv), payload)


def receive(name: str) -> None:
    receiver = GroupReceiver(Loop(), transport(name, "receiver"))
    receiver.start()
    print(receiver.port, flush=True)
    for _ in sys.stdin:
        print(receiver.inbox.bytes_held, flush=True)


def send(name: str, port: int) -> None:
    identity = Identity(*SENDER, FINGERPRINT)
    ways = [transport(name, "sender")]
    sender = Sender(identity, 1 << 30, LONG_S, lambda sent: None, ways, name)
    transfer = sender.open(send_kv(port), TOKENS, b"digest")
    push_layer(transfer, 0)
    assert transfer.credit.wait(LONG_S)
    print("sending", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    if sys.argv[2] == "receive":
        receive(sys.argv[1])
    else:
        send(sys.argv[1], int(sys.argv[3]))
