"""Arguments of `vllm serve`, as its own parser takes them."""

from __future__ import annotations

import pytest

from cluster.config import BUNDLED_MODEL
from cluster.vllm_args import BadVllmArguments, parse_vllm_args

MODEL = str(BUNDLED_MODEL)


def test_the_model_stands_first_or_behind_its_flag() -> None:
    for args in (["--model", MODEL], [MODEL]):
        assert parse_vllm_args([*args, "--max-model-len", "512"]).model == MODEL


def test_a_model_behind_other_flags_is_not_taken_for_none() -> None:
    """`baton up --max-model-len 512 Qwen/Qwen3-0.6B`: Baton would take it for the bundled model."""
    args = ["--model", MODEL, "--max-model-len", "512", "Qwen/Qwen3-0.6B"]
    with pytest.raises(BadVllmArguments, match=r"'Qwen/Qwen3-0.6B' belongs to no flag; a model"):
        parse_vllm_args(args)


@pytest.mark.parametrize("args", [["--decodes", "2"], ["--max-model-len", "many"]])
def test_a_wrong_argument_is_named(args: list[str]) -> None:
    with pytest.raises(BadVllmArguments, match=args[0].removeprefix("--")):
        parse_vllm_args(["--model", MODEL, *args])
