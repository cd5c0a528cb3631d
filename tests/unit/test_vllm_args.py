"""Arguments of `vllm serve`, as its own parser takes them."""

from __future__ import annotations

import pytest

from cluster.config import BUNDLED_MODEL
from cluster.vllm_args import BadVllmArguments, parse_vllm_args

MODEL = str(BUNDLED_MODEL)


@pytest.mark.parametrize("model", [["--model", MODEL], []], ids=["with-a-flag", "the-bundled-one"])
def test_a_model_without_a_flag_is_refused(model: list[str]) -> None:
    """`baton up --max-model-len 512 Qwen/Qwen3-0.6B`: Baton would take it for the bundled model."""
    args = [*model, "--max-model-len", "512", "Qwen/Qwen3-0.6B"]
    with pytest.raises(BadVllmArguments, match=r"^Qwen/Qwen3-0.6B: this belongs to no flag"):
        parse_vllm_args(args)


@pytest.mark.parametrize("args", [["--decodes", "2"], ["--max-model-len", "many"]])
def test_a_wrong_argument_is_named(args: list[str]) -> None:
    with pytest.raises(BadVllmArguments, match=args[0].removeprefix("--")):
        parse_vllm_args(["--model", MODEL, *args])
