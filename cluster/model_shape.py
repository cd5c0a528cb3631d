"""A model's shape, from its config.json and the arguments of `vllm serve`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from cluster.errors import one_line
from cluster.roofline import MEMORY_UTILIZATION, ModelShape
from cluster.vllm_args import flag_value

_DTYPE_BYTES: Final = {
    **dict.fromkeys(("half", "float16", "bfloat16"), 2.0),
    **dict.fromkeys(("float", "float32"), 4.0),
}
_FP8: Final = ("fp8", "fp8_per_tensor", "fp8_per_block", "fp8_per_channel")
_QUANTIZED_BYTES: Final = {**dict.fromkeys(_FP8, 1.0), "int8_per_channel_weight_only": 1.0}
"""Of a weight that vLLM quantizes when it loads it."""
_KV_BYTES: Final = {
    **dict.fromkeys(("float16", "bfloat16"), 2.0),
    **dict.fromkeys(("fp8", "fp8_e4m3", "fp8_e5m2", "fp8_inc"), 1.0),
}
_LEFT_OUT: Final[tuple[str, ...]] = (
    "--cpu-offload-gb",
    "--hf-overrides",
    "--kv-cache-memory-bytes",
)


@dataclass(frozen=True, slots=True)
class KnownShape:
    shape: ModelShape | None
    note: str
    """Why it is not known, or what of the arguments it leaves out."""


def model_shape(model: str, vllm_args: Sequence[str]) -> KnownShape:
    """vLLM runs more models than have a config.json that is understood here: that is no error."""
    try:
        config = _config(model)
        return _with_arguments(ModelShape.from_hf_config(config), config, vllm_args)
    except Exception as error:
        return KnownShape(None, f"the model's shape is not known: {one_line(error)}")


def memory_share(vllm_args: Sequence[str]) -> float:
    """The value of --gpu-memory-utilization. vLLM's parser checks it in earnest."""
    text = flag_value(list(vllm_args), "--gpu-memory-utilization")
    try:
        share = float(text)
    except ValueError:
        return MEMORY_UTILIZATION
    return share if 0 < share <= 1 else MEMORY_UTILIZATION


def _config(model: str) -> dict[str, Any]:
    """A hub name is read through the hub's cache."""
    file = Path(model) / "config.json"
    if not file.is_file():
        from huggingface_hub import hf_hub_download

        file = Path(hf_hub_download(model, "config.json"))
    config: dict[str, Any] = json.loads(file.read_text())
    return config


def _with_arguments(
    shape: ModelShape, config: dict[str, Any], vllm_args: Sequence[str]
) -> KnownShape:
    args = list(vllm_args)
    names = {arg.split("=")[0].split(".")[0].replace("_", "-") for arg in args}
    left_out = [name for name in _LEFT_OUT if name in names]
    plain = _DTYPE_BYTES.get(flag_value(args, "--dtype"))
    if plain is not None:
        shape = replace(shape, kv_bytes=plain)
    # A checkpoint that is quantized says itself how.
    if not config.get("quantization_config"):
        shape = replace(shape, weight_bytes=plain or shape.weight_bytes)
        method = flag_value(args, "--quantization", "-q")
        if method in _QUANTIZED_BYTES:
            quantized = _QUANTIZED_BYTES[method]
            shape = replace(shape, weight_bytes=quantized, fp8_compute=method in _FP8)
        elif method:
            left_out.append("--quantization")
    kv = flag_value(args, "--kv-cache-dtype")
    if kv in _KV_BYTES:
        shape = replace(shape, kv_bytes=_KV_BYTES[kv])
    elif kv not in ("", "auto"):
        left_out.append("--kv-cache-dtype")
    return KnownShape(shape, f"without {', '.join(left_out)}" if left_out else "")
