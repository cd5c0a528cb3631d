"""What processes of a gated cluster hold, and clients that go away."""

from __future__ import annotations

import contextlib
import itertools
import json
import queue
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import grpc
import httpx

from cluster.wire import kv_pb2, worker_pb2, worker_pb2_grpc
from tests.integration.gated_worker import GATES_FOLDER, THREADS
from tests.integration.test_equal_to_plain_vllm import prompt_of
from tests.processes import Cluster
from workers.kv.peer import PUSH_METHOD
from workers.kv.transfer import TRANSFER_KEY

REACH_S = 60.0
"""For a busy machine to come to a point."""
FREE_S = 5.0
"""For everything to be free again: what is promised even for what a dead peer held."""
POLL_S = 0.02

Held = dict[str, dict[str, int]]
"""By process, and what."""


class Watch:
    """Asks workers and router of a cluster what they hold."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.gates = Path(cluster.environment[GATES_FOLDER])
        self.leaked = ""
        """Then it is no use to wait again."""
        self._http = httpx.Client(base_url=cluster.url, timeout=10)
        self._channels = {
            row["worker_id"]: grpc.insecure_channel(row["address"])
            for row in self.state()["workers"]
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._http.close()
        for channel in self._channels.values():
            channel.close()

    def state(self) -> dict[str, Any]:
        """The dashboard's."""
        state: dict[str, Any] = self._http.get("/dashboard/state").json()
        return state

    def channel(self, worker_id: str) -> grpc.Channel:
        return self._channels[worker_id]

    def describe(self, worker_id: str) -> worker_pb2.WorkerDescription:
        stub = worker_pb2_grpc.WorkerStub(self._channels[worker_id])  # type: ignore[no-untyped-call]
        about: worker_pb2.WorkerDescription = stub.Describe(
            worker_pb2.DescribeRequest(), timeout=10
        )
        return about

    def left(self, worker_id: str, what: str) -> bytes:
        return (self.gates / f"{worker_id}.{what}").read_bytes()

    @property
    def decode_workers(self) -> list[str]:
        return [worker_id for worker_id in self._channels if worker_id.startswith("decode")]

    def now(self) -> Held:
        held = {worker_id: self.worker(worker_id) for worker_id in sorted(self._channels)}
        held["router"] = self._http.get("/test/held").json()
        return held

    def worker(self, worker_id: str) -> dict[str, int]:
        stub = worker_pb2_grpc.WorkerStub(self._channels[worker_id])  # type: ignore[no-untyped-call]
        told = stub.Hold(worker_pb2.HoldRequest(), timeout=10)
        held = {field.name: getattr(told, field.name) for field in told.DESCRIPTOR.fields}
        names = json.loads(self.left(worker_id, THREADS))
        held["sending threads"] = sum(name.startswith("kv-send") for name in names)
        # gRPC's own, one for each stream that it reads messages for.
        held["grpc threads"] = sum("consume" in name or "_spin" in name for name in names)
        return held

    def decode(self, what: str) -> int:
        """Of all decode workers."""
        return sum(self.worker(worker_id)[what] for worker_id in self.decode_workers)

    def reached(self, pool: str, gate: str) -> bool:
        """Some worker has come to this gate."""
        return any(self.gates.glob(f"{pool}-*.{gate}"))

    @contextlib.contextmanager
    def closed(self, pool: str, gate: str, says: str = "closed") -> Iterator[None]:
        for mark in self.gates.glob(f"{pool}-*.{gate}"):
            mark.unlink()
        self.close(pool, gate, says)
        try:
            yield
        finally:
            (self.gates / f"{pool}.{gate}").unlink()

    def close(self, pool: str, gate: str, says: str) -> None:
        part = self.gates / f"{pool}.{gate}.part"
        part.write_text(says)
        part.rename(self.gates / f"{pool}.{gate}")

    def settles_to(self, expected: Held) -> None:
        """Within FREE_S, all processes hold what they are to hold, and no more."""
        assert not self.leaked, f"since an earlier test: {self.leaked}"
        deadline_s = time.monotonic() + FREE_S
        while differs := differences(self.now(), expected):
            if time.monotonic() > deadline_s:
                self.leaked = f"still held: {differs}"
            assert not self.leaked, self.leaked
            time.sleep(POLL_S)


