"""`GET /ready`: whether a request that comes now finds a worker. `/health` is vLLM's, and tells of
this process only: to start it anew would bring no worker."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from router.cluster_core import ClusterCore


def ready_routes(core: ClusterCore) -> APIRouter:
    """For whoever asks, as vLLM's `/health` is."""
    routes = APIRouter()

    @routes.get("/ready", include_in_schema=False)
    async def ready() -> JSONResponse:
        reason = core.why_not_ready()
        return JSONResponse({"ready": not reason, "reason": reason}, 503 if reason else 200)

    return routes
