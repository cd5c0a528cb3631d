"""vLLM's own scheduler, which also notes when the step ended that gave a request its first token.

The vLLM servers that `baton bench handoff` measures run with it (`--scheduler-cls`). What it notes
is the same moment by the same monotonic clock as what a Baton worker tells of its steps.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.platforms import current_platform
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from cluster.bench.steps import STEPS_VARIABLE, note_of

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutputs

# What vLLM chooses by itself.
_Scheduler: Any = Scheduler if current_platform.is_cpu() else AsyncScheduler


class NotingScheduler(_Scheduler):  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._steps = Path(os.environ[STEPS_VARIABLE]).open("a", buffering=1)  # noqa: SIM115
        self._begun: set[str] = set()

    def update_from_output(self, *args: Any, **kwargs: Any) -> dict[int, EngineCoreOutputs]:
        outputs: dict[int, EngineCoreOutputs] = super().update_from_output(*args, **kwargs)
        for client_outputs in outputs.values():
            self._note(client_outputs)
        return outputs

    def _note(self, outputs: EngineCoreOutputs) -> None:
        for output in outputs.outputs:
            if output.new_token_ids and output.request_id not in self._begun:
                self._begun.add(output.request_id)
                self._steps.write(note_of(output.request_id, outputs.timestamp))
            if output.finish_reason is not None:
                self._begun.discard(output.request_id)
