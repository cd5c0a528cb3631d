"""A model's layers in vLLM's paged KV cache, checked against what is told to other workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from vllm.model_executor.models.utils import extract_layer_index

from workers.kv.incoming import KvGeometry
from workers.kv.layout import PagedLayer, UnknownLayout, paged_layer


def model_layers(caches: Mapping[str, torch.Tensor], geometry: KvGeometry) -> dict[int, PagedLayer]:
    """By index. A draft model's layers are counted like the model's own, or after them.

    Raises:
        UnknownLayout: they are not one cache for each layer, of the geometry's shape.
    """
    layers: dict[int, PagedLayer] = {}
    for name, cache in caches.items():
        index = extract_layer_index(name)
        if index in layers or index >= geometry.layers:
            raise UnknownLayout(
                f"{name}: a second layer {index}, or one too many for a model of {geometry.layers}"
            )
        if cache.element_size() != geometry.element_bytes:
            raise UnknownLayout(
                f"{name}: a KV cache of {cache.dtype}, where elements of {geometry.element_bytes} "
                "bytes were expected"
            )
        layers[index] = paged_layer(cache, geometry.heads, geometry.head_size)
    if len(layers) != geometry.layers:
        raise UnknownLayout(f"{len(layers)} KV caches of a model of {geometry.layers} layers")
    return layers


class KernelBlocks:
    """An attention kernel may take smaller blocks than the scheduler counts: vLLM then cuts each of
    them into several."""

    def __init__(self, scheduled_tokens: int, layers: Mapping[int, PagedLayer]) -> None:
        """Raises UnknownLayout where the scheduler's blocks are not so many whole ones."""
        sizes = sorted({layer.block_size for layer in layers.values()})
        if len(sizes) != 1 or scheduled_tokens % sizes[0]:
            raise UnknownLayout(
                f"blocks of {sizes} tokens, of those of {scheduled_tokens} that vLLM counts"
            )
        self._each = scheduled_tokens // sizes[0]

    def of(self, block_ids: Sequence[int]) -> list[int]:
        """The blocks in the cache that the scheduler's blocks are."""
        each = self._each
        return [block * each + part for block in block_ids for part in range(each)]
