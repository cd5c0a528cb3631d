"""`POST /baton/notice`: a worker will be ended soon, says who ends it, such as a watcher of spot
instances. For operators only: it is there if a token is set, and asks for it."""

from __future__ import annotations

import secrets
from typing import Annotated

from fastapi import APIRouter, Header
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from cluster.draining import NoSuchWorker, NotReady, ask_to_drain
from cluster.errors import one_line
from cluster.membership import REDIS_ERRORS, Membership


class Notice(BaseModel):
    model_config = ConfigDict(extra="forbid")

    worker: str
    deadline_s: float = Field(ge=0, le=86_400)


def notice_routes(membership: Membership, operator_token: str) -> APIRouter:
    routes = APIRouter()

    @routes.post("/baton/notice", include_in_schema=False)
    async def notice(body: Notice, authorization: Annotated[str, Header()] = "") -> JSONResponse:
        given = authorization.removeprefix("Bearer ").encode()
        if not secrets.compare_digest(given, operator_token.encode()):
            return _answer(401, "this takes the operator token, as 'Authorization: Bearer TOKEN'")
        try:
            record = await ask_to_drain(membership, body.worker, body.deadline_s)
        except NoSuchWorker as error:
            return _answer(404, str(error))
        except NotReady as error:
            return _answer(409, str(error))
        except REDIS_ERRORS as error:
            return _answer(503, f"Redis: {one_line(error)}")
        drains = {"worker": record.worker_id, "incarnation": record.incarnation}
        return JSONResponse({**drains, "deadline_s": body.deadline_s}, 202)

    return routes


def _answer(code: int, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "code": code}}, code)
