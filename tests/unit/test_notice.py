"""The notice that a worker will be ended: who may give it, and what it does."""

from __future__ import annotations

import time
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from cluster.membership import DrainRequest, Membership, WorkerRecord, WorkerState
from cluster.scheduler.view import Pool
from router.notice import notice_routes

TOKEN = "an operator's secret"
BODY = {"worker": "decode-0", "deadline_s": 30}


class Members(Membership):
    def __init__(self) -> None:
        self.asked: dict[str, DrainRequest] = {}
        self.state = WorkerState.READY
        self.gone = False

    async def workers(self) -> list[WorkerRecord]:
        if self.gone:
            raise ConnectionError("connection refused")
        return [WorkerRecord("decode-0", "abc", Pool.DECODE, self.state)]

    async def ask_drain(self, worker_id: str, request: DrainRequest, keep_s: float) -> None:
        self.asked[worker_id] = request


@pytest.fixture
def members() -> Members:
    return Members()


def post(members: Members, body: Any = BODY, token: str | None = TOKEN) -> httpx.Response:
    app = FastAPI()
    app.include_router(notice_routes(members, TOKEN))
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    return TestClient(app).post("/baton/notice", json=body, headers=headers)


def test_the_worker_drains(members: Members) -> None:
    reply = post(members)
    assert reply.status_code == 202
    assert reply.json() == {**BODY, "incarnation": "abc"}
    request = members.asked["decode-0"]
    assert request.incarnation == "abc"
    assert 25 < request.until_unix_s - time.time() <= 30


@pytest.mark.parametrize("token", [None, "", "wrong", TOKEN[:-1], TOKEN + "x", "\u00fc"])
def test_only_for_who_has_the_token(members: Members, token: str | None) -> None:
    if token == "\u00fc":
        app = FastAPI()
        app.include_router(notice_routes(members, TOKEN))
        headers = {b"Authorization": token.encode("latin-1")}
        reply = TestClient(app).post("/baton/notice", json=BODY, headers=headers)
    else:
        reply = post(members, token=token)
    assert reply.status_code == 401
    assert not members.asked


def test_says_what_is_wrong(members: Members) -> None:
    unknown = post(members, {**BODY, "worker": "decode-7"})
    assert unknown.status_code == 404 and "decode-0" in unknown.text
    members.state = WorkerState.DRAINING
    assert post(members).status_code == 409
    members.gone = True
    assert post(members).status_code == 503
    for body in ({"worker": "decode-0"}, {**BODY, "deadline_s": -1}, {**BODY, "now": True}):
        assert post(members, body).status_code == 422
    assert not members.asked
