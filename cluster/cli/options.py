"""Command-line flags made from the configuration, so that every value has one."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from typing import Any, get_args

import click
from pydantic.fields import FieldInfo

from cluster.config import BatonConfig
from cluster.config_names import flag, leaves
from cluster.scheduler.policies import policy_names

POSITIONAL = ("vllm_args",)
_METAVARS = {
    "s": "SECONDS",
    "ms": "MILLISECONDS",
    "bytes": "BYTES",
    "tokens": "TOKENS",
    "url": "URL",
    "address": "ADDRESS",
    "name": "NAME",
    "model": "MODEL",
}


def config_options(
    *only: str, shown: Collection[tuple[str, ...]] = (), **help_texts: str
) -> Callable[[Any], Any]:
    """Adds a flag for every value of the configuration, or for those named. `shown`: the help shows
    only these. `help_texts`: what some mean in this command."""

    def add(command: Any) -> Any:
        for path, field in reversed(list(leaves(BatonConfig))):
            if path[0] in POSITIONAL or (only and path[0] not in only):
                continue
            hidden = bool(shown) and path not in shown
            command = _option(path, field, help_texts.get("__".join(path)), hidden)(command)
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


def _option(
    path: tuple[str, ...], field: FieldInfo, help_text: str | None, hidden: bool
) -> Callable[[Any], Any]:
    name = flag(path)
    parameter = "__".join(path)
    if help_text is None:
        help_text = field.description or ""
    if path == ("policy",):
        help_text += ": " + ", ".join(policy_names())
    if field.annotation is bool:
        flags = f"{name}/--no-{name[2:]}"
        return click.option(flags, parameter, default=None, help=help_text, hidden=hidden)
    if field.default is not None and not field.default_factory:
        help_text += f"  [{field.default}]"
    choices = [c for c in get_args(field.annotation) if isinstance(c, str)]
    kind: Any = click.Choice(choices) if choices else str
    if field.annotation not in (str, int, float) and not choices and field.default_factory:
        kind = _Json(json.dumps((field.examples or [None])[0]))
    metavar = None if choices else _metavar(path[-1], field)
    return click.option(
        name, parameter, type=kind, default=None, help=help_text, metavar=metavar, hidden=hidden
    )


def _metavar(name: str, field: FieldInfo) -> str:
    """What is to be given. A value's unit is the last part of its name."""
    if field.default_factory:
        return "JSON"
    by_name = _METAVARS.get(name.rsplit("_", 1)[-1])
    return by_name or ("NUMBER" if field.annotation in (int, float) else "TEXT")


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
