"""Prompts' beginnings that vLLM's prefix cache has, kept there until a decode leg takes them over:
what is kept need not be sent. Touches vLLM's block pool; see tests/integration/test_vllm_seams.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from vllm.v1.request import Request

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.core import EngineCore

HELD_SHARE_MAX = 0.25
"""Of the cache's blocks. Requests that wait need room to begin, whatever is held for others."""


class HeldPrefixes:
    """By transfer. To be called on the engine's thread."""

    def __init__(self, core: EngineCore) -> None:
        self._core = core
        self._pool = core.scheduler.kv_cache_manager.block_pool
        self._held: dict[str, Sequence[Any]] = {}
        self._blocks = 0

    def holds(self, transfer_id: str) -> bool:
        return transfer_id in self._held

    def hold(self, transfer_id: str, asked: EngineCoreRequest) -> int:
        """Keep what the cache has of the request's prompt. Returns how many tokens that is."""
        if transfer_id in self._held:
            return 0
        request = Request.from_engine_core_request(asked, self._core.request_block_hasher)
        manager = self._core.scheduler.kv_cache_manager
        found, tokens, _ = manager.get_computed_blocks(request)
        blocks = found.blocks[0] if len(found.blocks) == 1 else ()
        if not blocks or self._blocks + len(blocks) > HELD_SHARE_MAX * self._pool.num_gpu_blocks:
            return 0
        self._pool.touch(blocks)
        self._blocks += len(blocks)
        self._held[transfer_id] = blocks
        return int(tokens)

    def release(self, transfer_id: str) -> None:
        blocks = self._held.pop(transfer_id, None)
        if blocks is not None:
            self._blocks -= len(blocks)
            # In vLLM's own order: the end of a prompt goes before its beginning.
            self._pool.free_blocks(reversed(blocks))

    def release_unless(self, needs: Callable[[str], bool]) -> None:
        for transfer_id in [t for t in self._held if not needs(t)]:
            self.release(transfer_id)

    def release_all(self) -> None:
        self.release_unless(lambda _: False)
