"""The operator's page over HTTP: what is in it, and that foreign text stays in its place."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from html.parser import HTMLParser

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from router.dashboard.routes import FORMATS, dashboard_routes, pools_of
from router.dashboard.state import DashboardState, HandoffRow, WorkerRow

HOSTILE = """<script>alert(1)</script>"'><img src=x onerror=alert(2)>"""


def worker(worker_id: str, pool: str, state: str = "ready") -> WorkerRow:
    return WorkerRow(worker_id, "i1", pool, state, "10.0.0.7:5000", "node-a", "H100", "the fastest")


STATE = DashboardState(
    cluster="blue",
    model="llama",
    router_id="router-1",
    version="0.1.0",
    uptime_s=3725.5,
    workers=[
        dataclasses.replace(
            worker("p0", "prefill"), running=2, waiting=5, kv_usage=0.314, handoffs_out=7
        ),
        dataclasses.replace(
            worker("d0", "decode"), handoffs_in=6, handoff_bytes_in=1_250_000, kv_usage=1.0
        ),
        dataclasses.replace(worker("d1", "decode", "failed"), detail="CUDA out of memory"),
    ],
    desired={"prefill": 1, "decode": 2},
    requests_by_path={"handed_over": 6, "kept_local": 1234},
    requests_running=3,
    requests_queued=4,
    handoffs_started=8,
    handoffs_completed=6,
    handoffs_failed=1,
    handoff_bytes=1_250_000,
    recent_handoffs=[
        HandoffRow(1763700001.5, "r2", "p0/i1", "d0/i1", 900, 0, 0.0, 0.0, "deadline passed"),
        HandoffRow(1763700000.5, "r1", "p0/i1", "d0/i1", 800, 250_000, 0.0123, 0.1, "handed over"),
    ],
)
EMPTY = DashboardState("blue", "llama", "router-1", "0.1.0", 0.0)


def client(state: DashboardState | Callable[[], DashboardState]) -> TestClient:
    app = FastAPI()
    app.include_router(dashboard_routes(state if callable(state) else lambda: state))
    return TestClient(app)


