"""A router that tells what it holds, at `/test/held`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, FastAPI, Request

from cluster.scheduler.view import WorkerView
from router import __main__ as router_main


def held_by(app: FastAPI) -> dict[str, int]:
    front_end = app.state.engine_client
    core = front_end.engine_core
    scheduler = core.scheduler
    return {
        "front end": len(front_end.output_processor.request_states),
        "requests": len(core._requests),
        "placings": len(core._placings),
        "lives": len(scheduler.lives),
        "legs": len(scheduler._by_leg),
        "charges": len(scheduler._charges),
        "queued": scheduler.queued,
        "load": sum(sum(map(abs, load)) for load in scheduler.own_load().values()),
        "reported": sum(map(reported_by, scheduler.view.workers.values())),
        "calls": sum(len(worker.calls) for worker in core.workers.values()),
        "unsent": sum(worker.link._outgoing.waiting for worker in core.workers.values()),
        "tasks": len(asyncio.all_tasks()),
    }


def reported_by(worker: WorkerView) -> int:
    percent = round(100 * worker.reported_kv_usage)
    return worker.reported_running + worker.reported_waiting + worker.reported_inbox_bytes + percent


def tell() -> None:
    from router import server

    routes = server.dashboard_routes

    def with_held(state: Callable[[], Any]) -> APIRouter:
        router = APIRouter()
        router.include_router(routes(state))

        @router.get("/test/held")
        async def held(request: Request) -> dict[str, int]:
            return held_by(request.app)

        return router

    server.dashboard_routes = with_held


if __name__ == "__main__":
    tell()
    router_main.main()
