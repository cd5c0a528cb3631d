"""What HTTP clients may say and learn of placement.

`X-Baton-Policy` of a request names the policy that places it. `X-Baton-Placement` of its response
says where it went and why: `prefill-0 -> decode-1; shortest queues`, and so on, comma-separated, if
it held several prompts or asked for several choices.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.scheduler.policies import BadPolicy, Policies
from cluster.scheduler.policy import Placement, PlacementPolicy

POLICY_HEADER = "X-Baton-Policy"
PLACEMENT_HEADER = "X-Baton-Placement"
TOLD_MAX = 8
"""Different placements in one header."""


@dataclass(slots=True)
class Placing:
    """One HTTP request's, shared by all engine requests made for it."""

    policy: PlacementPolicy | None = None
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

    def __init__(self, app: ASGIApp, policies: Policies) -> None:
        self._app = app
        self._policies = policies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        placing = Placing()
        name = Headers(scope=scope).get(POLICY_HEADER)
        if name is not None:
            try:
                placing.policy = self._policies.get(name.strip())
            except BadPolicy as error:
                await _refusal(str(error))(scope, receive, send)
                return
        start: Message | None = None

        async def send_with_header(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                start = message
                return
            if start is not None:
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


def _refusal(message: str) -> JSONResponse:
    """In the form of vLLM's own errors, which is OpenAI's."""
    error = {"message": message, "type": "BadRequestError", "param": POLICY_HEADER, "code": 400}
    return JSONResponse({"error": error}, status_code=400)
