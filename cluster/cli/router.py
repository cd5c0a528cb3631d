"""`baton router`."""

from __future__ import annotations

import os
import secrets
from typing import Any

import click

from cluster.cli.options import config_options
from cluster.cli.redis_of import redis_of
from cluster.cli.up import config_given
from cluster.router_process import ROUTER_COMMAND, router_environment


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[MODEL] [VLLM FLAGS]...")
@config_options()
def router(arguments: tuple[str, ...], **flags: Any) -> None:
    """Run one more router over the workers of a running cluster, until Ctrl-C.

    It finds the cluster by --name on this machine, or by --redis-url. MODEL and the flags must be
    those that `baton up` was given; the port must be another one.
    """
    config = config_given(arguments, flags)
    redis_url = redis_of(config)
    router_id = f"router-{secrets.token_hex(4)}"
    environment = router_environment(config, redis_url, router_id, config.port)
    os.execve(ROUTER_COMMAND[0], ROUTER_COMMAND, environment)
