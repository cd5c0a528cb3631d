"""Command-line flags made from the configuration, so that every value has one."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, get_args

import click
from pydantic.fields import FieldInfo

from cluster.config import BatonConfig
from cluster.config_names import flag, leaves
from cluster.scheduler.policies import policy_names

POSITIONAL = ("vllm_args",)


def config_options(*only: str) -> Callable[[Any], Any]:
    """Adds a flag for every value of the configuration, or for those named."""

    def add(command: Any) -> Any:
        for path, field in reversed(list(leaves(BatonConfig))):
            if path[0] in POSITIONAL or (only and path[0] not in only):
                continue
            command = _option(path, field)(command)
        return command

    return add


def flags_given(values: dict[str, Any]) -> dict[str, Any]:
    """The flags that were given, nested as the configuration is."""
    given: dict[str, Any] = {}
    for path, _ in leaves(BatonConfig):
        value = values.get("__".join(path))
        if value is None:
            continue
        target = given
        for name in path[:-1]:
            target = target.setdefault(name, {})
        target[path[-1]] = value
    return given


def _option(path: tuple[str, ...], field: FieldInfo) -> Callable[[Any], Any]:
    name = flag(path)
    parameter = "__".join(path)
    help_text = field.description or ""
    if path == ("policy",):
        help_text += ": " + ", ".join(policy_names())
    if field.annotation is bool:
        return click.option(f"{name}/--no-{name[2:]}", parameter, default=None, help=help_text)
    if field.default is not None and not field.default_factory:
        help_text += f"  [{field.default}]"
    choices = [c for c in get_args(field.annotation) if isinstance(c, str)]
    kind: Any = click.Choice(choices) if choices else str
    if field.annotation not in (str, int, float) and not choices and field.default_factory:
        kind = _Json(json.dumps((field.examples or [None])[0]))
    metavar = None if choices else "VALUE"
    return click.option(name, parameter, type=kind, default=None, help=help_text, metavar=metavar)


class _Json(click.ParamType[Any]):
    name = "json"

    def __init__(self, example: str) -> None:
        self._example = example

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        try:
            return json.loads(value) if isinstance(value, str) else value
        except ValueError as error:
            self.fail(
                f"{value!r} is not JSON: {error}; it is written as {self._example}", param, ctx
            )
