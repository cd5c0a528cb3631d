"""Which blocks of prompts the workers' prefix caches hold, as far as they have told.

A block goes by a hash of its tokens and of all before it, which worker and router make in the same
way. The index may be wrong, for it is behind by what is on its way: it is for choosing, not for
relying on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from cluster.scheduler.view import WorkerKey

WORKER_BLOCKS_MAX = 1 << 16
BLOCKS_MAX = 1 << 20
"""Of all workers: about 400 MB."""


class PromptBlocks(Protocol):
    """A prompt's full blocks."""

    def hashes(self, block_tokens: int) -> Iterator[int]:
        """From the first block on, each made when it is asked for."""
        ...


@dataclass(slots=True)
class PrefixIndex:
    """Of each worker the blocks told or used last, if there are too many."""

    blocks_max: int = BLOCKS_MAX
    worker_blocks_max: int = WORKER_BLOCKS_MAX
    _blocks: dict[WorkerKey, dict[int, None]] = field(default_factory=dict)
    """Those told or used last are last."""
    _holders: dict[int, set[WorkerKey]] = field(default_factory=dict)
    _sizes: dict[WorkerKey, int] = field(default_factory=dict)
    """Tokens in a block."""
    _size_counts: Counter[int] = field(default_factory=Counter)

    def __len__(self) -> int:
        """Blocks known, once for each worker that holds them."""
        return sum(map(len, self._blocks.values()))

    def add(self, key: WorkerKey, block_tokens: int) -> None:
        self._blocks[key] = {}
        self._sizes[key] = block_tokens
        self._size_counts[block_tokens] += 1

    def remove(self, key: WorkerKey) -> None:
        if key in self._sizes:
            self.reset(key)
            del self._blocks[key]
            size = self._sizes.pop(key)
            self._size_counts[size] -= 1
            if not self._size_counts[size]:
                del self._size_counts[size]

    def reset(self, key: WorkerKey) -> None:
        """The worker holds nothing, or is about to tell all that it holds."""
        for block in self._blocks.get(key, ()):
            self._unhold(block, key)
        if key in self._blocks:
            self._blocks[key] = {}

    def stored(self, key: WorkerKey, blocks: Iterable[int]) -> None:
        held = self._blocks.get(key)
        if held is None:
            return
        for block in blocks:
            held.pop(block, None)
            held[block] = None
            self._holders.setdefault(block, set()).add(key)
        most = min(self.worker_blocks_max, self.blocks_max // len(self._blocks))
        while len(held) > most:
            oldest = next(iter(held))
            del held[oldest]
            self._unhold(oldest, key)

    def removed(self, key: WorkerKey, blocks: Iterable[int]) -> None:
        held = self._blocks.get(key, {})
        for block in blocks:
            if block in held:
                del held[block]
                self._unhold(block, key)

    def held_tokens(self, prompt: PromptBlocks) -> dict[WorkerKey, int]:
        """How much of the prompt's beginning each worker holds; those without any are left out."""
        found: dict[WorkerKey, int] = {}
        if not self._holders:
            return found
        for size in self._size_counts:
            self._follow(prompt.hashes(size), size, found)
        return found

    def _follow(self, blocks: Iterator[int], size: int, found: dict[WorkerKey, int]) -> None:
        """Along the prompt, as long as anyone holds the block and all before it."""
        tokens = 0
        following: set[WorkerKey] | None = None
        for block in blocks:
            holders = self._holders.get(block, set())
            still = holders if following is None else following & holders
            for key in (following or set()) - still:
                found[key] = tokens
            following = still
            if not still:
                return
            tokens += size
        for key in following or ():
            found[key] = tokens

    def use(self, key: WorkerKey, prompt: PromptBlocks, tokens: int) -> None:
        """The worker gets a request of which it holds `tokens`: it will keep those."""
        size, held = self._sizes.get(key), self._blocks.get(key)
        if not size or held is None:
            return
        for _, block in zip(range(tokens // size), prompt.hashes(size), strict=False):
            if block in held:
                del held[block]
                held[block] = None

    def _unhold(self, block: int, key: WorkerKey) -> None:
        holders = self._holders.get(block)
        if holders is not None:
            holders.discard(key)
            if not holders:
                del self._holders[block]
