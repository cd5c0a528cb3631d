"""Workers without a model, for `baton bench router`.

    python -m workers.stub CONTROL_PORT SETTINGS_JSON...

They register in Redis, and their gRPC service is the real one; what it bridges to is an engine that
makes tokens at once, and takes every hand-off for adopted. Prefill workers' steps wait for nobody.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from dataclasses import dataclass
from typing import Any

import grpc.aio
import uvloop
from vllm.v1.engine import EngineCoreRequest, UtilityOutput
from vllm.v1.serial_utils import MsgpackDecoder

from cluster.bench.stub_engine import Pace, StubEngine
from cluster.logs import configure_logs
from cluster.membership import WorkerState
from cluster.scheduler.view import Pool
from cluster.vllm_args import flag_value
from cluster.wire import GRPC_OPTIONS, worker_pb2, worker_pb2_grpc
from workers.registration import Registration
from workers.server import WorkerService, add_standard_services
from workers.settings import WorkerSettings

MAX_MODEL_LEN_TOKENS = 4096
KV_BLOCKS = 65_536
BLOCK_SIZE_TOKENS = 16
KV_BYTES_PER_TOKEN = 4096


class StubHost:
    """What WorkerService asks of an engine's host."""

    def __init__(self, engine: StubEngine, service: WorkerService) -> None:
        self._engine = engine
        self._service = service
        self._decoder = MsgpackDecoder(EngineCoreRequest)

    def add(self, client: int, message: worker_pb2.AddRequest) -> None:
        request = self._decoder.decode(list(message.request))
        self._engine.add(client, request, len(message.resume_token_ids))
        if message.HasField("receive"):
            tokens = len(request.prompt_token_ids)
            adopted = worker_pb2.Adopted(
                request_id=message.leg_id,
                handed_over=True,
                tokens=tokens,
                bytes=tokens * KV_BYTES_PER_TOKEN,
            )
            self._service.on_adopted(client, adopted)

    def holdings(self) -> worker_pb2.Holdings:
        return worker_pb2.Holdings(running=self._engine.running)

    def tell_kv(self, client: int) -> None:
        """It has no prefix cache."""

    def hold(self, message: worker_pb2.HoldPrefix) -> None:
        """It has no prefix cache, as its description says."""

    def abort(self, request_ids: list[str]) -> None:
        self._engine.abort(request_ids)

    def sender_lost(self, transfer_id: str, reason: str) -> None:
        """It has come already."""

    def drop_transfer(self, transfer_id: str) -> None:
        """Nothing was transferred."""

    def move_out(self, client: int, move: worker_pb2.MoveOut) -> None:
        moved = worker_pb2.MovedOut(leg_id=move.leg_id, reason="a stub has no KV")
        self._service.on_moved(client, moved)

    def call(self, client: int, call_id: int, method: str, args: list[Any]) -> None:
        self._service.on_utility(client, call_id, UtilityOutput(call_id))

    async def run(self) -> None:
        """Step until cancelled."""
        while True:
            for client, outputs in (await self._engine.next_step()).items():
                load = worker_pb2.WorkerLoad(running=self._engine.running)
                self._service.on_outputs(client, outputs, load)


@dataclass(slots=True)
class StubWorker:
    server: grpc.aio.Server
    registration: Registration
    engine: asyncio.Task[None]

    @classmethod
    async def start(cls, settings: WorkerSettings, pace: Pace) -> StubWorker:
        service = WorkerService(asyncio.get_running_loop())
        host = StubHost(StubEngine(pace, paced=settings.pool == Pool.DECODE), service)
        service.engine = host
        server = grpc.aio.server(options=GRPC_OPTIONS)
        worker_pb2_grpc.add_WorkerServicer_to_server(service, server)  # type: ignore[no-untyped-call]
        await add_standard_services(server)
        address = f"{settings.host}:{server.add_insecure_port(f'{settings.host}:{settings.port}')}"
        service.description = worker_pb2.WorkerDescription(
            worker_id=settings.worker_id,
            incarnation=settings.incarnation,
            fingerprint=worker_pb2.Fingerprint(
                model=flag_value(settings.vllm_args, "--served-model-name")
            ),
            kv_address=address,
            max_model_len_tokens=MAX_MODEL_LEN_TOKENS,
            kv_blocks=KV_BLOCKS,
            block_size_tokens=BLOCK_SIZE_TOKENS,
            kv_bytes_per_token=KV_BYTES_PER_TOKEN,
            inbox_bytes_max=settings.handoff.inbox_bytes,
            supported_tasks=["generate"],
        )
        await server.start()
        registration = Registration(settings)
        registration.update(WorkerState.READY, address)
        engine = asyncio.create_task(host.run(), name=settings.worker_id)
        return cls(server, registration, engine)

    async def stop(self) -> None:
        await self.registration.close()
        self.engine.cancel()
        await asyncio.gather(self.engine, return_exceptions=True)
        await self.server.stop(None)


async def serve(control_port: int, settings: list[WorkerSettings]) -> None:
    """Serve until SIGTERM, or until an engine fails."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    pace = await Pace.listening(control_port)
    workers = [await StubWorker.start(one, pace) for one in settings]
    stopping = asyncio.create_task(stop.wait())
    engines = [worker.engine for worker in workers]
    done, _ = await asyncio.wait([stopping, *engines], return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    for worker in workers:
        await worker.stop()
    pace.close()
    for task in done:
        task.result()


def main() -> None:
    configure_logs()
    control_port, *workers = sys.argv[1:]
    uvloop.run(serve(int(control_port), [WorkerSettings.from_json(text) for text in workers]))


if __name__ == "__main__":
    main()
