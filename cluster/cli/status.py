"""`baton status`."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from cluster.cli.options import config_options, flags_given
from cluster.cli.redis_of import REDIS_HELP, redis_of
from cluster.config import load_config
from cluster.errors import one_line, without_password
from cluster.membership import (
    REDIS_ERRORS,
    DesiredPools,
    Membership,
    RouterRecord,
    WorkerRecord,
    open_redis,
)


@dataclasses.dataclass(frozen=True, slots=True)
class Status:
    cluster: str
    desired: DesiredPools | None
    workers: list[WorkerRecord]
    routers: list[RouterRecord]


@click.command()
@click.option("--json", "as_json", is_flag=True, help="print one JSON object")
@config_options("name", "redis_url", redis_url=REDIS_HELP)
def status(as_json: bool, **flags: Any) -> None:
    """Show the cluster's workers and routers. Exit code 1 when there is none."""
    config = load_config(flags_given(flags))
    redis_url = redis_of(config)
    try:
        found = asyncio.run(_read(config.name, redis_url, config.lease_s))
    except REDIS_ERRORS as error:
        raise click.ClickException(
            f"Redis at {without_password(redis_url)}: {one_line(error)}"
        ) from error
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(found), indent=2))
    else:
        _show(found)
    if not found.workers and not found.routers:
        raise click.exceptions.Exit(1)


async def _read(name: str, redis_url: str, lease_s: float) -> Status:
    client = open_redis(redis_url)
    membership = Membership(client, name, lease_s)
    try:
        return Status(
            name,
            await membership.desired(),
            await membership.workers(),
            await membership.routers(),
        )
    finally:
        await client.aclose()


def _show(found: Status) -> None:
    console = Console(highlight=False)
    for router in found.routers:
        linked = f"{router.workers} worker{'s' if router.workers != 1 else ''}"
        console.print(f"{router.router_id} at {router.url} (pid {router.pid}), {linked}")
    table = Table(box=None, pad_edge=False)
    for column in ("worker", "pool", "state", "accelerator", "address", "placed because"):
        table.add_column(column, overflow="fold")
    for worker in found.workers:
        table.add_row(
            worker.worker_id,
            worker.pool.value,
            worker.state.value,
            worker.accelerator,
            worker.address,
            worker.detail or worker.placement_reason,
        )
    console.print(table if found.workers else "no workers")
    for why in dict.fromkeys(why for router in found.routers for why in router.unjoined):
        console.print(f"no hand-offs: {why}", markup=False, soft_wrap=True)
    if found.desired:
        console.print(f"wanted: {found.desired.prefill} prefill, {found.desired.decode} decode")
