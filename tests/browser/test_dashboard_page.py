"""The operator's page in a real browser: live, from this host only, and honest when cut off."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import uvicorn
from fastapi import FastAPI

from router.dashboard.routes import FORMATS, dashboard_routes
from router.dashboard.state import DashboardState, HandoffRow, WorkerRow

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

pytestmark = pytest.mark.browser

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
CHROMIUM_ARGS = [
    "--no-sandbox",
    "--headless",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
HOSTILE = """<script>alert(1)</script>"'><img src=x onerror=alert(2)>"""


def worker(worker_id: str, pool: str, state: str = "ready", **figures: float) -> WorkerRow:
    row = WorkerRow(worker_id, "i1", pool, state, "10.0.0.7:5000", "node-a", "H100", "the fastest")
    return dataclasses.replace(row, **figures)


def handoff(request_id: str, result: str = "handed over") -> HandoffRow:
    return HandoffRow(
        1763700000.5, request_id, "p0/i1", "d0/i1", 900, 350_400_000, 0.0123, 0.1, result
    )


STATE = DashboardState(
    cluster="blue",
    model="llama",
    router_id="router-1",
    version="0.1.0",
    uptime_s=3725.5,
    workers=[
        worker("p0", "prefill", running=2, kv_usage=0.314, handoffs_out=1234),
        worker("d0", "decode", handoffs_in=6, handoff_bytes_in=1250, kv_usage=0.97),
        worker("d1", "decode", "failed", detail="CUDA out of memory"),
    ],
    desired={"prefill": 1, "decode": 2},
    requests_by_path={"handed_over": 6, "kept_local": 1234},
    requests_running=3,
    handoffs_started=8,
    handoffs_completed=6,
    handoff_bytes=1_250_000,
    recent_handoffs=[handoff("r2", "deadline passed"), handoff("r1")],
)


class FakeRouter:
    """The page's routes over a state that the test sets, on a loopback port that stays the same."""

    def __init__(self) -> None:
        self.state = STATE
        self.reads = 0
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self._port = sock.getsockname()[1]
        self._app = FastAPI()
        self._app.include_router(dashboard_routes(self._read))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/dashboard"

    def _read(self) -> DashboardState:
        self.reads += 1
        return self.state

    def change(self, **values: object) -> None:
        self.state = dataclasses.replace(self.state, **values)

    def start(self) -> None:
        config = uvicorn.Config(
            self._app, "127.0.0.1", self._port, log_level="warning", lifespan="off"
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        deadline = time.monotonic() + 30
        while not self._server.started:
            assert self._thread.is_alive() and time.monotonic() < deadline
            time.sleep(0.01)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()


@dataclasses.dataclass
class Watched:
    """A tab, and all it did that it should not have done."""

    page: playwright.Page
    faults: list[str] = dataclasses.field(default_factory=list)

    def text(self, scope: str, field: str) -> playwright.Locator:
        return self.page.locator(f"{scope} [data-field='{field}']:not(meter)").first

    def open(self, router: FakeRouter) -> None:
        self.page.goto(router.url)
        playwright.expect(self.page.locator("[data-status]")).to_have_text("live")


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    if not Path(CHROMIUM).exists():
        pytest.skip("no chromium: install Debian's `chromium`")
    playwright.expect.set_options(timeout=15_000)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_ARGS)
        yield browser
        browser.close()


@pytest.fixture
def router() -> Iterator[FakeRouter]:
    router = FakeRouter()
    router.start()
    yield router
    router.stop()


