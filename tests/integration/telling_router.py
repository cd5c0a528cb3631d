"""A router that tells what it holds, at `/test/held`, and at `/test/late` how many tokens came of
one leg after it was cancelled."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, FastAPI, Request

from router import __main__ as router_main

if TYPE_CHECKING:
    from router.cluster_core import ClusterCore


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
        "calls": sum(len(worker.calls) for worker in core.workers.values()),
        "unsent": sum(worker.link._outgoing.qsize() for worker in core.workers.values()),
        "tasks": len(asyncio.all_tasks()),
    }


late: Counter[str] = Counter()


def count_late(core: type[ClusterCore]) -> None:
    on_outputs = core._on_outputs

    def counted(self: ClusterCore, worker: Any, outputs: Any) -> None:
        for output in outputs.outputs:
            if self.scheduler.life_of_leg(output.request_id) is None:
                late[output.request_id] += len(output.new_token_ids)
        on_outputs(self, worker, outputs)

    core._on_outputs = counted


def tell() -> None:
    from router import server

    count_late(server.ClusterCore)
    routes = server.dashboard_routes

    def with_held(state: Callable[[], Any]) -> APIRouter:
        router = APIRouter()
        router.include_router(routes(state))

        @router.get("/test/held")
        async def held(request: Request) -> dict[str, int]:
            return held_by(request.app)

        @router.get("/test/late")
        async def late_tokens() -> int:
            return max(late.values(), default=0)

        return router

    server.dashboard_routes = with_held


if __name__ == "__main__":
    tell()
    router_main.main()
