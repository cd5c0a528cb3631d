"""vLLM's own API server over an engine core without a model.

    python -m cluster.bench.plain_stub CONTROL_PORT [ARGUMENTS OF VLLM SERVE]

HTTP application, tokenizer, AsyncLLM and output processor are vLLM's. Only the client of the engine
core is replaced, so no token is encoded or crosses a socket: the least that plain vLLM can cost.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from vllm.config import VllmConfig
from vllm.entrypoints.launchers.api_server import entry
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest
from vllm.v1.engine.core_client import EngineCoreClient

from cluster.bench.stub_engine import Pace, StubEngine

KV_BLOCKS = 65_536


class Resources:
    """The part of vLLM's client state that its front end asks for."""

    engine_dead = False


class StubCore(EngineCoreClient):  # type: ignore[misc]
    def __init__(self, vllm_config: VllmConfig, control_port: int) -> None:
        vllm_config.cache_config.num_gpu_blocks = KV_BLOCKS
        self.resources = Resources()
        self.engine_ranks_managed = [0]
        self._control_port = control_port
        self._engine: asyncio.Future[StubEngine] = asyncio.get_running_loop().create_future()

    async def get_supported_tasks_async(self) -> tuple[str, ...]:
        """Asked for before anything is served."""
        if not self._engine.done():
            self._engine.set_result(StubEngine(await Pace.listening(self._control_port)))
        return ("generate",)

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        self._engine.result().add(0, request)

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        self._engine.result().abort(request_ids)

    async def get_output_async(self) -> EngineCoreOutputs:
        engine = await asyncio.shield(self._engine)
        return (await engine.next_step())[0]

    async def reset_mm_cache_async(self) -> None:
        """There is none."""

    def shutdown(self, timeout: float | None = None) -> None:
        """Nothing runs that would have to be stopped."""

    def dp_engines_running(self) -> bool:
        return False


def main() -> None:
    control_port = int(sys.argv.pop(1))

    def make(vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> StubCore:
        return StubCore(vllm_config, control_port)

    EngineCoreClient.make_async_mp_client = staticmethod(make)
    entry.main()


if __name__ == "__main__":
    main()