@pytest.fixture
def tab(browser: playwright.Browser) -> Iterator[Watched]:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    watched = Watched(page)

    def on_request(route: playwright.Route) -> None:
        if urlsplit(route.request.url).hostname == "127.0.0.1":
            route.continue_()
        else:
            watched.faults.append(f"request to {route.request.url}")
            route.abort()

    def on_console(message: playwright.ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            watched.faults.append(f"console: {message.text}")

    def on_dialog(dialog: playwright.Dialog) -> None:
        watched.faults.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    context.route("**/*", on_request)
    page.on("console", on_console)
    page.on("pageerror", lambda error: watched.faults.append(f"error: {error}"))
    page.on("dialog", on_dialog)
    yield watched
    context.close()
    assert watched.faults == []


def test_pools_workers_and_hand_offs_are_shown(tab: Watched, router: FakeRouter) -> None:
    tab.open(router)
    expect = playwright.expect
    expect(tab.page.locator("[data-pool]")).to_have_count(2)
    expect(tab.page.locator("[data-pool=decode] [data-worker]")).to_have_count(2)
    expect(tab.page.locator("[data-pool=decode] .readiness")).to_have_text("ready 1 of 2 wanted")
    expect(tab.text("[data-worker=p0]", "kv_usage")).to_have_text("31%")
    expect(tab.page.get_by_role("meter").first).to_have_js_property("value", 0.314)
    expect(tab.text("[data-worker=d1]", "detail")).to_be_visible()
    expect(tab.text("[data-handoff=r2]", "result")).to_have_attribute(
        "data-value", "deadline passed"
    )
    expect(tab.page.get_by_role("columnheader")).to_have_count(8)
    expect(tab.page.get_by_role("main")).to_have_count(1)
    expect(tab.page.get_by_role("heading", level=1)).to_have_text("Baton blue")


def test_the_page_follows_the_state_in_place(tab: Watched, router: FakeRouter) -> None:
    tab.open(router)
    expect = playwright.expect
    tab.page.evaluate("document.querySelector('[data-worker=d0]').mark = 'kept'")
    tab.page.evaluate("document.querySelector('[data-handoff=r1]').mark = 'kept'")
    router.change(
        cluster="green",
        workers=[
            worker("a9", "decode", "loading"),
            worker("d0", "decode", running=7, kv_usage=0.5, inbox_bytes=2_000_000),
            worker("m0", "mixed"),
            worker("p0", "prefill", "draining"),
        ],
        desired={"prefill": 2, "decode": 1},
        requests_by_path={"handed_over": 7, "recomputed": 2},
        recent_handoffs=[handoff("r3"), *STATE.recent_handoffs],
    )
    expect(tab.page).to_have_title("Baton: green")
    decode = tab.page.locator("[data-pool=decode] [data-worker]")
    expect(decode).to_have_count(2)
    assert [item.get_attribute("data-worker") for item in decode.all()] == ["a9", "d0"]
    expect(tab.text("[data-worker=d0]", "running")).to_have_text("7")
    expect(tab.text("[data-worker=d0]", "inbox_bytes")).to_have_text("2.0 MB")
    expect(tab.text("[data-worker=p0]", "state")).to_have_attribute("data-value", "draining")
    expect(tab.page.locator("[data-pool=prefill] .readiness")).to_have_text("ready 0 of 2 wanted")
    expect(tab.page.locator("[data-pool=prefill]")).to_have_attribute("data-short", "")
    expect(tab.page.locator("[data-pool=mixed] [data-worker=m0]")).to_be_visible()
    expect(tab.text("body", "requests_by_path.recomputed")).to_have_text("2")
    expect(tab.text("body", "requests_by_path.kept_local")).to_have_text("0")
    expect(tab.page.locator("[data-handoff]")).to_have_count(3)
    expect(tab.page.locator("[data-handoff]").first).to_have_attribute("data-handoff", "r3")
    for selector in ("[data-worker=d0]", "[data-handoff=r1]"):
        assert tab.page.evaluate(f"document.querySelector('{selector}').mark") == "kept"

    router.change(workers=[], recent_handoffs=[])
    expect(tab.page.locator("[data-worker]")).to_have_count(0)
    expect(tab.page.locator("[data-pool=decode] .none")).to_be_visible()
    expect(tab.page.locator("[data-none=handoffs]")).to_be_visible()


def test_rows_that_share_an_id_are_all_shown_and_all_go(tab: Watched, router: FakeRouter) -> None:
    tab.open(router)
    router.change(recent_handoffs=[handoff("r1", "lost"), handoff("r1"), handoff("r1")])
    playwright.expect(tab.page.locator("[data-handoff=r1]")).to_have_count(3)
    router.change(recent_handoffs=[handoff("r4")])
    playwright.expect(tab.page.locator("[data-handoff]")).to_have_count(1)


def test_it_reads_the_same_without_javascript(
    tab: Watched, router: FakeRouter, browser: playwright.Browser
) -> None:
    texts = "elements => elements.map(e => [e.dataset.field, e.textContent, e.title])"
    plain = browser.new_context(java_script_enabled=False)
    page = plain.new_page()
    page.goto(router.url)
    expected = page.locator("[data-field]").evaluate_all(texts)
    playwright.expect(page.locator("noscript p")).to_be_visible()
    plain.close()
    tab.open(router)
    assert tab.page.locator("[data-field]").evaluate_all(texts) == expected
    assert len(expected) > 50


def test_both_renderers_write_values_alike(tab: Watched, router: FakeRouter) -> None:
    rng = random.Random(7)
    counts = [0, 999, 1000, 1050, 1250, 999_949, 999_950, 10**15]
    counts += [int(10 ** rng.uniform(0, 15)) for _ in range(300)]
    shares = [0.0, 0.005, 0.015, 0.125, 1.0, *(rng.random() for _ in range(300))]
    seconds = [0.0, 0.00005, 0.00125, 59.9, 60.0, 3599.9, 86400.0]
    seconds += [10 ** rng.uniform(-5, 7) for _ in range(300)]
    values = {
        "text": ["", "x"],
        "count": counts,
        "bytes": counts,
        "percent": shares,
        "milliseconds": seconds,
        "duration": seconds,
        "time": [1763700000.999, *(1.7e9 + s for s in seconds)],
        "wanted": [None, *counts],
        "worker": ["", "d0", "d0/i1", "a/b/c", "/i1"],
    }
    assert values.keys() == FORMATS.keys()
    tab.open(router)
    shown = tab.page.evaluate(
        """async (text) => {
            const { FORMATS } = await import("/dashboard/static/dashboard.js");
            const texts = ([name, values]) => [name, values.map(FORMATS[name])];
            return Object.fromEntries(Object.entries(JSON.parse(text)).map(texts));
        }""",
        json.dumps(values),
    )
    assert shown == {name: [FORMATS[name](v) for v in rows] for name, rows in values.items()}


def test_it_says_stale_while_the_router_is_away(tab: Watched, router: FakeRouter) -> None:
    tab.open(router)
    expect = playwright.expect
    stale = tab.page.locator("[aria-live=polite] [data-notice=stale]")
    expect(stale).to_be_hidden()
    assert tab.faults == []
    router.stop()
    expect(stale).to_contain_text("Stale since 20")
    expect(tab.page.locator("[data-status]")).to_have_text("stale")
    said = stale.text_content()
    expect(tab.text("[data-worker=p0]", "running")).to_have_text("2")
    router.change(requests_running=99)
    time.sleep(2.5)
    assert stale.text_content() == said, "it is stale since the last answer, however long"
    router.start()
    expect(stale).to_be_hidden()
    expect(tab.page.locator("[data-status]")).to_have_text("live")
    expect(tab.text("body", "requests_running")).to_have_text("99")
    # The browser itself writes one line for each refused connection.
    assert tab.faults and all("ERR_" in fault for fault in tab.faults)
    tab.faults.clear()


def test_it_asks_nothing_while_hidden(tab: Watched, router: FakeRouter) -> None:
    tab.open(router)
    turn = """state => {
        Object.defineProperty(document, "visibilityState", { value: state, configurable: true });
        document.dispatchEvent(new Event("visibilitychange"));
    }"""
    tab.page.evaluate(turn, "hidden")
    tab.page.wait_for_timeout(500)
    reads = router.reads
    tab.page.wait_for_timeout(2500)
    assert router.reads == reads
    router.change(requests_running=5)
    tab.page.evaluate(turn, "visible")
    playwright.expect(tab.text("body", "requests_running")).to_have_text("5")


def test_it_says_when_redis_is_out_of_reach(tab: Watched, router: FakeRouter) -> None:
    tab.open(router)
    notice = tab.page.locator("[aria-live=polite] [data-notice=redis]")
    playwright.expect(notice).to_be_hidden()
    router.change(redis_reachable=False)
    playwright.expect(notice).to_be_visible()
    router.change(redis_reachable=True)
    playwright.expect(notice).to_be_hidden()


def test_what_others_wrote_stays_text(tab: Watched, router: FakeRouter) -> None:
    tab.open(router)
    before = tab.page.locator("script, img").count()
    row = WorkerRow(*[HOSTILE] * 8, detail=HOSTILE)
    router.change(workers=[row], recent_handoffs=[handoff(HOSTILE, HOSTILE)], cluster=HOSTILE)
    playwright.expect(tab.text("[data-worker]", "detail")).to_have_text(HOSTILE)
    playwright.expect(tab.page.locator("[data-handoff] .result")).to_have_text(HOSTILE)
    assert tab.page.locator("script, img").count() == before


@pytest.mark.parametrize("width", [320, 400, 768, 1280])
def test_it_fits_the_width(tab: Watched, router: FakeRouter, width: int) -> None:
    router.change(model="organisation/" + "long-model-name-" * 8)
    tab.page.set_viewport_size({"width": width, "height": 900})
    tab.open(router)
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= width
