"""Other routers over the same workers: each tells in Redis what it has placed, so that a policy
sees all there is on a worker and not only this router's part of it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping

from cluster.membership import REDIS_ERRORS, Membership
from cluster.scheduler.scheduler import Scheduler
from cluster.scheduler.view import NOTHING, PlacedLoad, WorkerKey
from router.background import repeat

EXCHANGE_EVERY_S = 0.1
LOOK_FOR_ROUTERS_EVERY_S = 0.5


class Peers:
    """Exchanges loads while there are other routers. With Redis out of reach, what they said last
    holds for one lease, as it does when one of them dies."""

    def __init__(
        self,
        membership: Membership,
        scheduler: Scheduler,
        router_id: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._membership = membership
        self._scheduler = scheduler
        self._router_id = router_id
        self._clock = clock
        self.router_ids: list[str] = []
        """The others."""
        self._looked_at_s = self._heard_at_s = self._told_at_s = float("-inf")
        self._told: Mapping[WorkerKey, PlacedLoad] = {}

    async def run(self) -> None:
        await repeat(self._turn, EXCHANGE_EVERY_S)

    async def _turn(self) -> None:
        try:
            await self._exchange()
        except REDIS_ERRORS:
            # The member watcher says so.
            if self._clock() - self._heard_at_s > self._membership.lease_s:
                self._scheduler.on_others({})

    async def _exchange(self) -> None:
        now_s = self._clock()
        if now_s - self._looked_at_s >= LOOK_FOR_ROUTERS_EVERY_S:
            found = [record.router_id for record in await self._membership.routers()]
            self.router_ids = sorted(set(found) - {self._router_id})
            self._looked_at_s = now_s
        if not self.router_ids:
            self._scheduler.on_others({})
            return
        own = self._scheduler.own_load()
        due = own != self._told or now_s - self._told_at_s > self._membership.lease_s / 3
        told = await self._membership.exchange_loads(
            self._router_id, to_json(own) if due else None, self.router_ids
        )
        if due:
            self._told, self._told_at_s = own, now_s
        self._heard_at_s = self._clock()
        self._scheduler.on_others(together([from_json(text) for text in told if text is not None]))


def to_json(placed: Mapping[WorkerKey, PlacedLoad]) -> str:
    rows = [[*key, *load] for key, load in placed.items()]
    return json.dumps({"fields": PlacedLoad._fields, "placed": rows})


def from_json(text: str | bytes) -> dict[WorkerKey, PlacedLoad]:
    told = json.loads(text)
    if told["fields"] != list(PlacedLoad._fields):
        # By another version of Baton, while routers are replaced one by one.
        return {}
    return {WorkerKey(*row[:2]): PlacedLoad(*row[2:]) for row in told["placed"]}


def together(loads: list[dict[WorkerKey, PlacedLoad]]) -> dict[WorkerKey, PlacedLoad]:
    total: dict[WorkerKey, PlacedLoad] = {}
    for placed in loads:
        for key, load in placed.items():
            total[key] = total.get(key, NOTHING).plus(load)
    return total
