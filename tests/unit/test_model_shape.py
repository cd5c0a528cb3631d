"""What the arguments of `vllm serve` make of a model's shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.model_shape import memory_share, model_shape
from cluster.roofline import MEMORY_UTILIZATION

LLAMA_8B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "torch_dtype": "bfloat16",
}


def bytes_with(folder: Path, *args: str, **config: Any) -> tuple[float, float, bool, str]:
    """Of a weight and of a KV value, whether it computes in fp8, and the note."""
    (folder / "config.json").write_text(json.dumps({**LLAMA_8B, **config}))
    known = model_shape(str(folder), args)
    assert known.shape is not None
    shape = known.shape
    return shape.weight_bytes, shape.kv_bytes, shape.fp8_compute, known.note


@pytest.mark.parametrize(
    ("args", "weight", "kv", "fp8"),
    [
        ([], 2, 2, False),
        (["--dtype", "float32"], 4, 4, False),
        (["--dtype", "auto", "--kv-cache-dtype=auto"], 2, 2, False),
        (["--quantization", "fp8"], 1, 2, True),
        (["-q", "fp8", "--kv_cache_dtype", "fp8_e5m2"], 1, 1, True),
        (["--dtype=float32", "--quantization=int8_per_channel_weight_only"], 1, 4, False),
        (["--kv-cache-dtype", "fp8", "--kv-cache-dtype", "bfloat16"], 2, 2, False),
    ],
)
def test_arguments_that_count(
    tmp_path: Path, args: list[str], weight: float, kv: float, fp8: bool
) -> None:
    assert bytes_with(tmp_path, *args) == (weight, kv, fp8, "")


def test_a_quantized_checkpoint_says_itself_how(tmp_path: Path) -> None:
    four_bits = {"quant_method": "awq", "bits": 4}
    args = ["--quantization", "awq_marlin", "--dtype", "float16"]
    assert bytes_with(tmp_path, *args, quantization_config=four_bits) == (0.5, 2, False, "")


def test_what_is_left_out_is_named(tmp_path: Path) -> None:
    args = ["--cpu-offload-gb=4", "--hf-overrides.rope", "{}", "--kv-cache-dtype", "nvfp4"]
    *_, note = bytes_with(tmp_path, *args, "-q", "torchao")
    assert note == "without --cpu-offload-gb, --hf-overrides, --quantization, --kv-cache-dtype"


@pytest.mark.parametrize(
    "text", ["{}", "{", '{"hidden_size": "large"}', "[]", '{"hidden_size": 0}']
)
def test_what_is_not_understood_is_no_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    known = model_shape(str(tmp_path), [])
    assert known.shape is None and known.note.startswith("the model's shape is not known: ")


def test_without_a_config_the_shape_is_not_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert model_shape(str(tmp_path), []).shape is None


@pytest.mark.parametrize(
    ("args", "share"),
    [
        ([], MEMORY_UTILIZATION),
        (["--gpu-memory-utilization", "0.5"], 0.5),
        (["--gpu_memory_utilization=0.95"], 0.95),
        (["--gpu-memory-utilization", "most"], MEMORY_UTILIZATION),
        (["--gpu-memory-utilization", "0"], MEMORY_UTILIZATION),
    ],
)
def test_the_share_of_memory(args: list[str], share: float) -> None:
    assert memory_share(args) == share
