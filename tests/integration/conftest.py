"""One Baton cluster and one plain vLLM server of the same model, for all tests of this folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.gated_worker import GATES_FOLDER
from tests.models import make_random_llama
from tests.nursery import Nursery
from tests.processes import Cluster, plain_vllm, running_cluster

MAX_MODEL_LEN = 512
CHUNK_TOKENS = 192
WORKER_REQUESTS_MAX = 8


@pytest.fixture(scope="session")
def vllm_args(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return model_args(tmp_path_factory.mktemp("model"))


def model_args(folder: Path) -> list[str]:
    """vLLM's arguments, with a model that is made in the folder."""
    model = make_random_llama(folder)
    return [
        *("--model", str(model), "--served-model-name", "m", "--dtype", "float32"),
        *("--enforce-eager", "--kv-cache-memory-bytes", str(128 << 20)),
        *("--max-model-len", str(MAX_MODEL_LEN), "--max-num-batched-tokens", str(CHUNK_TOKENS)),
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
    ]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="session")
def nursery(folder: Path) -> Iterator[Nursery]:
    running = Nursery(folder)
    yield running
    running.close()


@pytest.fixture(scope="session")
def cluster(folder: Path, vllm_args: list[str], nursery: Nursery) -> Iterator[Cluster]:
    # gRPC, and the other way of sending, in one go, are what the tests of damaged hand-offs take.
    handoff = {"overlap": "always", "transport": "collective"}
    with running_cluster(folder, vllm_args, handoff=handoff, spawn=nursery.spawn) as running:
        yield running


@pytest.fixture(scope="session")
def gated(
    tmp_path_factory: pytest.TempPathFactory, vllm_args: list[str], nursery: Nursery
) -> Iterator[Cluster]:
    """Where tests look for what is held, at points where they stop it, and at random ones."""
    with gated_cluster(tmp_path_factory.mktemp("gated"), vllm_args, nursery) as running:
        yield running


@contextlib.contextmanager
def gated_cluster(
    folder: Path, vllm_args: list[str], nursery: Nursery, decode: int = 2, **handoff: Any
) -> Iterator[Cluster]:
    with running_cluster(
        folder,
        vllm_args,
        decode=decode,
        environment={GATES_FOLDER: str(folder)},
        # A transfer of 32 KB or more is pushed layer by layer, a shorter one in one go.
        handoff={"one_go_ms": 0.1, "credit_deadline_s": 30.0, **handoff},
        router_settings={"worker_requests_max": WORKER_REQUESTS_MAX},
        worker_module="tests.integration.gated_worker",
        router_module="tests.integration.telling_router",
        spawn=nursery.spawn,
    ) as running:
        yield running


@pytest.fixture(scope="session")
def plain(folder: Path, vllm_args: list[str], nursery: Nursery) -> Iterator[str]:
    # Prompts in one chunk: vLLM's CPU engine dies of a seeded prompt in two.
    args = [*vllm_args, "--max-num-batched-tokens", "4096"]
    with plain_vllm(folder, args, nursery.spawn) as url:
        yield url