def differences(held: Held, expected: Held) -> dict[str, str]:
    return {
        f"{process}: {what}": f"{count} instead of {expected[process][what]}"
        for process, counts in held.items()
        for what, count in counts.items()
        if count != expected[process][what]
    }


def wait_until(what: str, condition: Callable[[], object], within_s: float = REACH_S) -> None:
    deadline_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline_s, f"never: {what}"
        time.sleep(POLL_S)


def at_rest(watch: Watch) -> Held:
    """What the processes hold when they have worked, and nothing runs."""
    seeds = itertools.count(95_000)

    def met_all() -> bool:
        prompt = prompt_of(450, next(seeds))
        status = httpx.post(
            f"{watch.cluster.url}/v1/completions",
            json={"model": "m", "prompt": prompt, "max_tokens": 2, "ignore_eos": True},
            headers={"X-Baton-Policy": "round_robin"},
            timeout=REACH_S,
        ).status_code
        assert status == 200
        return watch.worker("prefill-0")["peers"] == len(watch.decode_workers)

    wait_until("the prefill worker has sent to all others", met_all)

    def nothing_runs() -> bool:
        held = watch.now()
        of_workers = ("requests", "kv_blocks", "inbox_transfers", "sending_transfers")
        busy = any(
            held[worker][what] for worker in held if worker != "router" for what in of_workers
        )
        return not busy and not held["router"]["lives"]

    wait_until("nothing runs", nothing_runs)
    held = watch.now()
    wait_until("it stays so", lambda: held == watch.now())
    return held


class Client:
    """A request by a bare socket, which can be left at any time."""

    def __init__(
        self, url: str, body: dict[str, Any], stream: bool, headers: dict[str, str] | None = None
    ) -> None:
        self._stream = stream
        content = json.dumps({"model": "m", "stream": stream, **body}).encode()
        lines = {"Host": "router", "Content-Type": "application/json", **(headers or {})}
        lines["Content-Length"] = str(len(content))
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        address = urlsplit(url)
        self._socket = socket.create_connection((address.hostname or "", address.port or 0))
        self._socket.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}\r\n".encode() + content)

    def leave(self) -> None:
        """Closes its connection; or vanishes, if it had no stream."""
        if not self._stream:
            # RST instead of FIN.
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._socket.close()


class Talk:
    """One end of a gRPC stream to a worker, for messages that nobody sends in order."""

    def __init__(self, method: Callable[..., Any], **options: Any) -> None:
        self._messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._call = method(iter(self._messages.get, None), timeout=REACH_S, **options)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.end()
        self._call.cancel()

    def send(self, message: Any) -> None:
        self._messages.put(message)

    def end(self) -> None:
        self._messages.put(None)

    def heard(self) -> Any:
        return next(self._call)


class OtherSender(Talk):
    """Pushes a transfer."""

    def __init__(self, channel: grpc.Channel, transfer_id: str) -> None:
        method = channel.stream_stream(PUSH_METHOD, None, None)
        super().__init__(method, metadata=((TRANSFER_KEY, transfer_id),))

    def heard(self) -> kv_pb2.PushReply:
        return kv_pb2.PushReply.FromString(super().heard())


class OtherRouter(Talk):
    def __init__(self, channel: grpc.Channel) -> None:
        super().__init__(worker_pb2_grpc.WorkerStub(channel).Engine)  # type: ignore[no-untyped-call]
        self._number = 0
        self._heard: deque[worker_pb2.FromEngine] = deque()

    def send(self, message: worker_pb2.ToEngine) -> None:
        self._number += 1
        super().send(worker_pb2.ToEngineBatch(number=self._number, messages=[message]))

    def hears(self, kind: str) -> worker_pb2.FromEngine:
        """The next message of this kind."""
        while True:
            while self._heard:
                if (message := self._heard.popleft()).WhichOneof("kind") == kind:
                    return message
            self._heard.extend(self.heard().messages)
