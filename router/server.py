"""The router's process: vLLM's OpenAI application over a ClusterCore."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import socket
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from fastapi import FastAPI
from prometheus_client import REGISTRY
from starlette.middleware import Middleware
from vllm import envs
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.launcher import serve_http, setup_server
from vllm.entrypoints.launchers.utils.server_utils import get_uvicorn_log_config
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import EngineCoreClient

from cluster.config import OPERATOR_TOKEN
from cluster.membership import (
    REDIS_ERRORS,
    Membership,
    RouterRecord,
    keep_lease,
    open_redis,
)
from cluster.scheduler.policies import Policies, PolicyOptions
from cluster.scheduler.scheduler import Scheduler
from cluster.vllm_args import BadVllmArguments, parse_vllm_args
from router.adapters import SharedAdapters
from router.background import Background, BackgroundFailed
from router.classes import Classes
from router.cluster_core import ClusterCore
from router.dashboard.routes import dashboard_routes
from router.dashboard.source import DashboardSource
from router.members import MemberWatcher
from router.metrics import RouterMetrics
from router.notice import notice_routes
from router.peers import Peers
from router.placing import PlacementHeaders
from router.readiness import ready_routes
from router.settings import RouterSettings
from router.stopping import StopSignals, end_serving, first_of

CLOSE_DEADLINE_S = 2.0


async def run_router(settings: RouterSettings) -> None:
    """Serve until SIGINT or SIGTERM.

    Raises:
        BadVllmArguments, BadPolicy, OSError for a port in use, BackgroundFailed, and what vLLM
        raises for a bad model.
    """
    args = router_args(settings)
    # Bound before anything else is started, so that a port in use is found out at once.
    _, sock = setup_server(args, reuse_port=False)
    engine_args = engine_args_of(args)
    config = engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
    metrics = RouterMetrics(REGISTRY)
    policies = Policies(
        PolicyOptions(
            settings.local_prompt_tokens,
            settings.queue_threshold_tokens,
            hand_over=settings.hand_over,
        )
    )
    scheduler = Scheduler(
        policies.get(settings.policy),
        new_id=lambda: uuid.uuid4().hex[:12],
        queue_deadline_s=settings.queue_deadline_s,
        queued_max=settings.queue_max,
        requests_max=settings.worker_requests_max,
    )

    def make_core(vllm_config: VllmConfig) -> ClusterCore:
        return ClusterCore(vllm_config, scheduler, metrics, settings.adopt_deadline_s)

    with engine_core_made_by(make_core):
        engine = AsyncLLM.from_vllm_config(
            config,
            usage_context=UsageContext.OPENAI_API_SERVER,
            enable_log_requests=engine_args.enable_log_requests,
            disable_log_stats=engine_args.disable_log_stats,
        )
    core: ClusterCore = engine.engine_core
    redis = open_redis(settings.redis_url)
    membership = Membership(redis, settings.cluster, settings.lease_s)
    watcher = MemberWatcher(membership, core, metrics)
    peers = Peers(membership, scheduler, settings.router_id)
    background = Background()
    background.start("members", watcher.run())
    background.start("peers", peers.run())
    try:
        await serve_when_ready(
            settings, args, engine, core, watcher, policies, sock, membership, background
        )
    finally:
        await background.end()
        links = [link for key in list(core.workers) if (link := core.remove(key))]
        # The other end may be frozen.
        closing = [asyncio.create_task(link.close()) for link in links]
        if closing:
            await asyncio.wait(closing, timeout=CLOSE_DEADLINE_S)
        await redis.aclose()
        engine.shutdown()
        sock.close()


async def serve_when_ready(
    settings: RouterSettings,
    args: argparse.Namespace,
    engine: AsyncLLM,
    core: ClusterCore,
    watcher: MemberWatcher,
    policies: Policies,
    sock: socket.socket,
    membership: Membership,
    background: Background,
) -> None:
    """Wait for the first worker, whose limits the front end needs, then serve.

    Raises:
        BackgroundFailed
    """
    ready = asyncio.create_task(core.wait_for_worker())
    stop = StopSignals()
    stop.listen()
    stopped = asyncio.create_task(stop.asked.wait())
    await first_of(ready, stopped, *background.tasks)
    if not ready.done():
        ready.cancel()
        stopped.cancel()
        if problem := background.problem():
            raise problem
        return
    # vLLM's front end looks at environment variables for each token.
    envs.enable_envs_cache()
    tasks = await engine.get_supported_tasks()
    app = build_app(args, tasks, engine.model_config)
    await init_app_state(engine, app.state, args, tasks)
    if args.enable_lora:
        adapters = SharedAdapters(membership, app.state.openai_serving_models, core)
        adapters.attach()
        background.start("adapters", adapters.run())
    dashboard = DashboardSource(settings, core, watcher)
    app.include_router(dashboard_routes(dashboard.state))
    app.include_router(ready_routes(core))
    if token := os.environ.get(OPERATOR_TOKEN):
        app.include_router(notice_routes(membership, token))
    # Innermost: who may not ask at all is told that first. vLLM has built its stack already.
    classes = Classes.of_settings(settings.slo_classes, settings.api_key_classes)
    app.user_middleware.append(Middleware(PlacementHeaders, policies, classes))
    app.middleware_stack = app.build_middleware_stack()

    async def write_record() -> None:
        unjoined = list(dict.fromkeys(core.unjoined().values()))
        linked = len(core.workers)
        await membership.put_router(
            RouterRecord(settings.router_id, settings.url, os.getpid(), linked, unjoined)
        )

    lease = Background()
    lease.start("lease", keep_lease(write_record, settings.lease_s, watcher.links_changed))

    async def leave() -> None:
        await lease.end()
        with contextlib.suppress(*REDIS_ERRORS):
            await membership.remove_router(settings.router_id)

    serving = asyncio.create_task(serve(app, args, sock), name="http")
    # It handles signals in its own way, from its first step on.
    await asyncio.sleep(0)
    stop.listen()
    await first_of(serving, stopped, *background.tasks, *lease.tasks)
    problem = None
    if not stopped.done():
        front_end = BackgroundFailed("vLLM's front end has ended")
        problem = background.problem() or lease.problem() or front_end
    timeout_s = 0 if problem else args.shutdown_timeout
    # Others are to know before the last answers have ended.
    leaving = asyncio.create_task(leave())
    if not serving.done():
        await end_serving(serving, app.state.server, core, stop.insisted, timeout_s)
    await leaving
    if serving.done():
        serving.result()
    if problem:
        raise problem


async def serve(app: FastAPI, args: argparse.Namespace, sock: socket.socket) -> None:
    # As vLLM's `build_and_serve` does.
    log_config = get_uvicorn_log_config(args)
    shutdown = await serve_http(
        app,
        sock=sock,
        enable_ssl_refresh=args.enable_ssl_refresh,
        host=args.host,
        port=args.port,
        log_level=args.uvicorn_log_level,
        access_log=not args.disable_uvicorn_access_log,
        timeout_keep_alive=envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE,
        ssl_keyfile=args.ssl_keyfile,
        ssl_certfile=args.ssl_certfile,
        ssl_ca_certs=args.ssl_ca_certs,
        ssl_cert_reqs=args.ssl_cert_reqs,
        ssl_ciphers=args.ssl_ciphers,
        h11_max_incomplete_event_size=args.h11_max_incomplete_event_size,
        h11_max_header_count=args.h11_max_header_count,
        **({} if log_config is None else {"log_config": log_config}),
    )
    await shutdown


def router_args(settings: RouterSettings) -> argparse.Namespace:
    """Raises BadVllmArguments."""
    address = ["--host", settings.host, "--port", str(settings.port)]
    args = parse_vllm_args([*settings.vllm_args, *address])
    if args.uds:
        raise BadVllmArguments("--uds: a router listens on --host and --port")
    # Workers have ranks; here is no accelerator for them.
    args.tensor_parallel_size = 1
    return args


def engine_args_of(args: argparse.Namespace) -> AsyncEngineArgs:
    engine_args = AsyncEngineArgs.from_cli_args(args)
    # As one of several front ends it sends the data of media with each request. A single one thinks
    # that its engine keeps what it has had once, and another worker has not had it.
    engine_args._api_process_count = 2
    return engine_args


@contextlib.contextmanager
def engine_core_made_by(make_core: Callable[[VllmConfig], ClusterCore]) -> Iterator[None]:
    """vLLM's front end makes its own engine core client; let it make ours instead."""
    original = EngineCoreClient.make_async_mp_client

    def make(vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> ClusterCore:
        return make_core(vllm_config)

    EngineCoreClient.make_async_mp_client = staticmethod(make)
    try:
        yield
    finally:
        EngineCoreClient.make_async_mp_client = staticmethod(original)
