"""Errors as people should read them."""

from __future__ import annotations

import errno
import re

LINE_LENGTH_MAX = 400
ERROR_PREFIX = "baton: "
"""How a process of ours begins the one line that says why it ended."""


def one_line(error: BaseException) -> str:
    """What happened, in one line. Port conflicts say what to change."""
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        return "the port is in use: stop what listens there, or choose another with --port"
    text = " ".join(str(error).split()) or type(error).__name__
    # pydantic's report of one bad value carries its type and a link behind the message.
    if "validation error" in text and "Value error, " in text:
        text = text.split("Value error, ", 1)[1].split(" [type=", 1)[0]
    return text if len(text) <= LINE_LENGTH_MAX else text[: LINE_LENGTH_MAX - 1] + "…"


def without_password(url: str) -> str:
    """Of a Redis URL: messages end up in logs."""
    return re.sub(r"(://[^/@:]*:)[^/]*@", r"\1***@", url)
