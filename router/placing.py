"""What HTTP clients may say and learn of placement.

`X-Baton-Policy` of a request names the policy that places it, `X-Baton-Class` what it is promised.
`X-Baton-Placement` of its response says where it went and why: `prefill-0 -> decode-1; shortest
queues`, and so on, comma-separated, if it held several prompts or asked for several choices. A
request that finds no place is answered with 429 or 503 and `Retry-After`, one that no worker can be
sent with 400.
"""

from __future__ import annotations

import math
from contextvars import ContextVar
from dataclasses import dataclass, field

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.scheduler.life import FailRequest, Failure
from cluster.scheduler.policies import BadPolicy, Policies
from cluster.scheduler.policy import Placement, PlacementPolicy
from cluster.scheduler.slo import NO_PROMISE, SloClass
from router.classes import BadClass, Classes, tenant_of

POLICY_HEADER = "X-Baton-Policy"
CLASS_HEADER = "X-Baton-Class"
PLACEMENT_HEADER = "X-Baton-Placement"
RETRY_AFTER_MAX_S = 60
TOLD_MAX = 8
"""Different placements in one header."""


@dataclass(slots=True)
class Placing:
    """One HTTP request's, shared by all engine requests made for it."""

    policy: PlacementPolicy | None = None
    slo: SloClass = NO_PROMISE
    tenant: str = ""
    taken: bool = False
    """One of its engine requests has come to the scheduler."""
    refusal: FailRequest | None = None
    placements: dict[str, Placement] = field(default_factory=dict)
    """The latest of each engine request."""

    def header(self) -> str:
        told = list(dict.fromkeys(map(_told, self.placements.values())))
        return ", ".join([*told[:TOLD_MAX], *(["..."] if len(told) > TOLD_MAX else [])])


PLACING: ContextVar[Placing | None] = ContextVar("baton_placing", default=None)
"""vLLM's front end adds a request to the engine core in the context of the HTTP request."""


class PlacementHeaders:
    """ASGI middleware. A response's start waits for the first piece of its body: a stream's start
    is sent before its generator, and so the placement, has run."""

    def __init__(self, app: ASGIApp, policies: Policies, classes: Classes) -> None:
        self._app = app
        self._policies = policies
        self._classes = classes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        placing = Placing(tenant=tenant_of(headers))
        try:
            name = headers.get(POLICY_HEADER)
            if name is not None:
                placing.policy = self._policies.get(name.strip())
            placing.slo = self._classes.get(placing.tenant, headers.get(CLASS_HEADER))
        except (BadPolicy, BadClass) as error:
            param = POLICY_HEADER if isinstance(error, BadPolicy) else CLASS_HEADER
            await _error(400, str(error), param)(scope, receive, send)
            return
        start: Message | None = None
        refused = False

        async def send_with_header(message: Message) -> None:
            nonlocal start, refused
            if refused:
                return
            if message["type"] == "http.response.start":
                start = message
                return
            if start is not None:
                if placing.refusal is not None:
                    refused = True
                    await _refusal(placing.refusal)(scope, receive, send)
                    return
                if placing.placements and start["status"] < 400:
                    MutableHeaders(scope=start)[PLACEMENT_HEADER] = placing.header()
                await send(start)
                start = None
            await send(message)

        token = PLACING.set(placing)
        try:
            await self._app(scope, receive, send_with_header)
        finally:
            PLACING.reset(token)


def _told(placement: Placement) -> str:
    workers = f"{placement.prefill.worker_id} -> {placement.decode.worker_id}"
    reason = placement.reason.replace(",", ";")
    # Headers are Latin-1 without line breaks, whatever a worker or a plug-in is called.
    text = f"{workers}; {reason}"
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in text)


_TYPES = {
    400: "BadRequestError",
    429: "RateLimitError",
    503: "ServiceUnavailableError",
}


def _refusal(failed: FailRequest) -> JSONResponse:
    if failed.failure is Failure.INVALID:
        return _error(400, failed.reason)
    status = 503 if failed.failure in (Failure.NO_WORKER, Failure.STOPPING) else 429
    response = _error(status, f"not taken: {failed.reason}")
    wait_s = min(max(1, math.ceil(failed.retry_after_s)), RETRY_AFTER_MAX_S)
    response.headers["Retry-After"] = str(wait_s)
    return response


def _error(status: int, message: str, param: str | None = None) -> JSONResponse:
    """In the form of vLLM's own errors, which is OpenAI's."""
    error = {"message": message, "type": _TYPES[status], "param": param, "code": status}
    return JSONResponse({"error": error}, status_code=status)
