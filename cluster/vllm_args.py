"""Arguments of `vllm serve`: those of the configuration; and as vLLM's own parser takes them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from cluster.config import BUNDLED_MODEL_NAME, BatonConfig
from cluster.engine_build import on_gpu
from cluster.scheduler.view import Pool

CPU_KV_CACHE_BYTES = 1 << 30
"""KV cache of a worker on CPU unless `--kv-cache-memory-bytes` is given: vLLM would take nearly all
of the machine's memory for each."""


class BadVllmArguments(Exception):
    """vLLM's parser refuses an argument."""


def parse_vllm_args(vllm_args: Sequence[str]) -> argparse.Namespace:
    """Parse and validate `vllm serve` arguments.

    Raises:
        BadVllmArguments: an unknown flag, a wrong value, or one without a flag.
    """
    # Importing vLLM takes seconds; whoever only wants the exception should not wait for it.
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):  # type: ignore[misc]
        def error(self, message: str) -> None:
            raise BadVllmArguments(message)

    parser = make_arg_parser(Parser(prog="vllm serve"))
    namespace: argparse.Namespace = parser.parse_args(list(vllm_args))
    if namespace.model_tag:
        # Whatever has no flag: a model there would be served with what is meant for another.
        raise BadVllmArguments(
            f"{namespace.model_tag}: this belongs to no flag; a model comes first, or with --model"
        )
    try:
        validate_parsed_serve_args(namespace)
    except (TypeError, ValueError) as error:
        raise BadVllmArguments(str(error)) from error
    return namespace


def vllm_args(config: BatonConfig, pool: Pool | None = None) -> list[str]:
    """`vllm serve` arguments for the workers of a pool, or for routers: the user's, and defaults
    that fit."""
    args = list(config.vllm_args)
    if pool is not None:
        # vLLM takes a flag's last value.
        args += config.prefill_vllm_args if pool is Pool.PREFILL else config.decode_vllm_args
    given = {arg.split("=", 1)[0].replace("_", "-") for arg in args if arg.startswith("--")}

    def default(flag: str, *values: str) -> None:
        if flag not in given and flag.replace("--", "--no-", 1) not in given:
            args.extend([flag, *values])

    if config.model is None:
        default("--served-model-name", BUNDLED_MODEL_NAME)
        default("--dtype", "float32")
        default("--max-model-len", "4096")
    else:
        default("--served-model-name", config.model)
    if not on_gpu():
        default("--kv-cache-memory-bytes", str(CPU_KV_CACHE_BYTES))
        # Compiling takes minutes and a C++ compiler, for little on CPU.
        default("--enforce-eager")
    return ["--model", config.model_path, *args]


def tensor_parallel(args: list[str]) -> int:
    """The value of --tensor-parallel-size. vLLM's parser checks it in earnest."""
    text = flag_value(args, "--tensor-parallel-size", "-tp")
    return int(text) if text.isdigit() else 1


def flag_value(args: list[str], *names: str) -> str:
    """The first value given to a flag where it stands last, empty if it is not there."""
    found = ""
    for i, arg in enumerate(args):
        name, _, value = arg.partition("=")
        if name.replace("_", "-") in names:
            found = value or (args[i + 1] if i + 1 < len(args) else "")
    return found
