"""Logs of Baton's own processes: one line an event, for people or, with BATON_LOG_FORMAT=json, for
machines. Only Baton's loggers are touched; what vLLM and Ray log stays theirs."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

import structlog

PACKAGES = ("cluster", "router", "workers")
FORMAT_VARIABLE = "BATON_LOG_FORMAT"


def configure_logs(level: int = logging.INFO) -> None:
    renderer: Any = structlog.dev.ConsoleRenderer(colors=False)
    if os.environ.get(FORMAT_VARIABLE) == "json":
        renderer = structlog.processors.JSONRenderer()
    formatter = structlog.stdlib.ProcessorFormatter(
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            renderer,
        ],
        foreign_pre_chain=[
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.stdlib.add_log_level,
            structlog.stdlib.add_logger_name,
        ],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    for name in PACKAGES:
        package = logging.getLogger(name)
        package.handlers = [handler]
        # vLLM's application sets the root logger to ERROR: these do not follow it.
        package.setLevel(level)
        package.propagate = False
