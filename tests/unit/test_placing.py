"""The headers that name a policy and tell the placement, over a core that only places."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from cluster.scheduler.policies import Policies, PolicyOptions
from cluster.scheduler.policies.baselines import RoundRobin
from cluster.scheduler.policy import Placement, PlacementPolicy
from cluster.scheduler.view import WorkerKey
from router.placing import PLACING, TOLD_MAX, PlacementHeaders, Placing


class FakeCore:
    def __init__(self) -> None:
        self.policies: list[PlacementPolicy | None] = []
        self.reason = "shortest queues"

    async def add(self, request_id: str, decode: str = "decode-0") -> None:
        await asyncio.sleep(0)
        placing = PLACING.get()
        assert placing is not None
        self.policies.append(placing.policy)
        prefill = WorkerKey("prefill-0", "i1")
        placing.placements[request_id] = Placement(prefill, WorkerKey(decode, "i1"), self.reason)


@pytest.fixture
def core() -> FakeCore:
    return FakeCore()


@pytest.fixture
def client(core: FakeCore) -> Iterator[TestClient]:
    async def whole(request: Request) -> Response:
        await core.add("r1")
        return JSONResponse({"ok": True})

    async def batch(request: Request) -> Response:
        """Each prompt in a task of its own, as vLLM merges its iterators."""
        decodes = (await request.body()).decode().split()
        await asyncio.gather(
            *(asyncio.create_task(core.add(f"r{i}", name)) for i, name in enumerate(decodes))
        )
        return JSONResponse({"ok": True})

    async def stream(request: Request) -> Response:
        async def chunks() -> AsyncIterator[str]:
            await core.add("r1")
            yield "data: 1\n\n"
            await core.add("r1", "decode-9")
            yield "data: 2\n\n"

        return StreamingResponse(chunks(), media_type="text/event-stream")

    async def moved(request: Request) -> Response:
        await core.add("r1")
        await core.add("r1", "decode-1")
        return JSONResponse({"ok": True})

    async def fails(request: Request) -> Response:
        await core.add("r1")
        return JSONResponse({"error": {}}, status_code=500)

    async def raises(request: Request) -> Response:
        raise RuntimeError("broken")

    async def unplaced(request: Request) -> Response:
        return JSONResponse({"placing": PLACING.get() is not None})

    routes: list[Any] = [
        Route(f"/{handler.__name__}", handler, methods=["GET", "POST"])
        for handler in (whole, batch, stream, moved, fails, raises, unplaced)
    ]
    policies = Policies(PolicyOptions())
    app = Starlette(routes=routes, middleware=[Middleware(PlacementHeaders, policies)])
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def test_a_response_tells_where_it_went_and_why(client: TestClient, core: FakeCore) -> None:
    answer = client.post("/whole")
    assert answer.json() == {"ok": True}
    assert answer.headers["x-baton-placement"] == "prefill-0 -> decode-0; shortest queues"
    assert core.policies == [None]


def test_a_stream_tells_it_before_its_first_chunk(client: TestClient) -> None:
    answer = client.post("/stream")
    assert answer.headers["x-baton-placement"] == "prefill-0 -> decode-0; shortest queues"
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text == "data: 1\n\ndata: 2\n\n"


def test_a_request_moved_in_between_tells_the_latest(client: TestClient) -> None:
    headers = client.post("/moved").headers
    assert headers["x-baton-placement"] == "prefill-0 -> decode-1; shortest queues"


def test_several_prompts_tell_each_placement_once(client: TestClient, core: FakeCore) -> None:
    core.reason = "a, b"
    headers = client.post("/batch", content="d0 d1 d0").headers
    assert headers["x-baton-placement"] == "prefill-0 -> d0; a; b, prefill-0 -> d1; a; b"
    many = client.post("/batch", content=" ".join(f"d{i}" for i in range(50))).headers
    told = many["x-baton-placement"].split(", ")
    assert len(told) == TOLD_MAX + 1 and told[-1] == "..."


def test_a_name_that_no_header_can_hold_is_shown_without_it(
    client: TestClient, core: FakeCore
) -> None:
    core.reason = "nächster\r\nX-Evil: 1"
    headers = client.post("/whole").headers
    assert headers["x-baton-placement"] == "prefill-0 -> decode-0; n?chster??X-Evil: 1"
    assert "x-evil" not in headers


def test_errors_and_reads_tell_nothing(client: TestClient) -> None:
    for answer in (client.post("/fails"), client.post("/raises"), client.post("/unplaced")):
        assert "x-baton-placement" not in answer.headers
    assert client.post("/raises").status_code == 500
    assert client.get("/unplaced").json() == {"placing": False}
    assert client.get("/unplaced", headers={"X-Baton-Policy": "best"}).status_code == 200


def test_a_request_names_its_policy(client: TestClient, core: FakeCore) -> None:
    for name in ("round_robin", " round_robin "):
        client.post("/batch", content="d0 d1", headers={"X-Baton-Policy": name})
    assert len(core.policies) == 4
    # One for all requests, or there were no turns to take.
    assert isinstance(core.policies[0], RoundRobin) and len(set(map(id, core.policies))) == 1
    client.post("/whole")
    assert core.policies[-1] is None


def test_an_unknown_policy_is_refused(client: TestClient, core: FakeCore) -> None:
    answer = client.post("/whole", headers={"x-baton-policy": "best"})
    assert answer.status_code == 400
    assert answer.json() == {
        "error": {
            "message": "no policy is called 'best': there are splitwise, round_robin, random, "
            "power_of_two, prefix_aware, predicted_latency",
            "type": "BadRequestError",
            "param": "X-Baton-Policy",
            "code": 400,
        }
    }
    assert core.policies == []


async def test_the_body_never_comes_before_the_start() -> None:
    sent: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        assert sent == []
        for _ in range(2):
            await send({"type": "http.response.body", "body": b"x", "more_body": True})

    async def send(message: Any) -> None:
        sent.append(message["type"])

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    scope = {"type": "http", "method": "POST", "headers": []}
    await PlacementHeaders(app, Policies(PolicyOptions()))(scope, receive, send)
    assert sent == ["http.response.start", "http.response.body", "http.response.body"]
    assert PLACING.get() is None


def test_nothing_placed_is_no_header() -> None:
    assert Placing().header() == ""
