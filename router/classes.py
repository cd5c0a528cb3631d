"""Whose a request is, and what it is promised."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers

from cluster.scheduler.slo import NO_PROMISE, SloClass

DEFAULT_CLASS = "default"
"""A class of this name is that of requests that have no other."""


class BadClass(Exception):
    """No class has the name. The message says so, in one line."""


def tenant_of(headers: Headers) -> str:
    """The SHA-256 of the request's API key; empty without one. Keys themselves are not kept."""
    scheme, _, key = headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not key:
        key = headers.get("x-api-key", "")
    return hashlib.sha256(key.strip().encode()).hexdigest() if key.strip() else ""


@dataclass(frozen=True, slots=True)
class Classes:
    by_name: Mapping[str, SloClass]
    by_tenant: Mapping[str, str]

    @classmethod
    def of_settings(
        cls, classes: Mapping[str, Mapping[str, Any]], tenants: Mapping[str, str]
    ) -> Classes:
        return cls({name: SloClass(name, **values) for name, values in classes.items()}, tenants)

    def get(self, tenant: str, asked: str | None) -> SloClass:
        """A tenant that has a class has no other, whatever it asks for.

        Raises:
            BadClass
        """
        named = self.by_tenant.get(tenant) or (asked and asked.strip())
        if not named:
            return self.by_name.get(DEFAULT_CLASS, NO_PROMISE)
        found = self.by_name.get(named)
        if found is None:
            known = ", ".join(self.by_name) or "none configured"
            raise BadClass(f"no class is called {named!r}: there are {known}")
        return found
