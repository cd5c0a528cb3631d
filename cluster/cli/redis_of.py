"""Where a command finds the cluster that it is about."""

from __future__ import annotations

import click

from cluster.config import BatonConfig
from cluster.run_file import running

REDIS_HELP = "the cluster's Redis, if the cluster was not started on this machine"


def redis_of(config: BatonConfig) -> str:
    """The URL that was given, or that of the `baton up` of this name on this machine.

    Raises:
        click.ClickException: there is neither.
    """
    run = running(config.name)
    redis_url = config.redis_url or (run.redis_url if run else None)
    if redis_url is None:
        raise click.ClickException(
            f"no cluster named {config.name!r} runs here; for one elsewhere, give --redis-url"
        )
    return redis_url
