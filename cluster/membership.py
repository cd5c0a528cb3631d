"""Who is a member, and what is wanted: the little that must be shared and outlive a process, in
Redis. Losing Redis stops changes, not traffic: readers keep what they read last."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import enum
import json
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Protocol, TypeVar

import redis.asyncio
import redis.exceptions
from redis.asyncio.client import Pipeline

from cluster.scheduler.view import Pool

logger = logging.getLogger(__name__)

STOPPED, DRAINED = "it was stopped", "it was drained"
"""Why a worker ended, where nothing was wrong."""
REDIS_DEADLINE_S = 2.0
BETWEEN_STARTS_S = 0.001
REDIS_ERRORS = (redis.exceptions.RedisError, OSError, TimeoutError)


class Record(Protocol):
    """A dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


R = TypeVar("R", bound=Record)
T = TypeVar("T")
Text = str | bytes


class WorkerState(enum.StrEnum):
    PLACING = "placing"
    STARTING = "starting"
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class WorkerRecord:
    worker_id: str
    incarnation: str
    pool: Pool
    state: WorkerState
    address: str = ""
    accelerator: str = ""
    node: str = ""
    pid: int = 0
    started_unix_s: float = 0.0
    """Later than the start before, whatever clocks say: see `Membership.start_time`."""
    placement_reason: str = ""
    detail: str = ""
    """Why it failed, for people."""
    drain_until_unix_s: float = 0.0
    """While it drains: when the requests left on it go on elsewhere."""

    def is_superseded_by(self, other: WorkerRecord) -> bool:
        """It was taken for dead, and a later start of the worker has its place."""
        return self.incarnation != other.incarnation and self.started_unix_s < other.started_unix_s

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: Text) -> WorkerRecord:
        record = from_json(WorkerRecord, text)
        return dataclasses.replace(record, pool=Pool(record.pool), state=WorkerState(record.state))


@dataclass(frozen=True, slots=True)
class DrainRequest:
    """Meant for one start of a worker: the next one is not to drain."""

    incarnation: str
    until_unix_s: float


@dataclass(frozen=True, slots=True)
class RouterRecord:
    router_id: str
    url: str
    pid: int
    workers: int = 0
    """That it is linked to."""
    unjoined: list[str] = field(default_factory=list)
    """Why some of them have no part in hand-offs."""


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """A LoRA adapter that was loaded or unloaded while routers ran."""

    name: str
    path: str = ""
    """Empty: it was unloaded."""
    number: int = 1
    """Of its changes; the last one holds."""
    base_model_name: str | None = None
    load_inplace: bool = False
    is_3d_lora_weight: bool = False


@dataclass(frozen=True, slots=True)
class DesiredPools:
    prefill: int
    decode: int


def from_json(kind: type[R], text: Text) -> R:
    """Without fields of a newer version of Baton: processes are upgraded one by one."""
    known = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in json.loads(text).items() if name in known})


def open_redis(url: str) -> redis.asyncio.Redis:
    client: redis.asyncio.Redis = redis.asyncio.from_url(
        url, socket_timeout=REDIS_DEADLINE_S, socket_connect_timeout=REDIS_DEADLINE_S
    )
    return client


