"""How a router's process is started."""

from __future__ import annotations

import json
import os
import sys

from cluster.config import OPERATOR_TOKEN, ROUTER_SETTINGS, BatonConfig
from cluster.vllm_args import flag_value, vllm_args

ROUTER_COMMAND = (sys.executable, "-m", "router")


def router_settings(config: BatonConfig, redis_url: str, router_id: str, port: int) -> str:
    settings = {
        "router_id": router_id,
        "cluster": config.name,
        "redis_url": redis_url,
        "host": config.host,
        "port": port,
        "url": router_url(config, port),
        "vllm_args": vllm_args(config),
        "lease_s": config.lease_s,
        "policy": config.policy,
        "local_prompt_tokens": config.local_prompt_tokens,
        "queue_threshold_tokens": config.queue_threshold_tokens,
        "hand_over": config.handoff.when,
        "queue_deadline_s": config.queue_deadline_s,
        "queue_max": config.queue_max,
        "worker_requests_max": config.worker_requests_max,
        "slo_classes": {name: slo.seconds() for name, slo in config.slo_classes.items()},
        "api_key_classes": config.api_key_classes,
        "adopt_deadline_s": config.handoff.adopt_deadline_s,
    }
    return json.dumps(settings)


def router_environment(
    config: BatonConfig, redis_url: str, router_id: str, port: int
) -> dict[str, str]:
    """A router's arguments could be read by anyone on the machine, its environment cannot."""
    token = {OPERATOR_TOKEN: config.operator_token} if config.operator_token else {}
    settings = router_settings(config, redis_url, router_id, port)
    return {**os.environ, **token, ROUTER_SETTINGS: settings}


def router_url(config: BatonConfig, port: int) -> str:
    """Where this machine reaches a router that listens on `port`."""
    host = config.host
    if host in ("", "0.0.0.0", "::"):
        host = "127.0.0.1"
    scheme = "https" if flag_value(vllm_args(config), "--ssl-certfile") else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
