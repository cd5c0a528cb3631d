"""The blocks of a prompt as vLLM's prefix cache knows them. One of the few files that know vLLM's
internals; see tests/integration/test_vllm_seams.py.

A block's hash is made of the hash of the block before it, its tokens, and what else its KV depends
on (adapter, images, salt). What stands before the first block is made of a seed. It is the same in
all processes, unless PYTHONHASHSEED or a hash that needs a secret makes it another: so workers tell
the hash of a probe, and the router compares.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import (
    generate_block_hash_extra_keys,
    hash_block_tokens,
    resolve_none_hash_seed,
)
from vllm.v1.engine import EngineCoreRequest

SHORT_MASK = (1 << 64) - 1
PROBE_TOKENS = (1, 2, 3)


def short_hash(block_hash: bytes | int) -> int:
    """Eight bytes of it, as vLLM shortens hashes itself if it is told to. Enough to choose by."""
    if isinstance(block_hash, int):
        return block_hash & SHORT_MASK
    return int.from_bytes(block_hash[-8:], "big")


def engine_probe(algorithm: str) -> int:
    """The probe's hash in a process whose engine is started."""
    return short_hash(hash_block_tokens(get_hash_fn_by_name(algorithm), None, PROBE_TOKENS))


class BlockHasher:
    """Makes in this process the hashes that engines make in theirs."""

    def __init__(self, algorithm: str) -> None:
        self.hash = get_hash_fn_by_name(algorithm)
        self.first_parent = self.hash(resolve_none_hash_seed(self.hash))
        parent = self.first_parent
        self.probe = short_hash(hash_block_tokens(self.hash, parent, PROBE_TOKENS))

    def blocks_of(self, request: EngineCoreRequest) -> RequestBlocks | None:
        """None for a prompt that has no tokens to hash."""
        if not request.prompt_token_ids or request.prompt_embeds is not None:
            return None
        return RequestBlocks(self, request)


class RequestBlocks:
    """A request's blocks, each hashed when it is first asked for."""

    def __init__(self, hasher: BlockHasher, request: EngineCoreRequest) -> None:
        self._hasher = hasher
        self._request = request
        self._short: dict[int, list[int]] = {}
        self._last: dict[int, tuple[Any, int]] = {}
        """Of each block size: the last block's hash, and where in the images it ended."""

    def hashes(self, block_tokens: int) -> Iterator[int]:
        tokens: list[int] = self._request.prompt_token_ids
        short = self._short.setdefault(block_tokens, [])
        for index in range(len(tokens) // block_tokens):
            if index == len(short):
                self._hash_next(block_tokens, index * block_tokens, short)
            yield short[index]

    def _hash_next(self, block_tokens: int, start: int, short: list[int]) -> None:
        parent, image = self._last.get(block_tokens, (self._hasher.first_parent, 0))
        end = start + block_tokens
        extra, image = generate_block_hash_extra_keys(self._request, start, end, image)
        tokens = self._request.prompt_token_ids[start:end]
        full = hash_block_tokens(self._hasher.hash, parent, tokens, extra)
        self._last[block_tokens] = (full, image)
        short.append(short_hash(full))
