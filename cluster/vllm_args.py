"""Arguments of `vllm serve`, as vLLM's own parser understands them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


class BadVllmArguments(Exception):
    """vLLM's parser refuses an argument."""


def parse_vllm_args(vllm_args: Sequence[str]) -> argparse.Namespace:
    """Parse and validate `vllm serve` arguments.

    Raises:
        BadVllmArguments: an unknown flag or a wrong value.
    """
    # Importing vLLM takes seconds; whoever only wants the exception should not wait for it.
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):  # type: ignore[misc]
        def error(self, message: str) -> None:
            raise BadVllmArguments(message)

    parser = make_arg_parser(Parser(prog="vllm serve"))
    namespace: argparse.Namespace = parser.parse_args(list(vllm_args))
    if getattr(namespace, "model_tag", None):
        namespace.model = namespace.model_tag
    try:
        validate_parsed_serve_args(namespace)
    except (TypeError, ValueError) as error:
        raise BadVllmArguments(str(error)) from error
    return namespace
