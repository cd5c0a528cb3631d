"""Requests for one LoRA adapter are kept together, as Punica does (Chen et al., 2023, section 5):
they decode on the fullest worker that holds it and has room, so that others come to have none and
may drop it. Only where none has, it is loaded once more."""

from __future__ import annotations

from cluster.scheduler.view import Pools, WorkerView

LOAD_TOKENS = 2048
"""Loading an adapter is worth waiting for as many prompt tokens."""


def keep_together(name: str, tokens: int, pools: Pools) -> Pools:
    """The workers that the policy may choose from for this adapter."""
    decode = [
        worker
        for worker in _with_place(name, pools.decode)
        if worker.adapters.holds(name) and worker.has_room(tokens)
    ]
    if decode:
        decode = [max(decode, key=_fullness)]
    return Pools(
        _soon(name, pools.prefill) or _with_place(name, pools.prefill),
        decode or _with_place(name, pools.decode),
        [w for w in pools.mixed if w.adapters.holds(name)] or pools.mixed,
    )


def _fullness(worker: WorkerView) -> tuple[int, float, str]:
    return worker.decodes, worker.kv_load, str(worker.key)


def _soon(name: str, workers: list[WorkerView]) -> list[WorkerView]:
    """Those that hold it, and don't let it wait for longer than loading takes."""
    least = min((worker.pending_prompt_tokens for worker in workers), default=0)
    return [
        worker
        for worker in workers
        if worker.adapters.holds(name) and worker.pending_prompt_tokens <= least + LOAD_TOKENS
    ]


def _with_place(name: str, workers: list[WorkerView]) -> list[WorkerView]:
    return [worker for worker in workers if worker.adapters.has_place(name)] or workers
