"""One end of `baton bench kv`: `python -m workers.kv.bench_peer END SETTINGS`.

`receive` is a decode worker's inbox behind gRPC, and a plain TCP server beside it. It prints their
ports as one line of JSON, and ends when its standard input does. `send` pushes KV to it as a
prefill worker does, and the same bytes through the plain socket, in turns, and prints one line of
JSON for each hand-off. Neither has a model or vLLM.
"""

from __future__ import annotations

import asyncio
import functools
import json
import queue
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc.aio
import torch

from cluster.wire import GRPC_OPTIONS, kv_pb2, worker_pb2
from workers.kv import nixl
from workers.kv.codecs import CODECS, group_codec
from workers.kv.collective import Collective
from workers.kv.frames import checksum
from workers.kv.group import Transport
from workers.kv.inbox import Inbox
from workers.kv.incoming import KvGeometry, Settled
from workers.kv.nixl import Nixl
from workers.kv.nixl_agent import NoNixl
from workers.kv.sender import Identity, Sender
from workers.kv.service import KvInboxService
from workers.kv.transfer import FRAME_BYTES_MAX, GRPC, Sent
from workers.memory import keep_freed_memory

SENDER, RECEIVER = ("prefill-0", "bench"), ("decode-0", "bench")
FINGERPRINT = worker_pb2.Fingerprint(model="bench")
GEOMETRY = KvGeometry(layers=16, first_head=0, heads=8, head_size=128, element_bytes=2)
"""64 KiB a token, in bfloat16: what a model of some billion parameters has."""
DEADLINE_S = 60.0
STAGED_BYTES = 256 << 20
REST_S = 0.05
"""Between two measurements, for the receiver to free what it got."""
FREE_AFTER_S = 0.01
HOST = "127.0.0.1"


def transfer_id(number: int) -> str:
    return f"bench-{number}"


def transports(worker: tuple[str, str]) -> tuple[list[Transport], dict[str, str]]:
    """Those beside gRPC, and why others are not among them."""
    made: list[Transport] = [Collective(HOST, torch.device("cpu"))]
    try:
        return [*made, Nixl("/".join(worker))], {}
    except NoNixl as error:
        return made, {nixl.NAME: str(error)}


# --- the receiving end ----------------------------------------------------------------------------


class _Claims:
    """The decode legs: each transfer is expected, and taken when it is whole."""

    def __init__(self, inbox: Inbox, loop: asyncio.AbstractEventLoop) -> None:
        self._inbox = inbox
        self._loop = loop
        self._number = 0
        self._expect()

    def _expect(self) -> None:
        self._inbox.expect(transfer_id(self._number), SENDER, self._settled)

    def _settled(self, settled: Settled) -> None:
        # The answer to the sender goes first.
        self._loop.call_later(FREE_AFTER_S, self._inbox.take, settled.transfer_id)
        self._number += 1
        self._expect()


def _serve_plain(listening: socket.socket, size_bytes_max: int) -> None:
    """Take as many bytes as the first 8 announce, and answer with one."""
    target = memoryview(bytearray(size_bytes_max))
    connection, _ = listening.accept()
    with connection:
        while announced := connection.recv(8, socket.MSG_WAITALL):
            left = target[: int.from_bytes(announced, "little")]
            while left:
                left = left[connection.recv_into(left) :]
            connection.sendall(b"\1")


async def receive(settings: dict[str, Any]) -> None:
    loop = asyncio.get_running_loop()
    inbox = Inbox(GEOMETRY, RECEIVER[1], 4 * settings["size_bytes_max"], DEADLINE_S, time.monotonic)
    _Claims(inbox, loop)
    server = grpc.aio.server(options=GRPC_OPTIONS)
    ways, missing = transports(RECEIVER)
    KvInboxService(inbox, *RECEIVER, FINGERPRINT, DEADLINE_S, ways).register(server)
    port = server.add_insecure_port(f"{HOST}:0")
    await server.start()
    with socket.create_server((HOST, 0)) as listening:
        arguments = (listening, settings["size_bytes_max"])
        threading.Thread(target=_serve_plain, args=arguments, daemon=True).start()
        ports = {"grpc_port": port, "plain_port": listening.getsockname()[1]}
        names = [GRPC, *(way.name for way in ways)]
        print(json.dumps({"ports": ports, "transports": names, "missing": missing}), flush=True)
        await asyncio.to_thread(sys.stdin.read)
        await server.stop(0)


# --- the sending end ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Kv:
    """KV of a prompt, by layer: keys and values, both [heads, tokens, channels]."""

    tokens: int
    layers: list[torch.Tensor]
    """[2, heads, tokens, channels] each."""

    @staticmethod
    def of(size_bytes: int) -> _Kv:
        tokens = size_bytes // GEOMETRY.bytes_per_token
        shape = (2, GEOMETRY.heads, tokens, GEOMETRY.head_size)
        return _Kv(tokens, [torch.randn(shape).bfloat16() for _ in range(GEOMETRY.layers)])


