"""From `vllm serve` arguments to a worker's engine configuration. One of the few files that know
vLLM's internals; see tests/integration/test_vllm_seams.py."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import vllm
from huggingface_hub import ResolvedRevision
from vllm.config import KVTransferConfig, VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext
from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype

from cluster.vllm_args import parse_vllm_args
from cluster.wire import worker_pb2
from workers.kv.endpoint import ENDPOINT_KEY
from workers.kv.incoming import KvGeometry
from workers.kv.ranks import part_of
from workers.kv_events import events_config

WEIGHT_SAMPLE_BYTES = 1 << 20
WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "*.pt")

NOT_SPLIT = {
    "pipeline_parallel_size": "use --tensor-parallel-size",
    "prefill_context_parallel_size": "use --tensor-parallel-size",
    "decode_context_parallel_size": "use --tensor-parallel-size",
    "data_parallel_size": "use more workers",
}
"""Arguments that spread a model in ways that Baton does not know, and what to do instead."""

DRAFTS_WITHOUT_KV = frozenset(("ngram", "ngram_gpu", "suffix", "medusa", "mlp_speculator"))
"""Speculative methods whose drafts keep no KV beside the model's own."""


class UnsupportedModel(Exception):
    """The model's KV is of a kind that Baton cannot hand over yet."""


def engine_config(vllm_args: Sequence[str], endpoint: str) -> VllmConfig:
    """The engine's configuration, with Baton's connector in it.

    Raises:
        UnsupportedModel, and whatever vLLM raises for a bad model or value.
    """
    args = AsyncEngineArgs.from_cli_args(parse_vllm_args(vllm_args))
    for name, instead in NOT_SPLIT.items():
        if getattr(args, name) > 1:
            option = name.replace("_", "-")
            raise UnsupportedModel(f"--{option} above 1 is not supported: {instead}")
    if args.tensor_parallel_size > 1:
        # On the worker's node, whoever started it: Ray would place ranks elsewhere.
        args.distributed_executor_backend = "mp"
    args.kv_transfer_config = KVTransferConfig(
        kv_connector="BatonConnector",
        kv_connector_module_path="workers.kv.connector",
        kv_role="kv_both",
        kv_connector_extra_config={ENDPOINT_KEY: endpoint},
        kv_load_failure_policy="recompute",
    )
    args.kv_events_config = events_config(args.kv_events_config)
    config = args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
    model = config.model_config
    if model.is_hybrid or model.use_mla or model.is_encoder_decoder:
        raise UnsupportedModel(
            f"{model.model}: only models whose every layer keeps keys and values of all tokens "
            "can be handed over (no Mamba, MLA or encoder-decoder models yet)"
        )
    speculative = config.speculative_config
    if speculative is not None and speculative.method not in DRAFTS_WITHOUT_KV:
        raise UnsupportedModel(
            f"--speculative-config: drafts by {speculative.method!r} have KV of their own, which "
            f"is not handed over; those by {', '.join(sorted(DRAFTS_WITHOUT_KV))} have none"
        )
    try:
        part_of(model.get_total_num_kv_heads(), args.tensor_parallel_size, rank=0)
    except ValueError as error:
        raise UnsupportedModel(f"{model.model}: {error}") from error
    return config


def geometry(config: VllmConfig) -> KvGeometry:
    """Of all KV heads, on however many ranks they are."""
    model, parallel = config.model_config, config.parallel_config
    dtype = kv_cache_dtype_str_to_dtype(config.cache_config.cache_dtype, model)
    return KvGeometry(
        layers=model.get_num_layers(parallel),
        first_head=0,
        heads=model.get_total_num_kv_heads(),
        head_size=model.get_head_size(),
        element_bytes=torch.empty(0, dtype=dtype).element_size(),
    )


def fingerprint(config: VllmConfig) -> worker_pb2.Fingerprint:
    model, shape = config.model_config, geometry(config)
    return worker_pb2.Fingerprint(
        # The path may differ from host to host; what it holds may not.
        model=model.served_model_name if isinstance(model.served_model_name, str) else "",
        revision=commit(model.revision),
        weights=weights_digest(model.model_weights or model.model, model.hf_config),
        dtype=str(model.dtype),
        kv_dtype=kv_format(config.cache_config.cache_dtype, model),
        layers=shape.layers,
        kv_heads=shape.heads,
        head_size=shape.head_size,
        vllm_version=vllm.__version__,
        baton_version=importlib.metadata.version("baton"),
    )


def kv_format(cache_dtype: str, model: Any) -> str:
    """What the cache's bytes mean, which their storage does not tell: vLLM keeps all fp8 formats
    and others as bytes."""
    if cache_dtype in ("auto", "float16", "bfloat16"):
        return str(kv_cache_dtype_str_to_dtype(cache_dtype, model))
    name = "fp8_e4m3" if cache_dtype == "fp8" else cache_dtype
    # Some AMD accelerators have a format of their own under this name.
    return f"{name}fnuz" if name == "fp8_e4m3" and current_platform.is_fp8_fnuz() else name


def commit(revision: str | None) -> str:
    """Of a model by its Hugging Face name: a branch is not the same weights for ever, nor on a host
    whose cache is older."""
    return revision.resolved if isinstance(revision, ResolvedRevision) else revision or ""


def weights_digest(source: str, hf_config: Any) -> str:
    """Tells two models of one shape apart: the configuration, and the sizes and a sample of the
    weight files that are at `source`. Where none are, the model goes by that name."""
    described: dict[str, Any] = hf_config.to_dict()
    for volatile in ("_name_or_path", "transformers_version"):
        described.pop(volatile, None)
    digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode())
    if not Path(source).exists():
        digest.update(source.encode())
    for file in _weight_files(Path(source)):
        digest.update(f"{file.name}:{file.stat().st_size}".encode())
        with file.open("rb") as weights:
            weights.seek(max(0, file.stat().st_size - WEIGHT_SAMPLE_BYTES))
            digest.update(weights.read(WEIGHT_SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def _weight_files(source: Path) -> list[Path]:
    """Of the formats in a folder, the one that vLLM would load."""
    if source.is_file():
        return [source]
    formats = (sorted(source.glob(pattern)) for pattern in WEIGHT_PATTERNS)
    return next(filter(None, formats), [])
