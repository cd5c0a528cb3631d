"""`baton drain`."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from typing import Any

import click

from cluster.cli.options import config_options, flags_given
from cluster.cli.redis_of import REDIS_HELP, redis_of
from cluster.config import BatonConfig, load_config
from cluster.draining import GONE_WITHIN_S, NoSuchWorker, NotReady, ask_to_drain
from cluster.errors import one_line, without_password
from cluster.membership import REDIS_ERRORS, Membership, open_redis

POLL_S = 0.25


class Seconds(click.ParamType[float]):
    name = "seconds"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        with contextlib.suppress(ValueError):
            seconds = float(str(value).removesuffix("s"))
            if 0 <= seconds < math.inf:
                return seconds
        self.fail(f"{value!r} is not a number of seconds, such as 30 or 30s", param, ctx)


@click.command()
@click.argument("worker")
@click.option(
    "--deadline",
    type=Seconds(),
    default=30.0,
    metavar="SECONDS",
    help="time for running requests to end; then they go on elsewhere  [30]",
)
@config_options("name", "redis_url", redis_url=REDIS_HELP)
def drain(worker: str, deadline: float, **flags: Any) -> None:
    """Take WORKER out without losing a request, and start it anew.

    It gets no new requests. Those running there end, or go on elsewhere: with their KV shortly
    before the deadline if that is cheaper than to compute it again, else at the deadline. The
    controller then starts the worker again, elsewhere if its node is gone.
    """
    config = load_config(flags_given(flags))
    redis_url = redis_of(config)
    try:
        asyncio.run(_drain(config, redis_url, worker, deadline))
    except REDIS_ERRORS as error:
        raise click.ClickException(
            f"Redis at {without_password(redis_url)}: {one_line(error)}"
        ) from error


async def _drain(config: BatonConfig, redis_url: str, worker: str, deadline_s: float) -> None:
    client = open_redis(redis_url)
    membership = Membership(client, config.name, config.lease_s)
    try:
        try:
            record = await ask_to_drain(membership, worker, deadline_s)
        except (NoSuchWorker, NotReady) as error:
            raise click.ClickException(str(error)) from error
        click.echo(f"{worker} drains, {deadline_s:g} s at most")
        give_up_s = time.monotonic() + deadline_s + GONE_WITHIN_S
        while any(r.incarnation == record.incarnation for r in await membership.workers()):
            if time.monotonic() > give_up_s:
                raise click.ClickException(
                    f"{worker} still runs {GONE_WITHIN_S:g} s after its deadline"
                )
            await asyncio.sleep(POLL_S)
        click.echo(f"{worker} is drained")
    finally:
        await client.aclose()