class Membership:
    """Every call is bounded by REDIS_DEADLINE_S and raises one of REDIS_ERRORS on failure."""

    def __init__(self, client: redis.asyncio.Redis, cluster: str, lease_s: float) -> None:
        self._redis = client
        self._prefix = f"baton:{cluster}"
        self.lease_s = lease_s
        self._unreadable: set[str] = set()

    async def put_worker(self, record: WorkerRecord) -> bool:
        """Write a worker's record; it vanishes when not written again within the lease. False, and
        nothing is written, where a later start of the worker has its place."""
        key = f"{self._prefix}:worker:{record.worker_id}"

        async def write(pipe: Pipeline) -> bool:
            held = await pipe.get(key)
            other = self._read(key, held, WorkerRecord.from_json)
            if other is not None and record.is_superseded_by(other):
                return False
            pipe.multi()  # type: ignore[no-untyped-call]
            pipe.set(key, record.to_json(), px=int(self.lease_s * 1000))
            return True

        return bool(await self._redis.transaction(write, key, value_from_callable=True))

    async def remove_worker(self, worker_id: str, incarnation: str) -> None:
        """Not another start's record."""
        key = f"{self._prefix}:worker:{worker_id}"

        async def remove(pipe: Pipeline) -> None:
            held = await pipe.get(key)
            record = self._read(key, held, WorkerRecord.from_json)
            if record is not None and record.incarnation == incarnation:
                pipe.multi()  # type: ignore[no-untyped-call]
                pipe.delete(key)

        await self._redis.transaction(remove, key)

    async def workers(self) -> list[WorkerRecord]:
        records = await self._records(f"{self._prefix}:worker:*", WorkerRecord.from_json)
        return sorted(records, key=lambda record: record.worker_id)

    async def run_id(self) -> str:
        """New at each start of Redis. Empty where Redis does not tell."""
        try:
            return str((await self._redis.info("server")).get("run_id", ""))
        except redis.exceptions.ResponseError:
            return ""

    async def ask_drain(self, worker_id: str, request: DrainRequest, keep_s: float) -> None:
        await self._redis.set(
            f"{self._prefix}:drain:{worker_id}",
            json.dumps(dataclasses.asdict(request)),
            px=int(keep_s * 1000),
        )

    async def drain_asked(self, worker_id: str) -> DrainRequest | None:
        key = f"{self._prefix}:drain:{worker_id}"
        return self._read(key, await self._redis.get(key), partial(from_json, DrainRequest))

    async def put_router(self, record: RouterRecord) -> None:
        key = f"{self._prefix}:router:{record.router_id}"
        await self._redis.set(
            key, json.dumps(dataclasses.asdict(record)), px=int(self.lease_s * 1000)
        )

    async def remove_router(self, router_id: str) -> None:
        await self._redis.delete(f"{self._prefix}:router:{router_id}")

    async def routers(self) -> list[RouterRecord]:
        return await self._records(f"{self._prefix}:router:*", partial(from_json, RouterRecord))

    async def exchange_loads(
        self, router_id: str, own: str | None, others: Sequence[str]
    ) -> list[str | bytes | None]:
        """Write what this router placed, unless it is None, and read what the others did."""
        pipeline = self._redis.pipeline(transaction=False)
        if own is not None:
            pipeline.set(f"{self._prefix}:load:{router_id}", own, px=int(self.lease_s * 1000))
        if others:
            pipeline.mget([f"{self._prefix}:load:{other}" for other in others])
        replies = await pipeline.execute()
        return replies[-1] if others else []

    async def change_adapter(self, record: AdapterRecord) -> AdapterRecord:
        """Write a change as the last one so far. Returns it with its number."""

        def latest(held: AdapterRecord | None) -> AdapterRecord:
            if held is None or held.number < record.number:
                return record
            return dataclasses.replace(record, number=held.number + 1)

        return await self._put_adapter(record.name, latest)

    async def restore_adapter(self, record: AdapterRecord) -> None:
        """Write a change again, unless there has been a later one."""

        def later(held: AdapterRecord | None) -> AdapterRecord:
            return record if held is None or held.number < record.number else held

        await self._put_adapter(record.name, later)

    async def adapters(self) -> dict[str, AdapterRecord]:
        """The last change of each, by name."""
        key = f"{self._prefix}:adapters"
        read = partial(from_json, AdapterRecord)
        texts = await self._redis.hgetall(key)
        records = (self._read(f"{key}:{name!r}", text, read) for name, text in texts.items())
        return {record.name: record for record in records if record is not None}

    async def _put_adapter(
        self, name: str, decide: Callable[[AdapterRecord | None], AdapterRecord]
    ) -> AdapterRecord:
        key = f"{self._prefix}:adapters"

        async def put(pipe: Pipeline) -> AdapterRecord:
            text = await pipe.hget(key, name)
            record = decide(self._read(key, text, partial(from_json, AdapterRecord)))
            pipe.multi()  # type: ignore[no-untyped-call]
            pipe.hset(key, name, json.dumps(dataclasses.asdict(record)))
            return record

        put_record: AdapterRecord = await self._redis.transaction(
            put, key, value_from_callable=True
        )
        return put_record

    async def set_desired(self, desired: DesiredPools) -> None:
        await self._redis.set(f"{self._prefix}:desired", json.dumps(dataclasses.asdict(desired)))

    async def start_time(self, now_unix_s: float) -> float:
        """A time for workers to start at: this one, or else one that is later than all before, also
        where the clock was set back or is another machine's."""
        key = f"{self._prefix}:started"

        async def put(pipe: Pipeline) -> float:
            before = float(await pipe.get(key) or 0.0)
            started = max(now_unix_s, before + BETWEEN_STARTS_S)
            pipe.multi()  # type: ignore[no-untyped-call]
            pipe.set(key, repr(started))
            return started

        return float(await self._redis.transaction(put, key, value_from_callable=True))

    async def desired(self) -> DesiredPools | None:
        key = f"{self._prefix}:desired"
        return self._read(key, await self._redis.get(key), partial(from_json, DesiredPools))

    async def _records(self, pattern: str, read: Callable[[Text], T]) -> list[T]:
        keys = [key async for key in self._redis.scan_iter(match=pattern, count=500)]
        texts = await self._redis.mget(keys) if keys else []
        records = (self._read(repr(key), text, read) for key, text in zip(keys, texts, strict=True))
        return [record for record in records if record is not None]

    def _read(self, key: str, text: Text | None, read: Callable[[Text], T]) -> T | None:
        """None where there is none, as when a lease has run out between two reads; and where it
        cannot be read, which is said once."""
        if text is None:
            return None
        try:
            return read(text)
        except (TypeError, ValueError, AttributeError) as error:
            if key not in self._unreadable:
                logger.warning("what Redis has as %s is left out: %s", key, error)
                self._unreadable.add(key)
            return None


async def keep_lease(
    write: Callable[[], Awaitable[None]], lease_s: float, changed: asyncio.Event
) -> None:
    """Write a record thrice a lease, and at once when `changed` is set; soon again if that failed,
    so that a lease does not run out over a short trouble. Runs until cancelled."""
    reachable = True
    while True:
        changed.clear()
        pause_s = lease_s / 3
        try:
            async with asyncio.timeout(lease_s / 3):
                await write()
            if not reachable:
                logger.info("Redis is back")
            reachable = True
        except REDIS_ERRORS as error:
            if reachable:
                logger.warning("Redis is out of reach, going on without: %s", error)
            reachable = False
            pause_s = lease_s / 12
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(changed.wait(), pause_s)