class _Bench:
    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings
        self._sent: queue.Queue[Sent] = queue.Queue()
        ways: dict[str, list[Transport]] = {GRPC: []}
        ways |= {way.name: [way] for way in transports(SENDER)[0]}
        self._senders = {
            name: Sender(
                *(Identity(*SENDER, FINGERPRINT), STAGED_BYTES, DEADLINE_S, self._sent.put),
                *(way, name),
            )
            for name, way in ways.items()
        }
        self._number = 0
        self._plain = socket.create_connection((HOST, settings["plain_port"]))

    def run(self) -> None:
        for size_bytes in self._settings["sizes_bytes"]:
            kv = _Kv.of(size_bytes)
            target = torch.empty(size_bytes, dtype=torch.uint8)
            source = torch.cat([layer.flatten() for layer in kv.layers]).view(torch.uint8)
            ways: dict[str, Callable[[], int]] = {
                "memcpy": functools.partial(self._copy, target, source),
                "socket": functools.partial(self._push_plain, source),
            }
            for transport, sender in self._senders.items():
                for codec in self._settings["codecs"]:
                    push = functools.partial(self._push, sender, kv, codec)
                    ways[f"{transport}_{codec}"] = push
            # In turns, so that whatever else the machine does meets all of them.
            for repeat in range(-1, self._settings["repeats"]):
                for way, act in ways.items():
                    started_s = time.perf_counter()
                    wire_bytes = act()
                    taken_s = time.perf_counter() - started_s
                    if repeat >= 0:
                        row = {"way": way, "size_bytes": size_bytes, "taken_s": taken_s}
                        print(json.dumps(row | {"wire_bytes": wire_bytes}), flush=True)
                    time.sleep(REST_S)
        for sender in self._senders.values():
            sender.close()
        self._plain.close()

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> int:
        target.copy_(source)
        return 0

    def _push_plain(self, source: torch.Tensor) -> int:
        self._plain.sendall(source.numel().to_bytes(8, "little"))
        self._plain.sendall(source.numpy().data)
        assert self._plain.recv(1) == b"\1"
        return source.numel()

    def _push(self, sender: Sender, kv: _Kv, codec_name: str) -> int:
        """As BatonConnector does it, from KV that is read out of the cache to the answer that it
        is whole."""
        send = worker_pb2.SendKv(
            transfer_id=transfer_id(self._number),
            address=f"{HOST}:{self._settings['grpc_port']}",
            worker_id=RECEIVER[0],
            incarnation=RECEIVER[1],
        )
        self._number += 1
        transfer = sender.open(send, kv.tokens, b"digest")
        codec = group_codec(CODECS[codec_name])
        step = max(1, FRAME_BYTES_MAX // GEOMETRY.frame_bytes(1, GEOMETRY.heads))
        for index, layer in enumerate(kv.layers):
            for first in range(0, kv.tokens, step):
                tokens = min(step, kv.tokens - first)
                # One frame's KV is contiguous, as it is when it was read out of the cache.
                token_numbers = 2 * GEOMETRY.heads * GEOMETRY.head_size
                part = layer.view(-1)[first * token_numbers : (first + tokens) * token_numbers]
                if codec is not None:
                    shape = (2, GEOMETRY.heads, tokens, GEOMETRY.head_size)
                    part = codec.encode(*part.view(shape))
                payload = part.view(torch.uint8).numpy().data.cast("B")
                header = kv_pb2.KvFrame(
                    layer=index,
                    first_token=first,
                    tokens=tokens,
                    heads=GEOMETRY.heads,
                    codec=CODECS[codec_name],
                    checksum=checksum(payload),
                )
                transfer.push(kv_pb2.FrameHeader(transfer_id=send.transfer_id, kv=header), payload)
        transfer.finish()
        sent = self._sent.get(timeout=DEADLINE_S)
        if not sent.delivered:
            raise RuntimeError(f"a hand-off was not delivered: {sent.reason}")
        return sent.bytes


def main() -> None:
    warnings.filterwarnings("ignore", message="The given buffer is not writable")
    # One core for each end, as workers have on a machine with two.
    torch.set_num_threads(1)
    keep_freed_memory()
    end, settings = sys.argv[1], json.loads(sys.argv[2])
    if end == "receive":
        asyncio.run(receive(settings))
    else:
        # In a worker, too, KV comes from a thread of the engine's.
        engine = threading.Thread(target=_Bench(settings).run)
        engine.start()
        engine.join()


if __name__ == "__main__":
    main()
