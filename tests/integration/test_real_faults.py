"""Workers, routers and Redis that die, freeze or are cut off under sixteen running streams: none
fails but those of a router that was killed, each gets what it would have got undisturbed, and the
workers that are left hold nothing afterwards.

Where in a hand-off a fault strikes is no matter of luck: see staged_worker.py.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.integration.faults import (
    EARLY,
    STREAMS,
    Faults,
    expect_undisturbed,
    running_faults,
    until,
)
from tests.integration.staged_worker import ADOPTING, COMPUTED, COMPUTING, QUEUED, SENDING
from tests.integration.streams import STREAM_DEADLINE_S
from tests.nursery import Nursery
from tests.processes import metrics, total, wait_for_workers, wait_until_serving

DECODING = "decoding"
PHASES = [QUEUED, COMPUTING, COMPUTED, SENDING, ADOPTING, DECODING]
STRIKES = [
    # So ordered that who was killed is replaced while another one freezes.
    (signal.SIGKILL, "prefill"),
    (signal.SIGSTOP, "decode"),
    (signal.SIGKILL, "decode"),
    (signal.SIGSTOP, "prefill"),
]
STRIKES_NAMES = [f"{signum.name} {victim}" for signum, victim in STRIKES]
RESUMED, RECOMPUTED = "baton_requests_resumed_total", "baton_handoffs_failed_total"
HANDED_OVER = "baton_handoffs_completed_total"
OTHERS = "baton_requests_of_other_routers"
CONNECTION_BROKE = ("RemoteProtocolError", "ReadError")
EFFECTS = {
    (QUEUED, "prefill"): RESUMED,
    (QUEUED, "decode"): RESUMED,
    (COMPUTING, "prefill"): RESUMED,
    (COMPUTING, "decode"): RESUMED,
    (COMPUTED, "prefill"): RESUMED,
    (COMPUTED, "decode"): RESUMED,
    (SENDING, "prefill"): RECOMPUTED,
    (SENDING, "decode"): RESUMED,
    (ADOPTING, "decode"): RESUMED,
    (DECODING, "decode"): RESUMED,
}
"""What a router counts when the worker's loss is felt. By the other phases a prefill worker owes
nothing to the request that was handed over."""


@pytest.fixture(scope="module")
def faults(
    tmp_path_factory: pytest.TempPathFactory, vllm_args: list[str], nursery: Nursery
) -> Iterator[Faults]:
    with running_faults(tmp_path_factory.mktemp("faults"), vllm_args, nursery, "grpc") as running:
        yield running


@pytest.fixture(scope="module", params=["collective", "nixl"])
def group_faults(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    vllm_args: list[str],
    nursery: Nursery,
) -> Iterator[Faults]:
    folder = tmp_path_factory.mktemp("faults")
    with running_faults(folder, vllm_args, nursery, request.param) as running:
        yield running


@pytest.mark.parametrize(("signum", "victim"), STRIKES, ids=STRIKES_NAMES)
@pytest.mark.parametrize("phase", PHASES)
def test_streams_survive_a_worker(
    faults: Faults, phase: str, signum: signal.Signals, victim: str
) -> None:
    streams_survive(faults, phase, signum, victim)


@pytest.mark.parametrize(("signum", "victim"), STRIKES, ids=STRIKES_NAMES)
@pytest.mark.parametrize(
    "phase",
    [pytest.param(phase, marks=() if phase == SENDING else pytest.mark.slow) for phase in PHASES],
)
def test_streams_survive_a_worker_of_a_group(
    group_faults: Faults, phase: str, signum: signal.Signals, victim: str
) -> None:
    streams_survive(group_faults, phase, signum, victim)


def streams_survive(faults: Faults, phase: str, signum: signal.Signals, victim: str) -> None:
    faults.all_there(victim)
    before = metrics(faults.url)
    streams = faults.start_streams(faults.url, EARLY, slowly=True)
    faults.until_all_run(streams)
    if phase != DECODING:
        faults.arm(phase)
    streams += faults.start_streams(faults.url, range(len(EARLY), STREAMS))
    if phase == DECODING:
        faults.until_all_run(streams)
        name = faults.one_of(victim)
    else:
        name = faults.stopped_at(phase, streams)[victim]
    assert all(stream.is_alive() for stream in streams)
    lost = faults.workers[name]
    times_out = faults.times_out(lost)
    lost.popen.send_signal(signum)
    try:
        if signum == signal.SIGKILL:
            faults.replace(name)
        faults.until_taken_out(lost, times_out)
        faults.go_on()
        expect_undisturbed(streams, faults.undisturbed)
        after = metrics(faults.url)
        if effect := EFFECTS.get((phase, victim)):
            assert total(after, effect) > total(before, effect)
        faults.until_nothing_is_held(without=name)
    finally:
        faults.go_on()
        lost.popen.send_signal(signal.SIGCONT)
    if signum == signal.SIGSTOP:
        faults.all_there(victim)
        # What it goes on with has no effect, and ends.
        faults.until_nothing_is_held()


def test_streams_survive_the_loss_of_redis(faults: Faults) -> None:
    """Killed, and while it is gone a worker, too; then an empty one takes its place."""
    faults.all_there()
    streams = faults.start_streams(faults.url, range(STREAMS), slowly=True)
    faults.until_all_run(streams)
    faults.redis.stop(signal.SIGKILL)
    until("the router misses it", lambda: not state(faults.url)["redis_reachable"])
    name = faults.one_of("decode")
    lost = faults.workers[name]
    lost.popen.kill()
    faults.replace(name)
    faults.until_taken_out(lost)
    faults.go_on()
    expect_undisturbed(streams, faults.undisturbed)
    faults.until_nothing_is_held()

    before = metrics(faults.url)
    streams = faults.start_streams(faults.url, range(STREAMS), slowly=True)
    faults.until_all_run(streams)
    assert metrics(faults.url)[HANDED_OVER] >= before[HANDED_OVER] + STREAMS - 1
    faults.start_redis()
    until("the router is back at it", lambda: state(faults.url)["redis_reachable"])
    # Members write themselves in again.
    faults.all_there()
    faults.go_on()
    expect_undisturbed(streams, faults.undisturbed)
    faults.until_nothing_is_held()


def test_a_killed_router_takes_only_its_own_connections(faults: Faults) -> None:
    url, router = faults.cluster.start_another_router()
    wait_until_serving(url, router)
    faults.all_there()
    wait_for_workers(faults.cluster, len(faults.workers), url)
    ours = faults.start_streams(faults.url, range(0, STREAMS, 2), slowly=True)
    theirs = faults.start_streams(url, range(1, STREAMS, 2))
    faults.until_all_run([*ours, *theirs])
    until("what it placed is known", lambda: metrics(faults.url)[OTHERS] == len(theirs))
    assert all(stream.is_alive() for stream in [*ours, *theirs])
    router.popen.kill()
    for stream in theirs:
        stream.join(STREAM_DEADLINE_S)
        # What it got is right, as far as it goes.
        assert stream.problem.startswith(CONNECTION_BROKE)
        assert stream.token_ids == faults.undisturbed[stream.number][: len(stream.token_ids)]
    faults.go_on()
    expect_undisturbed(ours, faults.undisturbed)
    faults.until_nothing_is_held()
    until("what it placed is forgotten", lambda: metrics(faults.url)[OTHERS] == 0)


@pytest.mark.netns
def test_streams_survive_a_worker_that_is_cut_off(faults: Faults) -> None:
    """While some of them run on it, and half of another one's KV has come."""
    if faults.end is None:
        pytest.skip(faults.why_no_end)
    name = "decode-far"
    faults.start_in_namespace(name, "decode")
    faults.all_there()
    before = metrics(faults.url)
    streams = faults.start_streams(faults.url, EARLY, slowly=True)
    faults.until_all_run(streams)
    faults.arm(SENDING, receiver=name)
    streams += faults.start_streams(faults.url, range(len(EARLY), STREAMS))
    assert faults.stopped_at(SENDING, streams)["decode"] == name
    assert all(stream.is_alive() for stream in streams)
    assert faults.holdings(name)["running"]
    faults.cut_off(True)
    try:
        faults.until_taken_out(faults.workers[name])
        faults.go_on()
        expect_undisturbed(streams, faults.undisturbed)
        faults.until_nothing_is_held(without=name)
        assert metrics(faults.url)[RESUMED] > before[RESUMED]
    finally:
        faults.cut_off(False)
    faults.all_there()
    faults.until_nothing_is_held()


def state(url: str) -> Any:
    return httpx.get(f"{url}/dashboard/state").json()