class Page(HTMLParser):
    """The text of each data-field, by the worker, hand-off or pool it stands in."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.fields: dict[tuple[str, str], str] = {}
        self.visible_notices: list[str] = []
        self.tags: set[str] = set()
        self._scope = ""
        self._field: tuple[str, str] | None = None
        self._in_template = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        values = dict(attrs)
        if tag == "template":
            self._in_template = True
        for kind in ("worker", "handoff", "pool"):
            self._scope = values.get(f"data-{kind}") or self._scope
        if "data-notice" in values and "hidden" not in values:
            self.visible_notices.append(values["data-notice"] or "")
        if tag != "meter" and "data-field" in values and not self._in_template:
            self._field = (self._scope, values["data-field"] or "")
            self.fields[self._field] = ""

    def handle_endtag(self, tag: str) -> None:
        self._field = None
        if tag == "template":
            self._in_template = False

    def handle_data(self, data: str) -> None:
        if self._field:
            self.fields[self._field] += data


def page(state: DashboardState) -> Page:
    return Page(client(state).get("/dashboard").text)


def test_the_first_answer_has_the_state_in_it() -> None:
    fields = page(STATE).fields
    expected = {
        ("", "cluster"): "blue",
        ("", "model"): "llama",
        ("", "version"): "0.1.0",
        ("", "uptime_s"): "1 h 2 min",
        ("", "requests_queued"): "4",
        ("", "requests_by_path.handed_over"): "6",
        ("", "requests_by_path.kept_local"): "1,234",
        ("", "requests_by_path.recomputed"): "0",
        ("", "handoffs_started"): "8",
        ("", "handoffs_failed"): "1",
        ("", "handoff_bytes"): "1.3 MB",
        ("prefill", "ready"): "1",
        ("prefill", "wanted"): "of 1 wanted",
        ("decode", "ready"): "1",
        ("decode", "wanted"): "of 2 wanted",
        ("p0", "state"): "ready",
        ("p0", "accelerator"): "H100",
        ("p0", "node"): "node-a",
        ("p0", "running"): "2",
        ("p0", "waiting"): "5",
        ("p0", "kv_usage"): "31%",
        ("p0", "handoffs_out"): "7",
        ("p0", "placement_reason"): "the fastest",
        ("d0", "handoff_bytes_in"): "1.3 MB",
        ("d1", "state"): "failed",
        ("d1", "detail"): "CUDA out of memory",
        ("r1", "at_unix_s"): "2025-11-21 04:40:00",
        ("r1", "sender"): "p0",
        ("r1", "receiver"): "d0",
        ("r1", "bytes"): "250.0 kB",
        ("r1", "exposed_s"): "12.3",
        ("r2", "result"): "deadline passed",
    }
    assert {key: fields.get(key) for key in expected} == expected


def test_every_field_of_a_worker_and_a_hand_off_names_one_of_the_data_shape() -> None:
    known = {
        "p0": {field.name for field in dataclasses.fields(WorkerRow)},
        "r1": {field.name for field in dataclasses.fields(HandoffRow)},
        "": {field.name for field in dataclasses.fields(DashboardState)},
    }
    shown = page(STATE).fields
    for scope, names in known.items():
        assert {name.split(".")[0] for at, name in shown if at == scope} <= names


def test_the_page_allows_nothing_but_its_own_files() -> None:
    answer = client(STATE).get("/dashboard")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["cache-control"] == "no-store"
    policy = answer.headers["content-security-policy"].split("; ")
    assert policy[0] == "default-src 'self'"
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:|//", answer.text)
    assert all("src=" in script for script in re.findall(r"<script[^>]*>", answer.text))


def test_what_others_wrote_stays_text() -> None:
    row = WorkerRow(*[HOSTILE] * 8, detail=HOSTILE)
    handoff = HandoffRow(0.0, HOSTILE, HOSTILE, HOSTILE, 1, 1, 0.1, 0.1, HOSTILE)
    state = dataclasses.replace(
        EMPTY, cluster=HOSTILE, model=HOSTILE, workers=[row], recent_handoffs=[handoff]
    )
    html = client(state).get("/dashboard").text
    assert "<script>" not in html and "<img src=x" not in html
    shown = Page(html)
    assert shown.fields["", "cluster"] == HOSTILE
    assert shown.fields[HOSTILE, "detail"] == HOSTILE
    assert shown.tags == page(STATE).tags


def test_the_state_is_the_data_shape_as_json() -> None:
    answer = client(STATE).get("/dashboard/state")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.json() == dataclasses.asdict(STATE)


def test_the_state_is_read_once_a_request_and_anew_for_each() -> None:
    reads: list[int] = []

    def state() -> DashboardState:
        reads.append(1)
        return dataclasses.replace(EMPTY, requests_running=len(reads))

    http = client(state)
    assert http.get("/dashboard/state").json()["requests_running"] == 1
    assert Page(http.get("/dashboard").text).fields["", "requests_running"] == "2"


def test_an_empty_cluster_has_both_pools() -> None:
    assert [(pool.name, pool.ready, pool.wanted) for pool in pools_of(EMPTY)] == [
        ("prefill", 0, None),
        ("decode", 0, None),
    ]
    html = client(EMPTY).get("/dashboard").text
    assert Page(html).fields["prefill", "wanted"] == ""
    assert "data-short" not in html


def test_a_pool_of_another_name_comes_after_the_two() -> None:
    state = dataclasses.replace(STATE, workers=[worker("m0", "mixed"), *STATE.workers])
    assert [pool.name for pool in pools_of(state)] == ["prefill", "decode", "mixed"]


@pytest.mark.parametrize(
    ("state", "wanted", "short"),
    [("ready", 1, False), ("draining", 1, True), ("ready", 2, True), ("failed", 0, False)],
)
def test_a_pool_is_short_when_fewer_are_ready_than_wanted(
    state: str, wanted: int, short: bool
) -> None:
    shown = dataclasses.replace(
        EMPTY, workers=[worker("p0", "prefill", state)], desired={"prefill": wanted, "decode": 0}
    )
    assert pools_of(shown)[0].short is short


@pytest.mark.parametrize(("reachable", "notices"), [(True, []), (False, ["redis"])])
def test_the_page_says_when_redis_is_out_of_reach(reachable: bool, notices: list[str]) -> None:
    state = dataclasses.replace(STATE, redis_reachable=reachable)
    assert page(state).visible_notices == notices


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("dashboard.css", "text/css"),
        ("dashboard.js", "text/javascript"),
        ("icon.svg", "image/svg+xml"),
    ],
)
def test_its_files_are_served_and_revalidated(name: str, kind: str) -> None:
    http = client(STATE)
    answer = http.get(f"/dashboard/static/{name}")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith(kind)
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-cache"
    again = http.get(f"/dashboard/static/{name}", headers={"If-None-Match": answer.headers["etag"]})
    assert again.status_code == 304
    assert f"dashboard/static/{name}" in http.get("/dashboard").text


@pytest.mark.parametrize("name", ["", "other.js", "..%2froutes.py", "%2e%2e/state.py", "%00"])
def test_no_other_file_is_served(name: str) -> None:
    assert client(STATE).get(f"/dashboard/static/{name}").status_code == 404


def test_the_page_is_no_part_of_the_api() -> None:
    assert client(STATE).get("/openapi.json").json()["paths"] == {}


@pytest.mark.parametrize(
    ("kind", "value", "text"),
    [
        ("bytes", 0, "0 B"),
        ("bytes", 999, "999 B"),
        ("bytes", 1000, "1.0 kB"),
        ("bytes", 1250, "1.3 kB"),
        ("bytes", 999_949, "999.9 kB"),
        ("bytes", 999_950, "1.0 MB"),
        ("bytes", 4_321 * 10**12, "4,321.0 TB"),
        ("percent", 0.0, "0%"),
        ("percent", 0.005, "1%"),
        ("percent", 1.0, "100%"),
        ("milliseconds", 0.01234, "12.3"),
        ("milliseconds", 12.5, "12,500.0"),
        ("duration", 59.9, "59 s"),
        ("duration", 61, "1 min 1 s"),
        ("duration", 3600, "1 h 0 min"),
        ("duration", 90_000, "1 d 1 h"),
        ("time", 1763700000.9, "2025-11-21 04:40:00"),
        ("wanted", None, ""),
        ("wanted", 1200, "of 1,200 wanted"),
        ("worker", "d0/i1", "d0"),
        ("worker", "d0", "d0"),
        ("worker", "", "–"),
    ],
)
def test_how_values_read(kind: str, value: object, text: str) -> None:
    assert FORMATS[kind](value) == text
