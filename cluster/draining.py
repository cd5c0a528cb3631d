"""Asking a worker to drain: by `baton drain`, or by a notice that it will be ended."""

from __future__ import annotations

import time

from cluster.membership import DrainRequest, Membership, WorkerRecord, WorkerState

GONE_WITHIN_S = 30.0
"""After the deadline, for the worker to end."""


class NoSuchWorker(Exception):
    """The message lists those there are."""


class NotReady(Exception):
    """It cannot drain: it does not serve, or drains already."""


async def ask_to_drain(membership: Membership, worker_id: str, deadline_s: float) -> WorkerRecord:
    """The worker, as it was.

    Raises:
        NoSuchWorker, NotReady, and one of REDIS_ERRORS.
    """
    records = {record.worker_id: record for record in await membership.workers()}
    record = records.get(worker_id)
    if record is None:
        known = ", ".join(records) or "none"
        raise NoSuchWorker(f"no worker named {worker_id!r}; there are: {known}")
    if record.state is not WorkerState.READY:
        raise NotReady(f"{worker_id} is {record.state}, not ready")
    request = DrainRequest(record.incarnation, time.time() + deadline_s)
    await membership.ask_drain(worker_id, request, deadline_s + GONE_WITHIN_S)
    return record
