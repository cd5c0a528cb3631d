"""A worker: engine, inbox and gRPC server in one process. Started by the Ray actor, or alone by
`python -m workers` for tests and for those who manage processes themselves."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import time
import uuid
import warnings
from dataclasses import dataclass

import grpc.aio

from cluster.membership import WorkerState
from cluster.scheduler.handover import INBOX_LOAD_MAX, inbox_tokens_max
from cluster.vllm_blocks import engine_probe
from cluster.wire import GRPC_OPTIONS, worker_pb2, worker_pb2_grpc
from workers.engine import EngineHost
from workers.environment import bind_ranks
from workers.health import until_stuck
from workers.kv.codecs import CODECS
from workers.kv.endpoint import KvEndpoint, publish, withdraw
from workers.kv.group import Transport
from workers.kv.inbox import Inbox
from workers.kv.ranks import RANKS_KEY, RankSettings
from workers.kv.sender import Identity, Sender
from workers.kv.sending import RanksSending
from workers.kv.service import KvInboxService
from workers.kv.transports import make_transports
from workers.kv.undelivered import RanksUndelivered
from workers.memory import keep_freed_memory
from workers.registration import Registration
from workers.server import WorkerService, add_standard_services
from workers.settings import WorkerSettings
from workers.vllm_config import engine_config, fingerprint, geometry
from workers.vllm_names import names_while_starting

logger = logging.getLogger(__name__)

STOP_GRACE_S = 2.0
ENGINE_STOP_S = 10.0
ROUTERS_NOTICE_S = 1.5
MOVE_GRACE_S = 3.0
DRAIN_POLL_S = 0.1


@dataclass(slots=True)
class Worker:
    settings: WorkerSettings
    service: WorkerService
    engine: EngineHost
    endpoint: KvEndpoint
    server: grpc.aio.Server
    endpoint_name: str
    registration: Registration | None
    transports: list[Transport]
    watch: asyncio.Task[None] | None = None
    noticed: bool = False

    @property
    def description(self) -> worker_pb2.WorkerDescription:
        return self.service.description

    @classmethod
    async def start(cls, settings: WorkerSettings) -> Worker:
        """Load the model and serve. Returns when requests can come.

        Raises:
            whatever vLLM raises for a bad model or too little memory; OSError for a port in use.
        """
        # Payloads are read where gRPC put them, and gRPC's bytes are read-only: so are our reads.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        keep_freed_memory()
        loop = asyncio.get_running_loop()
        endpoint_name = uuid.uuid4().hex
        registration = Registration(settings) if settings.redis_url else None
        if registration:
            registration.update(WorkerState.LOADING)
        config = await loop.run_in_executor(None, engine_config, settings.vllm_args, endpoint_name)
        ranks = config.parallel_config.tensor_parallel_size
        identity = Identity(settings.worker_id, settings.incarnation, fingerprint(config))
        transports = make_transports(
            settings.handoff.transport,
            settings.host,
            f"{identity.worker_id}/{identity.incarnation}",
        )
        service = WorkerService(loop)
        endpoint = KvEndpoint(
            Inbox(
                geometry(config),
                settings.incarnation,
                settings.handoff.inbox_bytes,
                settings.handoff.idle_s,
                time.monotonic,
                shared=ranks > 1,
                max_unclaimed_s=settings.handoff.unclaimed_s,
            ),
            Sender(
                identity,
                settings.handoff.staged_bytes,
                settings.handoff.transfer_deadline_s,
                service.on_sent,
                transports,
                settings.handoff.transport,
            ),
            CODECS[settings.handoff.codec],
            settings.handoff.overlap,
            settings.handoff.one_go_ms / 1e3,
        )
        publish(endpoint_name, endpoint)
        if ranks > 1:
            bind_ranks(ranks, settings.cpu_ids)
            endpoint.ranks_sending = RanksSending(ranks)
            undelivered = endpoint.ranks_undelivered = RanksUndelivered(service.on_sent)
            extra = config.kv_transfer_config.kv_connector_extra_config
            extra[RANKS_KEY] = RankSettings(
                os.getpid(),
                settings.worker_id,
                settings.incarnation,
                identity.fingerprint.SerializeToString(),
                endpoint.geometry,
                ranks,
                endpoint.codec,
                settings.handoff.staged_bytes,
                settings.handoff.transfer_deadline_s,
                settings.host,
                settings.handoff.transport,
                endpoint.ranks_sending.path,
                undelivered.path,
            )
        engine = EngineHost(config, endpoint, service)
        with names_while_starting() if ranks > 1 else contextlib.nullcontext():
            await loop.run_in_executor(None, engine.start)

        warn_of_small_inbox(
            settings.handoff.inbox_bytes,
            endpoint.geometry.bytes_per_token,
            engine.core.vllm_config.model_config.max_model_len,
        )

        server = grpc.aio.server(options=GRPC_OPTIONS)
        worker_pb2_grpc.add_WorkerServicer_to_server(service, server)  # type: ignore[no-untyped-call]
        KvInboxService(
            endpoint.inbox,
            identity.worker_id,
            identity.incarnation,
            identity.fingerprint,
            settings.handoff.credit_deadline_s,
            transports,
        ).register(server)
        await add_standard_services(server)
        port = server.add_insecure_port(f"{settings.host}:{settings.port}")
        service.engine = engine
        address = f"{settings.host}:{port}"
        service.description = _describe(settings, engine, endpoint, identity, address)
        await server.start()
        if registration:
            registration.update(WorkerState.READY, address)
        worker = cls(
            *(settings, service, engine, endpoint, server, endpoint_name, registration),
            transports,
        )
        worker.watch = asyncio.create_task(worker._watch(), name="watchdog")
        return worker

    async def drained(self) -> None:
        """Returns when the worker was asked to drain and nothing runs on it any more, or when
        routers have had time to move what was left at the deadline."""
        if self.registration is None:
            await asyncio.Event().wait()
            return
        await self.registration.draining.wait()
        # Until routers have read that it drains, they may place requests here.
        await asyncio.sleep(ROUTERS_NOTICE_S)
        while self.service.requests or self.endpoint.outgoing.transfers:
            # Which a notice may have brought nearer.
            if time.time() > self.registration.record.drain_until_unix_s + MOVE_GRACE_S:
                return
            await asyncio.sleep(DRAIN_POLL_S)

    def on_notice(self) -> bool:
        """This process will be ended soon: drain. False if there is nothing to wait for, or if it
        was told so before."""
        notice_s = self.settings.preemption_notice_s
        if self.registration is None or not notice_s or self.noticed:
            return False
        self.noticed = True
        logger.warning("told to end: draining, %g s at most", notice_s)
        self.registration.drain(time.time() + notice_s)
        return True

    async def _watch(self) -> None:
        self.service.on_stuck(
            await until_stuck(self.service, self.engine, self.settings.stuck_after_s)
        )

    async def stop(self) -> None:
        if self.watch:
            self.watch.cancel()
            await asyncio.gather(self.watch, return_exceptions=True)
        if self.registration:
            await self.registration.close()
        await self.server.stop(STOP_GRACE_S)
        loop = asyncio.get_running_loop()
        # A stuck one is left to the end of the process.
        await loop.run_in_executor(
            None, self.engine.stop, 0 if self.service.stuck else ENGINE_STOP_S
        )
        await loop.run_in_executor(None, self.endpoint.sender.close)
        for transport in self.transports:
            transport.close()
        if self.endpoint.ranks_sending is not None:
            self.endpoint.ranks_sending.close()
        if self.endpoint.ranks_undelivered is not None:
            self.endpoint.ranks_undelivered.close()
        withdraw(self.endpoint_name)


def warn_of_small_inbox(inbox_bytes: int, kv_bytes_per_token: int, max_model_len: int) -> None:
    tokens_max = inbox_tokens_max(inbox_bytes, kv_bytes_per_token)
    if tokens_max >= max_model_len:
        return
    enough_bytes = math.ceil(max_model_len * kv_bytes_per_token / INBOX_LOAD_MAX)
    logger.warning(
        "prompts of more than %d tokens are not handed over to this worker, which computes them "
        "itself: its inbox takes no larger ones. For all of max_model_len (%d tokens) set "
        "handoff.inbox_bytes to %d or more",
        *(tokens_max, max_model_len, enough_bytes),
    )


def _describe(
    settings: WorkerSettings,
    engine: EngineHost,
    endpoint: KvEndpoint,
    identity: Identity,
    address: str,
) -> worker_pb2.WorkerDescription:
    vllm_config = engine.core.vllm_config
    cache, lora = vllm_config.cache_config, vllm_config.lora_config
    probe = engine_probe(cache.prefix_caching_hash_algo) if cache.enable_prefix_caching else 0
    return worker_pb2.WorkerDescription(
        worker_id=settings.worker_id,
        incarnation=settings.incarnation,
        fingerprint=identity.fingerprint,
        kv_address=address,
        accelerator=settings.accelerator,
        max_model_len_tokens=vllm_config.model_config.max_model_len,
        kv_blocks=vllm_config.cache_config.num_gpu_blocks or 0,
        block_size_tokens=vllm_config.cache_config.block_size,
        max_num_seqs=vllm_config.scheduler_config.max_num_seqs,
        max_num_batched_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
        kv_bytes_per_token=endpoint.inbox.geometry.bytes_per_token,
        inbox_bytes_max=settings.handoff.inbox_bytes,
        block_hash_probe=probe,
        adapters_max=(lora.max_cpu_loras or lora.max_loras) if lora else 0,
        adapters_at_once_max=lora.max_loras if lora else 0,
        supported_tasks=list(engine.core.get_supported_tasks()),
    )
