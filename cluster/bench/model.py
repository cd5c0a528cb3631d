"""Models to measure with: a random Llama of 113 million parameters, made on the spot.

    python -m cluster.bench.model FOLDER

makes one in a process of its own, so that torch is not in the one that measures.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

from cluster.bench.report import BenchFailed
from cluster.config import BUNDLED_MODEL

VOCABULARY = 18_432
"""Makes it 113M parameters."""
WEIGHT_STD = 0.08
"""With the usual 0.02 the output repeats one token, whatever the KV cache holds."""
POSITIONS_MAX = 8192
SHAPE_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)


def make_random_llama(folder: Path, seed: int = 0) -> None:
    """Write the model and a tokenizer that can decode every token it may give."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=12,
        head_dim=64,
        max_position_embeddings=POSITIONS_MAX,
        initializer_range=WEIGHT_STD,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    shutil.copy(BUNDLED_MODEL / "tokenizer_config.json", folder)
    tokenizer = json.loads((BUNDLED_MODEL / "tokenizer.json").read_text())
    pad_vocabulary(tokenizer, VOCABULARY)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def pad_vocabulary(tokenizer: dict[str, Any], size: int) -> None:
    """Give the ids that the tokenizer lacks names that encoding never gives."""
    vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
    taken = {*vocabulary.values(), *(token["id"] for token in tokenizer["added_tokens"])}
    vocabulary.update({f"<filler{i}>": i for i in range(size) if i not in taken})


def describe_model(folder: Path) -> dict[str, Any]:
    """Its shape and the number of its parameters.

    Raises:
        BenchFailed: no model is there.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise BenchFailed(f"model {folder}: give a folder with a config.json ({error})") from error
    parameters = sum(_parameters(file) for file in folder.glob("*.safetensors"))
    return {
        "architecture": (config.get("architectures") or ["unknown"])[0],
        "parameters": parameters or None,
        **{key: config.get(key) for key in SHAPE_KEYS},
    }


def _parameters(file: Path) -> int:
    """From the header of a safetensors file: its length in 8 bytes, then JSON."""
    with file.open("rb") as weights:
        header = json.loads(weights.read(int.from_bytes(weights.read(8), "little")))
    return sum(math.prod(t["shape"]) for name, t in header.items() if name != "__metadata__")


if __name__ == "__main__":
    make_random_llama(Path(sys.argv[1]))
