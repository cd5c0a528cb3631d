"""Clients that go away at each point of a request's way: whatever was held for the request is free
again."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from cluster.wire import kv_pb2, worker_pb2
from tests.frames import encode_frame
from tests.integration.conftest import WORKER_REQUESTS_MAX
from tests.integration.gated_worker import (
    ENGINE,
    GRAMMAR,
    LAYER,
    OUTPUTS,
    SENDING,
)
from tests.integration.held import (
    FREE_S,
    Client,
    Held,
    OtherRouter,
    OtherSender,
    Watch,
    at_rest,
    wait_until,
)
from tests.integration.test_equal_to_plain_vllm import prompt_of
from tests.processes import Cluster, metrics

IN_ONE_GO, LAYER_BY_LAYER = 8, 450
"""Tokens of prompts that are sent after their prefill, and while it computes, in three chunks."""
SEEDS = itertools.count(90_000)


@pytest.fixture(scope="module")
def watch(gated: Cluster) -> Iterator[Watch]:
    with Watch(gated) as watch:
        yield watch


@pytest.fixture(scope="module")
def idle(watch: Watch) -> Held:
    return at_rest(watch)


@pytest.fixture(params=["closes", "vanishes"])
def stream(request: pytest.FixtureRequest) -> bool:
    """The client closes a stream, or resets the connection on which it waits for an answer."""
    return bool(request.param == "closes")


def asking(tokens: int, seed: int | None = None, **values: Any) -> dict[str, Any]:
    prompt = prompt_of(tokens, next(SEEDS) if seed is None else seed)
    return {
        "model": "m",
        "prompt": prompt,
        "temperature": 0,
        "max_tokens": 40,
        "ignore_eos": True,
        **values,
    }


@pytest.fixture(autouse=True)
def starts_idle(watch: Watch, idle: Held) -> None:
    watch.settles_to(idle)


def test_queued_in_router_and_worker(watch: Watch, idle: Held, stream: bool) -> None:
    with watch.closed("prefill", ENGINE, "any"):
        clients = [
            Client(watch.cluster.url, asking(IN_ONE_GO), stream)
            for _ in range(WORKER_REQUESTS_MAX + 1)
        ]

        def queued() -> bool:
            held = watch.now()
            waiting = held["prefill-0"]["waiting"] == WORKER_REQUESTS_MAX
            return waiting and held["router"]["queued"] == 1

        wait_until("one waits in the router, the others in the worker", queued)
        for client in clients:
            client.leave()
        watch.settles_to(idle)


def test_between_two_chunks_of_the_prefill(watch: Watch, idle: Held, stream: bool) -> None:
    with watch.closed("prefill", ENGINE, "computing"):
        client = Client(watch.cluster.url, asking(LAYER_BY_LAYER), stream)
        wait_until(
            "a chunk is computed, and sent",
            lambda: watch.reached("prefill", ENGINE) and watch.decode("inbox_bytes"),
        )
        assert watch.worker("prefill-0")["kv_blocks"]
        client.leave()
        watch.settles_to(idle)


@pytest.mark.parametrize("tokens", [IN_ONE_GO, LAYER_BY_LAYER])
def test_within_a_step_of_the_prefill(watch: Watch, idle: Held, stream: bool, tokens: int) -> None:
    with watch.closed("prefill", LAYER):
        client = Client(watch.cluster.url, asking(tokens), stream)
        wait_until("a layer is computed", lambda: watch.reached("prefill", LAYER))
        client.leave()
        wait_until("the worker is told", lambda: not watch.worker("prefill-0")["requests"])
        # Its engine will be when the step has ended, and until then its stream stays open.
        dropped = "the other has dropped it"
        wait_until(dropped, lambda: not watch.decode("inbox_transfers"), within_s=FREE_S)
    watch.settles_to(idle)


@pytest.mark.parametrize("tokens", [IN_ONE_GO, LAYER_BY_LAYER])
def test_after_the_prefill(watch: Watch, idle: Held, stream: bool, tokens: int) -> None:
    """The KV has been sent, and the router does not know it yet."""
    with watch.closed("prefill", OUTPUTS):
        client = Client(watch.cluster.url, asking(tokens), stream)

        def sent() -> bool:
            return bool(
                watch.decode("inbox_transfers")
                and not watch.worker("prefill-0")["sending_transfers"]
                and watch.reached("prefill", OUTPUTS)
            )

        wait_until("all is sent", sent)
        client.leave()
        watch.settles_to(idle)
    # The outputs come too late.
    watch.settles_to(idle)


@pytest.mark.parametrize("tokens", [IN_ONE_GO, LAYER_BY_LAYER])
def test_during_the_transfer(watch: Watch, idle: Held, stream: bool, tokens: int) -> None:
    with watch.closed("prefill", SENDING):
        client = Client(watch.cluster.url, asking(tokens), stream)

        def half_sent() -> bool:
            waits = watch.decode("waiting") and watch.decode("inbox_bytes")
            return bool(waits and watch.reached("prefill", SENDING))

        wait_until("the decode leg waits for the rest", half_sent)
        client.leave()
        wait_until(
            "the decode worker has thrown it away",
            lambda: not (watch.decode("inbox_transfers") or watch.decode("waiting")),
        )
    watch.settles_to(idle)


@contextlib.contextmanager
def full_inboxes(watch: Watch) -> Iterator[None]:
    """Another transfer has all the room of every decode worker."""
    with contextlib.ExitStack() as stack:
        for worker_id in watch.decode_workers:
            stack.enter_context(full_inbox(watch, worker_id))
        yield


@contextlib.contextmanager
def full_inbox(watch: Watch, worker_id: str) -> Iterator[None]:
    about = watch.describe(worker_id)
    tokens = about.inbox_bytes_max // about.kv_bytes_per_token
    transfer_id, channel = f"filler {next(SEEDS)}", watch.channel(worker_id)
    with OtherRouter(channel) as router, OtherSender(channel, transfer_id) as sender:
        sender.send(opening(transfer_id, about.incarnation, tokens))
        assert sender.heard().HasField("credit")
        yield
        router.send(dropping(transfer_id))
        done_so_far(router)


def opening(transfer_id: str, incarnation: str, tokens: int) -> bytes:
    opened = kv_pb2.OpenTransfer(
        tokens=tokens,
        prompt_digest=bytes(16),
        from_worker_id="prefill-9",
        from_incarnation="1",
        to_incarnation=incarnation,
    )
    return encode_frame(kv_pb2.FrameHeader(transfer_id=transfer_id, open=opened))


def done_so_far(router: OtherRouter) -> None:
    """What it said has come to the worker."""
    call = worker_pb2.UtilityCall(call_id=1, method="is_scheduler_paused", args=b"\x90")
    router.send(worker_pb2.ToEngine(utility=call))
    router.hears("utility")


def dropping(transfer_id: str) -> worker_pb2.ToEngine:
    return worker_pb2.ToEngine(drop=worker_pb2.DropTransfer(transfer_id=transfer_id))


def held_when_full(watch: Watch, idle: Held) -> Held:
    """What is held while all inboxes are full, and the router knows it."""
    with full_inboxes(watch):
        full_bytes = watch.decode("inbox_bytes")
        wait_until("it is told", lambda: watch.now()["router"]["reported"] == full_bytes)
        full = watch.now()
    watch.settles_to(idle)
    return full


@contextlib.contextmanager
def full_behind(watch: Watch, tokens: int, stream: bool) -> Iterator[Client]:
    """The inboxes are full when a client's request has been placed, and its prefill has not begun,
    for the engine is closed: a router that knows of it hands nothing over."""
    client = Client(watch.cluster.url, asking(tokens), stream)
    wait_until("it is placed", lambda: watch.worker("prefill-0")["requests"])
    with full_inboxes(watch):
        yield client


def test_waiting_for_room_after_the_prefill(watch: Watch, idle: Held, stream: bool) -> None:
    full = held_when_full(watch, idle)
    with contextlib.ExitStack() as filled:
        with watch.closed("prefill", ENGINE, "any"):
            client = filled.enter_context(full_behind(watch, IN_ONE_GO, stream))
        wait_until(
            "the decode leg waits for KV that has no room",
            lambda: watch.decode("waiting") and watch.worker("prefill-0")["sending_transfers"],
        )
        assert watch.worker("prefill-0")["staged_bytes"]
        client.leave()
        watch.settles_to(full)
    watch.settles_to(idle)


def test_waiting_for_room_during_the_prefill(watch: Watch, idle: Held, stream: bool) -> None:
    full = held_when_full(watch, idle)
    with (
        watch.closed("prefill", ENGINE, "any"),
        full_behind(watch, LAYER_BY_LAYER, stream) as client,
    ):
        there = watch.decode("inbox_transfers") + 1
        watch.close("prefill", ENGINE, "computing")
        wait_until(
            "KV waits that has no room",
            lambda: (
                watch.worker("prefill-0")["staged_bytes"]
                and watch.decode("inbox_transfers") == there
            ),
        )
        client.leave()
        watch.settles_to(full)
    watch.settles_to(idle)


@pytest.mark.parametrize("tokens", [IN_ONE_GO, LAYER_BY_LAYER])
def test_between_transfer_and_decode(watch: Watch, idle: Held, stream: bool, tokens: int) -> None:
    with watch.closed("decode", ENGINE, "any"):
        adopted = watch.state()["handoffs_completed"]
        client = Client(watch.cluster.url, asking(tokens), stream)
        wait_until(
            "the decode leg has its KV, and is in vLLM's queue",
            lambda: watch.state()["handoffs_completed"] > adopted and watch.decode("waiting"),
        )
        assert watch.decode("inbox_bytes")
        client.leave()
        watch.settles_to(idle)


def test_between_transfer_and_grammar(watch: Watch, idle: Held, stream: bool) -> None:
    with watch.closed("decode", GRAMMAR):
        body = asking(IN_ONE_GO, structured_outputs={"regex": "[a-c0-9]{60}"}, ignore_eos=False)
        client = Client(watch.cluster.url, body, stream)
        wait_until("its grammar is compiled", lambda: watch.reached("decode", GRAMMAR))
        assert watch.decode("inbox_bytes")
        client.leave()
        watch.settles_to(idle)


@pytest.mark.parametrize("sent", [False, True])
def test_with_a_beginning_that_is_held(watch: Watch, idle: Held, stream: bool, sent: bool) -> None:
    """The decode worker keeps blocks of its prefix cache for a transfer that begins behind them."""
    body, policy = asking(260, max_tokens=2), {"X-Baton-Policy": "prefix_aware"}
    url = watch.cluster.url
    assert httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 200
    body["prompt"] += asking(180)["prompt"]
    clients = []

    def held() -> bool:
        for client in clients:
            client.leave()
        clients.append(Client(url, body, stream, policy))
        wait_until("queued", lambda: watch.worker("prefill-0")["waiting"] == len(clients))
        return watch.decode("kv_blocks") > 0

    with watch.closed("decode", ENGINE, "any"):
        adopted = watch.state()["handoffs_completed"]
        with watch.closed("prefill", ENGINE, "any"):
            # What the decode worker has stored it tells a moment later.
            wait_until("a beginning is held", held)
            if not sent:
                clients[-1].leave()
                watch.settles_to(idle)
                return
        wait_until("the rest is sent", lambda: watch.state()["handoffs_completed"] > adopted)
        assert watch.decode("kv_blocks")
        clients[-1].leave()
        watch.settles_to(idle)


def running(watch: Watch) -> float:
    """As the front end shows it."""
    shown = metrics(watch.cluster.url)
    return sum(value for name, value in shown.items() if name.startswith("vllm:num_requests_runn"))


def test_during_decode(watch: Watch, idle: Held, stream: bool) -> None:
    with watch.closed("decode", ENGINE, "decoding"):
        client = Client(watch.cluster.url, asking(LAYER_BY_LAYER), stream)
        wait_until("some is decoded", lambda: watch.reached("decode", ENGINE))
        assert watch.decode("kv_blocks")
        wait_until("the router shows it", lambda: running(watch) == 1)
        client.leave()
        watch.settles_to(idle)
    assert running(watch) == 0
