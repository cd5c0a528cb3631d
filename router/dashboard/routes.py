"""The operator's page: rendered here whole, then kept up to date by static/dashboard.js."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.staticfiles import StaticFiles

from router.dashboard.state import DashboardState, HandoffRow, WorkerRow

POOLS = ("prefill", "decode")
BYTE_UNITS = ("kB", "MB", "GB", "TB")
NO_SNIFF = {"X-Content-Type-Options": "nosniff"}
PAGE_HEADERS = NO_SNIFF | {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'; object-src 'none'"
    ),
    "Referrer-Policy": "no-referrer",
}


def dashboard_routes(state: Callable[[], DashboardState]) -> APIRouter:
    """The page, its data and its files. `state` is called on the event loop, once a request."""
    page = _environment().get_template("dashboard.html")
    static = StaticFiles(directory=Path(__file__).parent / "static")
    router = APIRouter(prefix="/dashboard", include_in_schema=False)

    @router.get("")
    async def dashboard() -> HTMLResponse:
        now = state()
        html = page.render(state=now, pools=pools_of(now), rendered_at_unix_s=time.time())
        return HTMLResponse(html, headers=PAGE_HEADERS)

    @router.get("/state")
    async def dashboard_state() -> JSONResponse:
        return JSONResponse(asdict(state()), headers=NO_SNIFF | {"Cache-Control": "no-store"})

    @router.get("/static/{path:path}")
    async def dashboard_static(path: str, request: Request) -> Response:
        response = await static.get_response(path, request.scope)
        response.headers.update(NO_SNIFF | {"Cache-Control": "no-cache"})
        return response

    return router


@dataclass(frozen=True, slots=True)
class PoolView:
    name: str
    wanted: int | None
    """None when nobody has said."""
    workers: list[WorkerRow]

    @property
    def ready(self) -> int:
        return sum(worker.state == "ready" for worker in self.workers)

    @property
    def short(self) -> bool:
        return self.wanted is not None and self.ready < self.wanted


def pools_of(state: DashboardState) -> list[PoolView]:
    """Prefill and decode, and after them any other pool that is wanted or has a worker."""
    names = dict.fromkeys([*POOLS, *state.desired, *(worker.pool for worker in state.workers)])
    return [
        PoolView(name, state.desired.get(name), [w for w in state.workers if w.pool == name])
        for name in names
    ]


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("router.dashboard"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["show"] = lambda value, kind: FORMATS[kind](value)
    # What the page's <template> elements are filled with: the script makes new rows of them.
    environment.globals.update(
        blank_pool=PoolView("", None, []),
        blank_worker=WorkerRow("", "", "", "", "", "", "", ""),
        blank_handoff=HandoffRow(0.0, "", "", "", 0, 0, 0.0, 0.0, ""),
    )
    return environment


# How values read. static/dashboard.js has the same under the same names; a test compares them.


def show_bytes(count: int) -> str:
    if count < 1000:
        return f"{count} B"
    value, step = count / 1000, 0
    while value >= 999.95 and step < len(BYTE_UNITS) - 1:
        value, step = value / 1000, step + 1
    return f"{_tenths(value):,.1f} {BYTE_UNITS[step]}"


def show_duration(seconds: float) -> str:
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def show_time(unix_s: float) -> str:
    return datetime.fromtimestamp(int(unix_s), UTC).strftime("%Y-%m-%d %H:%M:%S")


def show_wanted(wanted: int | None) -> str:
    return "" if wanted is None else f"of {wanted:,} wanted"


def show_worker(key: str) -> str:
    """The worker's id without its incarnation."""
    return key.rpartition("/")[0] or key or "–"


def _tenths(value: float) -> float:
    return math.floor(value * 10 + 0.5) / 10


FORMATS: dict[str, Callable[..., str]] = {
    "text": str,
    "count": lambda count: f"{count:,}",
    "percent": lambda share: f"{math.floor(share * 100 + 0.5)}%",
    "milliseconds": lambda seconds: f"{_tenths(seconds * 1000):,.1f}",
    "bytes": show_bytes,
    "duration": show_duration,
    "time": show_time,
    "wanted": show_wanted,
    "worker": show_worker,
}
