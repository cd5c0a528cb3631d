"""The headers that name a policy and tell the placement, over a core that only places."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from cluster.scheduler.life import FailRequest, Failure
from cluster.scheduler.policies import Policies, PolicyOptions
from cluster.scheduler.policies.baselines import RoundRobin
from cluster.scheduler.policy import Placement, PlacementPolicy
from cluster.scheduler.view import WorkerKey
from router.classes import Classes
from router.placing import PLACING, TOLD_MAX, PlacementHeaders, Placing

KEY = hashlib.sha256(b"batch-key").hexdigest()
CLASSES = Classes.of_settings(
    {"interactive": {"ttft_s": 0.5, "priority": 0}, "batch": {"priority": 5}}, {KEY: "batch"}
)


class FakeCore:
    def __init__(self) -> None:
        self.policies: list[PlacementPolicy | None] = []
        self.asked: list[tuple[str, str]] = []
        """Class and tenant."""
        self.refusal: FailRequest | None = None
        self.reason = "shortest queues"

    async def add(self, request_id: str, decode: str = "decode-0") -> None:
        await asyncio.sleep(0)
        placing = PLACING.get()
        assert placing is not None
        self.policies.append(placing.policy)
        self.asked.append((placing.slo.name, placing.tenant))
        placing.refusal = self.refusal
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
    middleware = [Middleware(PlacementHeaders, Policies(PolicyOptions()), CLASSES)]
    app = Starlette(routes=routes, middleware=middleware)
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


# --- classes and refusals -------------------------------------------------------------------------


def test_a_request_has_the_class_it_names_or_that_of_its_key(
    client: TestClient, core: FakeCore
) -> None:
    key = {"Authorization": "Bearer batch-key"}
    other = {"x-api-key": "other"}
    for headers in ({}, {"X-Baton-Class": "interactive"}, key, other):
        assert client.post("/whole", headers=headers).status_code == 200
    # Nobody gets out of the class that is set for its key.
    client.post("/whole", headers={**key, "X-Baton-Class": "interactive"})
    tenant = hashlib.sha256(b"other").hexdigest()
    batch = ("batch", KEY)
    assert core.asked == [("", ""), ("interactive", ""), batch, ("", tenant), batch]


def test_an_unknown_class_is_refused(client: TestClient, core: FakeCore) -> None:
    answer = client.post("/whole", headers={"X-Baton-Class": "best"})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "X-Baton-Class"
    assert error["message"] == "no class is called 'best': there are interactive, batch"
    assert core.asked == []


def test_a_class_called_default_is_that_of_all_others() -> None:
    classes = Classes.of_settings({"default": {"ttft_s": 1.0}, "batch": {}}, {KEY: "batch"})
    assert classes.get("", None).ttft_s == 1.0
    assert classes.get("", "batch").name == classes.get(KEY, None).name == "batch"


@pytest.mark.parametrize(
    ("failure", "wait_s", "status", "retry_after"),
    [
        (Failure.SLO, 2.2, 429, "3"),
        (Failure.QUEUE_FULL, 0.0, 429, "1"),
        (Failure.QUEUE_FULL, 1e9, 429, "60"),
        (Failure.NO_WORKER, 0.0, 503, "1"),
        (Failure.STOPPING, 0.0, 503, "1"),
    ],
)
@pytest.mark.parametrize("path", ["/whole", "/batch", "/stream", "/fails"])
def test_a_request_that_is_not_taken_is_told_when_to_come_again(
    client: TestClient,
    core: FakeCore,
    path: str,
    failure: Failure,
    wait_s: float,
    status: int,
    retry_after: str,
) -> None:
    core.refusal = FailRequest("r1", "too much to do", failure, wait_s)
    answer = client.post(path, content="d0 d1")
    assert answer.status_code == status and answer.headers["retry-after"] == retry_after
    error = answer.json()["error"]
    assert error["code"] == status and error["message"] == "not taken: too much to do"
    assert "x-baton-placement" not in answer.headers


@pytest.mark.parametrize("path", ["/whole", "/stream", "/fails"])
def test_a_request_that_no_worker_can_be_sent_is_told_why(
    client: TestClient, core: FakeCore, path: str
) -> None:
    core.refusal = FailRequest("r1", "top_k: too large", Failure.INVALID)
    answer = client.post(path, content="d0")
    assert answer.status_code == 400 and "retry-after" not in answer.headers
    assert answer.json()["error"] == {
        "message": "top_k: too large",
        "type": "BadRequestError",
        "param": None,
        "code": 400,
    }


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
    headers = PlacementHeaders(app, Policies(PolicyOptions()), CLASSES)
    await headers(scope, receive, send)
    assert sent == ["http.response.start", "http.response.body", "http.response.body"]
    assert PLACING.get() is None


def test_nothing_placed_is_no_header() -> None:
    assert Placing().header() == ""
