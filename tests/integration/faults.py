"""A cluster to be hurt, with sixteen streams on it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from cluster.bench.link import End, make_ends, remove_ends, run_ip
from cluster.bench.report import BenchFailed
from cluster.wire import worker_pb2, worker_pb2_grpc
from tests.integration.staged_worker import COMPUTED, COMPUTING, QUEUED, SLOW, STAGE_FOLDER, told
from tests.integration.streams import STREAM_DEADLINE_S, Stream
from tests.integration.test_equal_to_plain_vllm import prompt_of
from tests.nursery import Nursery
from tests.processes import (
    Cluster,
    Process,
    free_port,
    metrics,
    start_redis,
    wait_until_serving,
)

STREAMS = 16
EARLY = range(8)
"""They decode when the others begin."""
EARLY_TOKENS, LATE_TOKENS = 90, 45
WORKERS = {
    "prefill-0": "prefill",
    "prefill-1": "prefill",
    "decode-2": "decode",
    "decode-3": "decode",
}
BEFORE_THE_FIRST_TOKEN = (QUEUED, COMPUTING, COMPUTED)
HELD_S = 15.0
"""For the survivors to let go of everything. It takes them 5 s; a busy machine has longer."""
HOLD_DEADLINE_S = 5.0
WAIT_S = 60.0
FEATURES: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0, "frequency_penalty": 1.2, "presence_penalty": 0.4},
    {"temperature": 2.0, "seed": 17},
    {"temperature": 0, "min_tokens": 20, "logprobs": 1},
]


def body(number: int) -> dict[str, Any]:
    return {
        "model": "m",
        # Each fourth takes more than one step.
        "prompt": prompt_of(40 + 7 * number + 200 * (number % 4 == 0), 70_000 + number),
        "max_tokens": EARLY_TOKENS if number in EARLY else LATE_TOKENS,
        "ignore_eos": True,
        **FEATURES[number % len(FEATURES)],
    }


@dataclass
class Faults:
    cluster: Cluster
    stages: Path
    redis: Process
    end: End | None
    """A network namespace, in which workers reach Redis and routers reach them."""
    why_no_end: str = ""
    undisturbed: list[list[int]] = field(default_factory=list)
    started: int = 0
    streams: int = 0

    @property
    def url(self) -> str:
        return self.cluster.url

    @property
    def workers(self) -> dict[str, Process]:
        return self.cluster.workers

    # --- streams ------------------------------------------------------------------------------

    def start_streams(self, url: str, numbers: Sequence[int], slowly: bool = False) -> list[Stream]:
        """`slowly`: until `go_on`, steps take their time."""
        if slowly:
            (self.stages / SLOW).touch()
        streams = []
        for number in numbers:
            self.streams += 1
            # What a prefix cache has is not handed over: nobody's knows it.
            salt = str(self.streams)
            stream = Stream(url, {**body(number), "cache_salt": salt}, number)
            stream.start()
            streams.append(stream)
        return streams

    @staticmethod
    def until_all_run(streams: Sequence[Stream], tokens: int = 2) -> None:
        until("all streams run", lambda: all(len(s.token_ids) >= tokens for s in streams))

    # --- stages -------------------------------------------------------------------------------

    def arm(self, stage: str, receiver: str = "") -> None:
        (self.stages / stage).write_text(receiver)

    def stopped_at(self, stage: str, streams: Sequence[Stream]) -> dict[str, str]:
        """Names of the two workers of the hand-off that has stopped there, by pool."""
        path = told(self.stages, stage)
        until(f"a worker is {stage}", path.exists)
        tells = json.loads(path.read_text())
        names = {str(process.pid): name for name, process in self.workers.items()}
        stream = next(s for s in streams if tells["transfer_id"].startswith(s.request_id))
        if stage in BEFORE_THE_FIRST_TOKEN:
            assert not stream.token_ids
        else:
            until("its first token is there", lambda: stream.token_ids)
        return {
            "prefill": names.get(tells["sender"], tells["sender"]),
            "decode": names.get(tells["receiver"], tells["receiver"]),
        }

    def go_on(self) -> None:
        """Whoever has stopped, or is slow."""
        for path in self.stages.iterdir():
            path.unlink()

    # --- Redis and the network ----------------------------------------------------------------

    def start_redis(self) -> None:
        """In the place of the one before, and empty."""
        addresses = (self.end.machine_address,) if self.end else ()
        port = int(self.cluster.redis_url.rsplit(":", 1)[1].split("/")[0])
        self.redis = start_redis(self.cluster.folder, port, *addresses)

    def start_in_namespace(self, name: str, pool: str) -> None:
        assert self.end is not None
        self.start(
            name,
            pool,
            launcher=self.end.command([]),
            host=self.end.address,
            redis_url=self.cluster.redis_url.replace("127.0.0.1", self.end.machine_address),
        )

    def cut_off(self, cut: bool) -> None:
        """What is sent into the namespace is lost, and nothing says so."""
        assert self.end is not None
        how = "down" if cut else "up"
        run_ip("-n", self.end.namespace, "link", "set", "machine", how)

    # --- workers ------------------------------------------------------------------------------

    def one_of(self, pool: str) -> str:
        return next(name for name in self.workers if name.startswith(pool))

    def replace(self, name: str) -> None:
        """By another one, which is there some seconds later."""
        lost = self.workers.pop(name)
        lost.popen.wait(WAIT_S)
        pool = name.split("-")[0]
        self.start(f"{pool}-{self.started}", pool, cpu_ids=settings_of(lost)["cpu_ids"])

    def start(self, name: str, pool: str, **settings: Any) -> None:
        cores = sorted(os.sched_getaffinity(0))
        cpu_ids = settings.pop("cpu_ids", [cores[self.started % len(cores)]])
        self.started += 1
        module = "tests.integration.staged_worker"
        self.cluster.start_worker(name, pool, cpu_ids, module, **settings)

    def all_there(self, pool: str = "") -> None:
        """Linked to the router."""
        wanted = Counter(name.split("-")[0] for name in self.workers)
        pools = [pool] if pool else list(wanted)

        def there() -> bool:
            found = metrics(self.url)
            return all(found[f'baton_workers{{pool="{p}"}}'] == wanted[p] for p in pools)

        until("all workers are linked", there)

    def times_out(self, process: Process) -> int:
        """How often the router has taken it out."""
        assert self.cluster.router is not None
        key = settings_of(process)["incarnation"]
        return self.cluster.router.output().count(f"/{key} is taken out")

    def until_taken_out(self, process: Process, before: int = 0) -> None:
        """`before`: how often it was until now."""
        until("it is taken out", lambda: self.times_out(process) > before)

    def until_nothing_is_held(self, without: str = "") -> None:
        until_s = time.monotonic() + HELD_S
        names = [name for name in self.workers if name != without and self.is_ready(name)]
        while held := {name: what for name in names if (what := self.holdings(name))}:
            assert time.monotonic() < until_s, f"still held: {held}"
            time.sleep(0.1)

    def is_ready(self, name: str) -> bool:
        return '{"address"' in self.workers[name].output()

    def holdings(self, name: str) -> dict[str, int]:
        """What a worker holds, without its connections."""
        lines = self.workers[name].output().splitlines()
        ready = next(line for line in lines if line.startswith('{"address"'))
        with grpc.insecure_channel(json.loads(ready)["address"]) as channel:
            stub = worker_pb2_grpc.WorkerStub(channel)  # type: ignore[no-untyped-call]
            try:
                held = stub.Hold(worker_pb2.HoldRequest(), timeout=HOLD_DEADLINE_S)
            except grpc.RpcError:
                return {"no answer": 1}
        fields = {field.name: getattr(held, field.name) for field, _ in held.ListFields()}
        return {name: value for name, value in fields.items() if name not in ("peers", "tasks")}


@contextlib.contextmanager
def running_faults(
    folder: Path, vllm_args: list[str], nursery: Nursery, transport: str
) -> Iterator[Faults]:
    stages = folder / "stages"
    stages.mkdir()
    port = free_port()
    namespace = uuid.uuid4().hex[:6]
    end, why_no_end = None, ""
    try:
        end, _ = make_ends(namespace)
    except BenchFailed as error:
        why_no_end = f"it needs root, to make network namespaces: {error}"
    addresses = (end.machine_address,) if end else ()
    redis = start_redis(folder, port, *addresses)
    cluster = Cluster(
        f"http://127.0.0.1:{free_port()}",
        f"redis://127.0.0.1:{port}/0",
        folder,
        vllm_args,
        environment={STAGE_FOLDER: str(stages)},
        # So that layers go while others are computed.
        handoff={"overlap": "always", "transport": transport},
        # It is the router or a broken stream that tells a decode worker not to wait.
        router_settings={"adopt_deadline_s": 2 * STREAM_DEADLINE_S},
        spawn=nursery.spawn,
    )
    faults = Faults(cluster, stages, redis, end, why_no_end)
    try:
        for name, pool in WORKERS.items():
            faults.start(name, pool)
        cluster.start_router()
        wait_until_serving(cluster.url, *cluster.processes())
        faults.all_there()
        streams = faults.start_streams(cluster.url, range(STREAMS))
        for stream in streams:
            stream.join(STREAM_DEADLINE_S)
            assert not stream.problem, stream.problem
        faults.undisturbed = [stream.token_ids for stream in streams]
        yield faults
    finally:
        for process in cluster.processes():
            process.stop(signal.SIGKILL)
        faults.redis.stop()
        remove_ends(namespace)


def expect_undisturbed(streams: Sequence[Stream], undisturbed: Sequence[Sequence[int]]) -> None:
    for stream in streams:
        stream.join(STREAM_DEADLINE_S)
    problems = [f"{s.number}: {s.problem}" for s in streams if s.problem]
    assert not problems
    assert [s.token_ids for s in streams] == [undisturbed[s.number] for s in streams]


def settings_of(process: Process) -> Any:
    arguments = process.popen.args
    assert isinstance(arguments, list)
    return json.loads(arguments[-1])


def until(what: str, condition: Callable[[], Any]) -> None:
    end_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end_s, f"not within {WAIT_S:g} s: {what}"
        time.sleep(0.01)
