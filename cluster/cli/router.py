"""`baton router`."""

from __future__ import annotations

import os
import secrets
from typing import Any

import click

from cluster.cli.options import config_options
from cluster.cli.redis_of import REDIS_HELP, redis_of
from cluster.cli.up import config_given
from cluster.router_process import ROUTER_COMMAND, router_environment

OWN = {
    ("model",),
    ("name",),
    ("host",),
    ("port",),
    ("redis_url",),
    ("policy",),
    ("local_prompt_tokens",),
    ("queue_threshold_tokens",),
    ("queue_deadline_s",),
    ("queue_max",),
    ("worker_requests_max",),
    ("slo_classes",),
    ("api_key_classes",),
    ("lease_s",),
    ("operator_token",),
    ("handoff", "adopt_deadline_s"),
    ("handoff", "when"),
}
"""What of the configuration a router goes by."""


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[MODEL] [VLLM FLAGS]...")
@config_options(shown=OWN, redis_url=REDIS_HELP)
def router(arguments: tuple[str, ...], **flags: Any) -> None:
    """Run one more router over the same workers.

    It finds the cluster by --name on this machine, or by --redis-url, and runs until Ctrl-C. MODEL
    and the flags must be those that `baton up` was given; the port must be another one. Flags of
    `baton up` that are not listed here are not a router's: they may be given, and do nothing.
    """
    config = config_given(arguments, flags)
    redis_url = redis_of(config)
    router_id = f"router-{secrets.token_hex(4)}"
    environment = router_environment(config, redis_url, router_id, config.port)
    os.execve(ROUTER_COMMAND[0], ROUTER_COMMAND, environment)
