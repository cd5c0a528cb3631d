"""The controller as a named Ray actor."""

from __future__ import annotations

from typing import Any

import ray

from cluster.controller import Controller
from cluster.controller_settings import ControllerSettings
from cluster.ray_calls import NAMESPACE, awaited


async def start_controller(
    settings: ControllerSettings, prefill: int, decode: int, keep: bool
) -> Any:
    """The cluster's controller, started if it does not run yet: there is one, whoever asks.

    keep: it and the workers outlive this process; `baton down` stops them.
    """
    actor = (
        ray.remote(Controller)
        .options(
            name=controller_name(settings.cluster),
            namespace=NAMESPACE,
            get_if_exists=True,
            lifetime="detached" if keep else None,
            num_cpus=0,
            max_concurrency=32,
        )
        .remote(settings.to_json())
    )
    await awaited(actor.start.remote(settings.to_json(), prefill, decode))
    return actor


def controller_runs(cluster: str) -> bool:
    try:
        ray.get_actor(controller_name(cluster), namespace=NAMESPACE)
    except ValueError:
        return False
    return True


def controller_name(cluster: str) -> str:
    return f"{cluster}/controller"
