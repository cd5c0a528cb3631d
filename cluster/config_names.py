"""What the values of a configuration are called, as flags and as environment variables, and what
somebody may have meant by a name that is none of them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping

from pydantic import BaseModel
from pydantic.fields import FieldInfo

PREFIX = "BATON_"
ALIKE_MIN = 0.75
"""How much a variable, or a flag that may be another program's, is like a setting's, above which it
is taken for a misspelt one."""
SERVICE = re.compile(r"_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_\w+)?)$")
"""Ends the variables that Kubernetes sets for each Service, which may be called baton-something."""


def leaves(
    model: type[BaseModel], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], FieldInfo]]:
    """Every value of a configuration, with the names that lead to it."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from leaves(field.annotation, (*path, name))
        else:
            yield (*path, name), field


def flag(path: tuple[str, ...]) -> str:
    return "--" + "-".join(path).replace("_", "-")


def variable(path: tuple[str, ...]) -> str:
    return PREFIX + "__".join(path).upper()


def did_you_mean(name: str, names: Mapping[str, str], alike_min: float = 0.6) -> str:
    """Added to what is said about a name that is not one of these. Each has what it is called in
    full."""
    close = difflib.get_close_matches(name, names, 1, alike_min)
    return f", did you mean {names[close[0]]}?" if close else ""


def misspelt_variables(names: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """Those like a known one, with that one.

    Others are let pass: they may be somebody's who calls other things baton.
    """
    settings = [name.removeprefix(PREFIX) for name in known]
    misspelt = {}
    for given in names:
        name = given.upper()
        # Of a value that has others in it, each can be a variable, too: BATON_HANDOFF__CODEC.
        whole = name.removeprefix(PREFIX).split("__")[0]
        if not name.startswith(PREFIX) or whole in settings or SERVICE.search(name):
            continue
        close = difflib.get_close_matches(name.removeprefix(PREFIX), settings, 1, ALIKE_MIN)
        if close:
            misspelt[given] = PREFIX + close[0]
    return misspelt
