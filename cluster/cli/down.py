"""`baton down`."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import Any

import click

from cluster.cli.options import config_options, flags_given
from cluster.config import load_config
from cluster.run_file import run_file_path, running

STOP_DEADLINE_S = 60.0


@click.command()
@config_options(
    "name",
    "ray_address",
    ray_address="Ray cluster in which `baton up --keep-workers` left workers that are to stop, too",
)
def down(**flags: Any) -> None:
    """Stop the cluster of this name.

    It waits until nothing of it is left.
    """
    config = load_config(flags_given(flags))
    run = running(config.name)
    if run is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(run.pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_DEADLINE_S
        while run_file_path(config.name).exists():
            if time.monotonic() > deadline:
                raise click.ClickException(
                    f"pid {run.pid} still runs {STOP_DEADLINE_S:g} s after it was asked to stop"
                )
            time.sleep(0.1)
    stopped = _stop_kept_workers(config.name, config.ray_address)
    if run is None and not stopped:
        hint = "" if config.ray_address else "; to stop kept workers, give --ray-address"
        raise click.ClickException(f"no cluster named {config.name!r} runs here{hint}")
    click.echo(f"{config.name} is stopped")


def _stop_kept_workers(name: str, ray_address: str | None) -> bool:
    """Workers that `baton up --keep-workers` left in a Ray cluster."""
    if ray_address is None:
        return False
    import ray

    from cluster.controller_actor import controller_name
    from cluster.ray_calls import NAMESPACE

    ray.init(address=ray_address, namespace=NAMESPACE, logging_level="ERROR", log_to_driver=False)
    try:
        controller = ray.get_actor(controller_name(name), namespace=NAMESPACE)
    except ValueError:
        return False
    ray.get(controller.stop.remote(), timeout=STOP_DEADLINE_S)
    ray.kill(controller)
    return True
