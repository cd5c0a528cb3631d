"""The ways for payloads that a worker has beside gRPC, by its configuration."""

from __future__ import annotations

import logging

import torch

from workers.kv import collective, nixl
from workers.kv.collective import Collective
from workers.kv.group import Transport
from workers.kv.nixl import Nixl
from workers.kv.nixl_agent import NoNixl
from workers.kv.sender import AUTO

logger = logging.getLogger(__name__)


def make_transports(wanted: str, host: str, worker: str, gpu: int = 0) -> list[Transport]:
    """The best first. `worker`: what names this worker start, and the rank of it. `gpu`: the one of
    those visible whose memory this process has KV in. One that cannot be had here is not
    among them: what was to go by it goes by gRPC."""
    made: list[Transport] = []
    if wanted in (AUTO, nixl.NAME):
        try:
            made.append(Nixl(worker))
        except NoNixl as error:
            if wanted != AUTO:
                logger.warning("nixl transport: %s; KV goes by gRPC", error)
    if wanted in (AUTO, collective.NAME):
        device = torch.device("cuda", gpu) if torch.cuda.is_available() else torch.device("cpu")
        made.append(Collective(host, device))
    return made
