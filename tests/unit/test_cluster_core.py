"""What becomes of workers' messages: a batch's steps, on their way to vLLM's front end."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from cluster.scheduler.life import Failure, Path
from cluster.scheduler.policies import PolicyOptions, make_policy
from cluster.scheduler.scheduler import Scheduler
from cluster.scheduler.view import Pool, WorkerKey, WorkerView
from cluster.wire import worker_pb2
from router.cluster_core import ClusterCore
from router.every_worker import ConnectedWorker
from router.metrics import RouterMetrics
from router.placing import PLACING, Placing
from router.readiness import ready_routes

KEY = WorkerKey("decode-0", "i1")


class Link:
    """Keeps the requests that the router sends."""

    def __init__(self) -> None:
        self.requests: list[EngineCoreRequest] = []
        self.moves: list[worker_pb2.MoveOut] = []
        self.aborted: list[str] = []

    def send(self, message: worker_pb2.ToEngine) -> None:
        if message.HasField("abort"):
            self.aborted.extend(message.abort.request_ids)
            return
        if message.HasField("utility") or message.HasField("drop"):
            return
        if message.HasField("move"):
            self.moves.append(message.move)
            return
        assert message.HasField("add")
        decoder = MsgpackDecoder(EngineCoreRequest)
        self.requests.append(decoder.decode(list(message.add.request)))


class Router:
    """With one worker."""

    def __init__(self) -> None:
        self.now_s = 50.0
        cache = SimpleNamespace(enable_prefix_caching=False)
        self.core = ClusterCore(
            cast(Any, SimpleNamespace(cache_config=cache)),
            Scheduler(make_policy("splitwise", PolicyOptions()), new_id=lambda: "x"),
            RouterMetrics(CollectorRegistry()),
            1.0,
            clock=lambda: self.now_s,
        )
        self.link = Link()
        self.worker = self.connect(KEY, self.link)

    def connect(self, key: WorkerKey, link: Link) -> ConnectedWorker:
        worker = ConnectedWorker(key, cast(Any, link), worker_pb2.WorkerDescription())
        self.core.workers[key] = worker
        self.core.scheduler.on_worker_up(WorkerView(key, Pool.DECODE, "m", 1000, 1000))
        return worker

    async def leg_of(self, request_id: str, **params: Any) -> str:
        await self.add(request_id, **params)
        return self.link.requests[-1].request_id

    async def add(self, request_id: str, priority: int = 0, **params: Any) -> None:
        sampling = SamplingParams(max_tokens=20, **params)
        await self.core.add_request_async(
            EngineCoreRequest(
                request_id=request_id,
                prompt_token_ids=[5, 6, 7],
                mm_features=None,
                sampling_params=sampling,
                pooling_params=None,
                arrival_time=0.0,
                lora_request=None,
                cache_salt=None,
                data_parallel_rank=None,
                priority=priority,
            )
        )

    def hears(self, *steps: EngineCoreOutputs) -> None:
        """In one batch."""
        encode = MsgpackEncoder().encode
        told = [worker_pb2.StepOutputs(outputs=map(bytes, encode(step))) for step in steps]
        self.core._on_messages(self.worker, [worker_pb2.FromEngine(outputs=s) for s in told])

    async def passes_on(self) -> list[EngineCoreOutputs]:
        passed = []
        while self.core._outputs.qsize():
            passed.append(await self.core.get_output_async())
        return passed


def step(at_s: float, *outputs: EngineCoreOutput) -> EngineCoreOutputs:
    return EngineCoreOutputs(outputs=list(outputs), timestamp=at_s)


def texts(passed: list[EngineCoreOutputs]) -> list[tuple[str, list[int], FinishReason | None]]:
    return [
        (output.request_id, output.new_token_ids, output.finish_reason)
        for outputs in passed
        for output in outputs.outputs
    ]


async def test_a_batchs_tokens_of_a_request_are_passed_on_together() -> None:
    router = Router()
    a, b = await router.leg_of("a"), await router.leg_of("b")
    end = FinishReason.LENGTH
    router.hears(
        step(1.0, EngineCoreOutput(a, [1]), EngineCoreOutput(b, [7])),
        step(1.1, EngineCoreOutput(a, [2])),
        step(1.2, EngineCoreOutput(a, [3], finish_reason=end), EngineCoreOutput(b, [8])),
    )
    assert texts(await router.passes_on()) == [("a", [1, 2, 3], end), ("b", [7, 8], None)]
    assert list(router.core.scheduler.lives) == ["b"]
    router.hears(step(1.3, EngineCoreOutput(b, [9], finish_reason=end)))
    assert texts(await router.passes_on()) == [("b", [9], end)]
    assert not router.core.scheduler.lives


async def test_where_text_may_end_it_each_step_is_looked_at_by_itself() -> None:
    router = Router()
    leg = await router.leg_of("a", stop=["x"])
    router.hears(*(step(1.0 + n, EngineCoreOutput(leg, [n])) for n in range(3)))
    assert texts(await router.passes_on()) == [("a", [n], None) for n in range(3)]


async def test_steps_of_a_batch_ended_one_after_the_other() -> None:
    router = Router()
    leg = await router.leg_of("a", stop=["x"])
    router.hears(step(1.0, EngineCoreOutput(leg, [1])))
    router.now_s += 1.0
    router.hears(*(step(1.0 + 0.1 * n, EngineCoreOutput(leg, [n])) for n in range(1, 4)))
    passed = [outputs.timestamp for outputs in await router.passes_on()]
    assert passed == pytest.approx([50.0, 50.1, 50.2, 50.3], abs=0.001)


async def test_what_is_told_between_two_steps_is_no_step() -> None:
    router = Router()
    leg = await router.leg_of("a")
    rates = router.core.scheduler.view.workers[KEY].rates
    unknown = rates.step.factor
    router.hears(step(1.0, EngineCoreOutput(leg, [1])))
    router.hears(EngineCoreOutputs(scheduler_stats=SchedulerStats(num_running_reqs=1)))
    router.hears(step(1.1, EngineCoreOutput(leg, [2])))
    assert rates.step.factor != unknown


async def test_a_lost_workers_leg_is_not_passed_on() -> None:
    router = Router()
    leg = await router.leg_of("a")
    router.hears(step(1.0, EngineCoreOutput(leg, [1])))
    await router.passes_on()
    router.core.remove(KEY)
    router.hears(step(1.1, EngineCoreOutput(leg, [2])), step(1.2, EngineCoreOutput(leg, [3])))
    assert texts(await router.passes_on()) == []


async def test_when_it_stops_what_runs_and_what_waits_fails_and_nothing_is_started() -> None:
    router = Router()
    router.core.scheduler.view.requests_max = 1
    leg = await router.leg_of("runs")
    await router.add("waits")
    router.core.refuse_all("the router stops")
    await router.add("comes")
    failed = [(name, [], FinishReason.ERROR) for name in ("waits", "runs", "comes")]
    assert texts(await router.passes_on()) == failed
    assert [request.request_id for request in router.link.requests] == [leg]
    assert router.link.aborted == [leg]
    assert not router.core.scheduler.lives and not router.core._requests


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("priority", {"priority": 10**23}),
        ("top_k", {"top_k": 10**25}),
        ("stop_token_ids", {"stop_token_ids": [1, -(2**70)]}),
    ],
)
async def test_a_number_that_no_message_holds_is_refused_and_leaves_nothing(
    name: str, values: dict[str, Any]
) -> None:
    router = Router()
    placing = Placing()
    token = PLACING.set(placing)
    await router.add("a", **values)
    PLACING.reset(token)
    assert texts(await router.passes_on()) == [("a", [], FinishReason.ERROR)]
    assert placing.refusal is not None and placing.refusal.failure is Failure.INVALID
    assert placing.refusal.reason.startswith(f"{name}: ")
    core = router.core
    assert not (core.scheduler.lives or core.scheduler.own_load() or core._requests)


class LinkThatFails(Link):
    """For one request."""

    def send(self, message: worker_pb2.ToEngine) -> None:
        if message.add.leg_id.startswith("a."):
            raise OverflowError("it is too large")
        super().send(message)


async def test_what_cannot_be_sent_again_fails_and_the_others_go_on() -> None:
    router = Router()
    for name in "xayz":
        await router.leg_of(name)
    other = LinkThatFails()
    router.connect(WorkerKey("decode-1", "i1"), other)
    router.core.remove(KEY)
    assert texts(await router.passes_on()) == [("a", [], FinishReason.ERROR)]
    assert [request.request_id[0] for request in other.requests] == ["x", "y", "z"]
    scheduler = router.core.scheduler
    assert "".join(scheduler.lives) == "xyz" == "".join(router.core._requests)
    assert [load.decodes for load in scheduler.own_load().values()] == [3]


def test_it_is_ready_while_a_worker_takes_requests() -> None:
    router = Router()
    app = FastAPI()
    app.include_router(ready_routes(router.core))
    client = TestClient(app)

    def says() -> tuple[int, str]:
        answer = client.get("/ready")
        return answer.status_code, answer.json()["reason"]

    assert says() == (200, "")
    view = router.core.scheduler.view.workers[KEY]
    view.draining = True
    assert says() == (503, "all workers drain")
    view.draining = False
    router.core.remove(KEY)
    assert says() == (503, "no worker is in reach")
    router.connect(KEY, router.link)
    router.core.refuse_all("the router stops")
    assert says() == (503, "the router stops")
    assert not router.core.resources.engine_dead


async def test_requests_are_counted_by_how_they_end() -> None:
    router = Router()
    core = router.core
    # As vLLM's front end does: who reads outputs aborts what a stop string in them ends.
    found_stop: asyncio.Queue[str] = asyncio.Queue()

    async def read() -> None:
        while True:
            outputs = await core.get_output_async()
            ends = [output.request_id for output in outputs.outputs if 9 in output.new_token_ids]
            await core.abort_requests_async(ends)
            for request_id in ends:
                found_stop.put_nowait(request_id)

    reader = asyncio.create_task(read())
    stops, fails, ends = [await router.leg_of(name, stop=["x"]) for name in ("s", "f", "e")]
    await router.add("leaves")
    await router.add("runs")
    router.hears(step(1.0, EngineCoreOutput(stops, [1])), step(1.1, EngineCoreOutput(stops, [9])))
    assert await asyncio.wait_for(found_stop.get(), 60) == "s"
    error, end = FinishReason.ERROR, FinishReason.LENGTH
    router.hears(step(1.2, EngineCoreOutput(fails, [], finish_reason=error)))
    router.hears(step(1.3, EngineCoreOutput(ends, [2], finish_reason=end)))
    # Once, however often it is said.
    for _ in range(2):
        await core.abort_requests_async(["leaves", "s"])
    core.refuse_all("the router stops")
    reader.cancel()
    counted = {
        sample.labels["path"]: sample.value
        for metric in core.metrics.requests.collect()
        for sample in metric.samples
        if sample.name.endswith("_total") and sample.value
    }
    assert counted == {"kept_local": 2, "aborted": 1, "failed": 2}
    assert core.tally.by_path == {"kept_local": 2}


@pytest.mark.parametrize(
    ("moved", "arrives", "way"),
    [(True, True, "kv"), (True, False, "recomputed"), (False, False, "recomputed")],
    ids=["kv", "does not arrive", "refused"],
)
async def test_a_move_counts_as_what_became_of_it(moved: bool, arrives: bool, way: str) -> None:
    """Workers of several ranks, for one, refuse it."""
    router, there = Router(), Link()
    router.hears(step(1.0, EngineCoreOutput(await router.leg_of("a"), [1])))
    receiver = router.connect(WorkerKey("decode-1", "i1"), there)
    move = leaves(router)
    assert ways_moved(router) == {"kv": 0, "recomputed": 0}
    answer = worker_pb2.MovedOut(leg_id=move.leg_id, moved=moved)
    # Once, however often it is said.
    for _ in range(2):
        router.core._on_messages(router.worker, [worker_pb2.FromEngine(moved=answer)])
    (leg,) = there.requests
    if moved:
        assert ways_moved(router) == {"kv": 0, "recomputed": 0}
        adopted = worker_pb2.Adopted(request_id=leg.request_id, handed_over=arrives)
        router.core._on_messages(receiver, [worker_pb2.FromEngine(adopted=adopted)])
    assert ways_moved(router) == {"kv": 0, "recomputed": 0} | {way: 1}


async def test_a_hand_off_that_is_given_up_after_it_came_is_counted_once() -> None:
    router = Router()
    leg_id = await router.leg_of("a")
    for handed_over in (True, False):
        adopted = worker_pb2.Adopted(request_id=leg_id, handed_over=handed_over, reason="no room")
        router.core._on_messages(router.worker, [worker_pb2.FromEngine(adopted=adopted)])
    tally = router.core.tally
    assert (tally.handoffs_completed, tally.handoffs_failed, len(tally.recent)) == (1, 0, 1)
    assert router.core.scheduler.lives["a"].path is Path.RECOMPUTED


async def test_what_leaves_and_has_to_wait_is_counted_too() -> None:
    router = Router()
    router.hears(step(1.0, EngineCoreOutput(await router.leg_of("a"), [1])))
    router.core.scheduler.view.workers[KEY].draining = True
    router.core.relieve(KEY, 0)
    assert router.core.scheduler.queued == 1
    assert ways_moved(router) == {"kv": 0, "recomputed": 1}


def leaves(router: Router) -> worker_pb2.MoveOut:
    """The first worker drains."""
    views = router.core.scheduler.view.workers
    for view in views.values():
        view.kv_bytes_per_token = 1
        view.rates.step.learn(1, 1000)
    views[KEY].draining = True
    router.core.relieve(KEY, 1)
    (move,) = router.link.moves
    return move


def ways_moved(router: Router) -> dict[str, float]:
    ways = router.core.metrics.moved
    return {each: ways.labels(each)._value.get() for each in ("kv", "recomputed")}


async def test_a_call_that_a_lost_worker_does_not_answer_is_answered_with_an_error_object() -> None:
    router = Router()
    app = FastAPI()
    init_exception_handler(app)
    app.state.args = SimpleNamespace(log_error_stack=False)

    @app.post("/reset_prefix_cache")
    async def reset() -> bool:
        return await router.core.reset_prefix_cache_async()

    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
        asking = asyncio.create_task(client.post("/reset_prefix_cache"))
        while not router.worker.calls:
            await asyncio.sleep(0)
        router.core.remove(KEY)
        answer = await asyncio.wait_for(asking, 60)
    error = answer.json()["error"]
    assert answer.status_code == error["code"] == 500
    assert error["message"] == "worker decode-0/i1 was lost before it answered"
