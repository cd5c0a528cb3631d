"""Each codec between two real workers: the bundled model still recalls, for fewer bytes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from cluster.config import BUNDLED_MODEL
from tests.integration.test_equal_to_plain_vllm import ask
from tests.nursery import Nursery
from tests.processes import metrics, running_cluster

PAIRS = (3, 6, 12, 24, 48, 72)
PROMPTS_OF_EACH = 5
RIGHT_SHARE_MIN = 0.9
ROW_BYTES = {"none": 64 * 4, "fp8": 64 + 4, "int8": 64 + 4}
"""Of one head's channels of one token, keys or values."""
TOKEN_ROWS = 2 * 4 * 2
"""Keys and values, layers, KV heads of the bundled model."""
VLLM_ARGS = [
    *("--model", str(BUNDLED_MODEL), "--served-model-name", "m", "--dtype", "float32"),
    *("--enforce-eager", "--kv-cache-memory-bytes", str(64 << 20), "--max-model-len", "512"),
]


def recall_prompts() -> list[tuple[str, str]]:
    """Prompts and their answers, the same for each codec."""
    rng, made = random.Random(7), []
    for pairs in PAIRS * PROMPTS_OF_EACH:
        keys = rng.sample(range(200), pairs)
        values = [f"{rng.randrange(1000):03d}" for _ in keys]
        asked = rng.randrange(pairs)
        told = "".join(f"k{key}={value}; " for key, value in zip(keys, values, strict=True))
        made.append((f"{told}k{keys[asked]}?", values[asked]))
    return made


@pytest.mark.parametrize("codec", ROW_BYTES)
def test_answers_stay_right(codec: str, tmp_path: Path, nursery: Nursery) -> None:
    handoff = {"codec": codec}
    with running_cluster(tmp_path, VLLM_ARGS, handoff=handoff, spawn=nursery.spawn) as cluster:
        right = tokens = 0
        for prompt, answer in recall_prompts():
            body = {"prompt": prompt, "max_tokens": 8, "temperature": 0}
            _, reply = ask(cluster.url, "/v1/completions", body)
            right += reply["choices"][0]["text"] == answer
            tokens += reply["usage"]["prompt_tokens"]
        after = metrics(cluster.url)
    prompts = len(recall_prompts())
    print(f"{codec}: {right} of {prompts} right, {after['baton_handoff_bytes_total']:.0f} bytes")
    assert after['baton_requests_total{path="handed_over"}'] == prompts
    assert after["baton_handoff_bytes_total"] == tokens * TOKEN_ROWS * ROW_BYTES[codec]
    assert right >= RIGHT_SHARE_MIN * prompts
