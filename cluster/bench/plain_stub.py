"""vLLM's own API server, over an engine core that runs elsewhere (cluster/bench/stub_core.py).

    python -m cluster.bench.plain_stub FOLDER [ARGUMENTS OF VLLM SERVE]

HTTP application, tokenizer, AsyncLLM, output processor and the engine core's client are vLLM's.
Only where the engine core is found is given to it, in place of starting one: their two sockets are
in the folder.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from vllm.config import VllmConfig
from vllm.entrypoints.launchers.api_server import entry
from vllm.v1.engine.core_client import AsyncMPClient, EngineCoreClient


def input_address(folder: Path) -> str:
    return f"ipc://{folder}/core-input"


def output_address(folder: Path) -> str:
    return f"ipc://{folder}/core-output"


def main() -> None:
    folder = Path(sys.argv.pop(1))
    addresses = {"input_address": input_address(folder), "output_address": output_address(folder)}

    def make(
        vllm_config: VllmConfig, executor_class: Any, log_stats: bool, **kwargs: Any
    ) -> AsyncMPClient:
        return AsyncMPClient(vllm_config, executor_class, log_stats, addresses)

    EngineCoreClient.make_async_mp_client = staticmethod(make)
    entry.main()


if __name__ == "__main__":
    main()
