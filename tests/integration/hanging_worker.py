"""A worker whose engine hangs in a step for as long as a file is there."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from workers import __main__ as worker_main

HANG_FILE = "BATON_TEST_HANG_FILE"


def hang_while_told() -> None:
    from vllm.v1.engine.core import EngineCore

    step = EngineCore.step

    def hanging(self: EngineCore) -> Any:
        while Path(os.environ[HANG_FILE]).exists():
            time.sleep(0.01)
        return step(self)

    EngineCore.step = hanging  # type: ignore[method-assign]


if __name__ == "__main__":
    # As the worker itself does it, before vLLM is imported.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    hang_while_told()
    worker_main.main()
