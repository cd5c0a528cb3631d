"""Small models made for tests."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from cluster.config import BUNDLED_MODEL

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def make_random_llama(folder: Path, seed: int = 0, layers: int = 3) -> Path:
    """A Llama of random weights, with the bundled model's tokenizer.

    The weights are large (std 0.08): with the usual 0.02 the output repeats one token whatever the
    KV cache holds, and a comparison of outputs would show nothing.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=859,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        initializer_range=0.08,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(BUNDLED_MODEL / name, folder / name)
    return folder


def make_random_lora(folder: Path, seed: int, layers: int = 3, rank: int = 4) -> Path:
    """An adapter of random weights for `make_random_llama`, strong enough to change answers."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"q_proj": (128, 256), "v_proj": (128, 128), "o_proj": (256, 128)}
    tensors = {}
    for layer in range(layers):
        for name, (inputs, outputs) in shapes.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator)
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator)
    folder.mkdir(parents=True)
    scaled = {name: 0.3 * tensor for name, tensor in tensors.items()}
    save_file(scaled, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted(shapes),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
