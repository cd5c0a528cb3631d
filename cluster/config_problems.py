"""What pydantic refuses of a configuration, in Baton's words: a name and what would be right."""

from __future__ import annotations

import json
import re
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import SettingsError

from cluster.config_names import did_you_mean, variable


def wrong_values(error: ValidationError, model: type[BaseModel]) -> str:
    return "; ".join(_wrong_value(problem, model) for problem in error.errors())


def _wrong_value(problem: ErrorDetails, model: type[BaseModel]) -> str:
    *path, last = problem["loc"]
    name = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        known = _model_at(path, model).model_fields
        return f"{name}: unknown{did_you_mean(str(last), {each: each for each in known})}"
    said, hint = problem["msg"].lower(), ""
    if problem["type"] in ("model_type", "dict_type"):
        said = "it must hold names and values"
    elif problem["type"] == "string_type" and isinstance(problem["input"], int | float):
        hint = ": put it in quotes"
    return f"{name}: {said}, got {problem['input']!r}{hint}"


def _model_at(path: list[int | str], model: type[BaseModel]) -> type[BaseModel]:
    kind: Any = model
    for part in path:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            kind = kind.model_fields[str(part)].annotation
        else:
            # What a list or dict holds.
            kind = get_args(kind)[-1]
    found: type[BaseModel] = kind
    return found


def unreadable_variable(error: SettingsError, model: type[BaseModel]) -> str:
    """What to say of a variable that is not JSON. Its text may be a secret."""
    # pydantic names the field only in its message.
    found = re.search(r'field "(\w+)"', str(error))
    if found is None:
        return f"environment: {error} ({error.__cause__})"
    said = f"{variable((found[1],))}: not JSON ({error.__cause__})"
    examples = model.model_fields[found[1]].examples
    return f"{said}; it is written as {json.dumps(examples[0])}" if examples else said
