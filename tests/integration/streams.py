"""Streams that are read while a test does something to the cluster."""

from __future__ import annotations

import json
import threading
import time
import uuid
from typing import Any

import httpx

STREAM_DEADLINE_S = 120.0


class Stream(threading.Thread):
    """One completion, read to its end. Its id is known before it begins."""

    def __init__(self, url: str, body: dict[str, Any], number: int = 0) -> None:
        super().__init__(daemon=True)
        self.number = number
        self._url, self._body = url, {**body, "stream": True, "return_token_ids": True}
        name = uuid.uuid4().hex
        self._headers = {"X-Request-Id": name}
        self.request_id = f"cmpl-{name}"
        self.token_ids: list[int] = []
        self.longest_wait_s = 0.0
        """Between two of its events."""
        self.problem = "it was not read to its end"

    def run(self) -> None:
        try:
            self.problem = self._read()
        except httpx.HTTPError as error:
            self.problem = f"{type(error).__name__}: {error}"

    def _read(self) -> str:
        url = f"{self._url}/v1/completions"
        last_s = None
        with httpx.stream(
            "POST", url, json=self._body, headers=self._headers, timeout=STREAM_DEADLINE_S
        ) as response:
            for line in response.iter_lines():
                if response.status_code != 200:
                    return f"{response.status_code} {line}"
                if not line:
                    continue
                if line == "data: [DONE]":
                    return ""
                now = time.monotonic()
                self.longest_wait_s = max(self.longest_wait_s, now - (last_s or now))
                last_s = now
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    return str(event["error"])
                for choice in event["choices"]:
                    self.token_ids += choice["token_ids"] or []
        return "it ended without [DONE]"
