"""The accelerators Baton knows: what the hardware can do, and the names it goes by.

Figures are per accelerator and as published (dense, never the "with sparsity" ones). Each row of
`accelerators.csv` names its source.
"""

from __future__ import annotations

import csv
import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Final

CPU: Final = "CPU"
"""The catalogue's nominal entry for a node that has no accelerator."""

_REQUIRED: Final = ("fp16_tflops", "memory_gb", "bandwidth_gb_s")
_NUMBERS: Final = (
    *_REQUIRED,
    "fp8_tflops",
    "link_gb_s",
    "pcie_gb_s",
    "power_w",
    "prefill_efficiency",
)
_VENDOR: Final = re.compile(r"^(acceleratortype|nvidia|tesla|amdinstinct|amd)+")


class UnknownAccelerator(LookupError):
    """No accelerator goes by this name; the message lists those that are known."""


@dataclass(frozen=True)
class Accelerator:
    """One accelerator's figures, as published."""

    name: str
    fp16_tflops: float
    """Dense fp16/bf16 TFLOP/s."""
    memory_gb: float
    bandwidth_gb_s: float
    """Memory bandwidth, GB/s."""
    fp8_tflops: float | None = None
    """Dense fp8 TFLOP/s; None where the hardware has no fp8."""
    link: str | None = None
    link_gb_s: float | None = None
    """Fast link between accelerators, GB/s, both directions together; None where there is none."""
    pcie_gb_s: float = 64.0
    """PCIe, GB/s, both directions together."""
    max_fast_linked: int = 1
    """How many accelerators the fast link joins."""
    power_w: float | None = None
    prefill_efficiency: float | None = None
    """Measured share of `fp16_tflops` that prefill reaches; None where nobody measured."""
    nominal: bool = False
    """True for figures that stand for a class of hardware, neither published nor measured."""
    aliases: tuple[str, ...] = ()
    source: str = "user"

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise ValueError("an accelerator needs a name")
        for field in _NUMBERS:
            value = getattr(self, field)
            if value is not None and not value > 0:
                raise ValueError(f"{self.name}: {field} must be positive, not {value!r}")
        if self.prefill_efficiency is not None and self.prefill_efficiency > 1:
            raise ValueError(f"{self.name}: prefill_efficiency is a share of 1")
        if self.max_fast_linked < 1:
            raise ValueError(f"{self.name}: max_fast_linked must be at least 1")

    def interconnect_gb_s(self, accelerators: int) -> float:
        """Bandwidth between this many of them, GB/s both ways: the fast link if it joins them."""
        if self.link_gb_s is not None and accelerators <= self.max_fast_linked:
            return self.link_gb_s
        return self.pcie_gb_s


class Catalogue:
    """Accelerators by name. Names and aliases match whatever their case, spaces and hyphens."""

    def __init__(self, accelerators: Iterable[Accelerator]) -> None:
        self._by_name = {one.name: one for one in accelerators}
        self._by_key: dict[str, Accelerator] = {}
        for one in self._by_name.values():
            for name in (one.name, *one.aliases):
                other = self._by_key.setdefault(_key(name), one)
                if other is not one:
                    raise ValueError(f"{name!r} names both {other.name} and {one.name}")

    @classmethod
    def load(
        cls,
        extra_csv: Path | None = None,
        extra: Mapping[str, Mapping[str, object]] | None = None,
    ) -> Catalogue:
        """The packaged catalogue plus a user's own accelerators.

        `extra_csv` has the columns of the packaged `accelerators.csv`; `extra` maps a name to the
        same columns. Both need name, fp16_tflops, memory_gb and bandwidth_gb_s; the rest is
        optional. A name or alias already in the catalogue is taken over by the user's entry.
        """
        packaged = resources.files("cluster").joinpath("accelerators.csv").read_text("utf-8")
        catalogue = cls(_parse(packaged, "accelerators.csv"))
        if extra_csv is not None:
            catalogue = catalogue.extended(_parse(extra_csv.read_text("utf-8"), extra_csv.name))
        if extra:
            own = [accelerator_from({"name": name, **row}) for name, row in extra.items()]
            catalogue = catalogue.extended(own)
        return catalogue

    def extended(self, accelerators: Iterable[Accelerator]) -> Catalogue:
        """A catalogue in which these come first: they take over any name they share."""
        own = list(accelerators)
        taken = {_key(name) for one in own for name in (one.name, *one.aliases)}
        kept = [
            _without(one, taken) for one in self._by_name.values() if _key(one.name) not in taken
        ]
        return Catalogue([*kept, *own])

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._by_name)

    def get(self, name: str) -> Accelerator | None:
        """The accelerator of this name or alias, or None."""
        return self._by_key.get(_key(name))

    def find(self, name: str) -> Accelerator:
        """The accelerator of this name or alias; UnknownAccelerator says how to add it."""
        found = self.get(name)
        if found is not None:
            return found
        close = difflib.get_close_matches(_key(name), self._by_key, n=1)
        hint = f" Did you mean {self._by_key[close[0]].name}?" if close else ""
        raise UnknownAccelerator(
            f"no accelerator is called {name!r}.{hint} Known: {', '.join(self.names)}. To add it, "
            "give Catalogue.load a CSV (extra_csv) or a dict (extra) with name, fp16_tflops "
            "(dense TFLOP/s), memory_gb and bandwidth_gb_s."
        )


def accelerator_from(row: Mapping[str, object]) -> Accelerator:
    """An accelerator from one row; every value may be text, and an empty one means not given."""
    columns = {field.name for field in fields(Accelerator)}
    given = {str(column): value for column, value in row.items() if value not in (None, "")}
    name = str(given.get("name", "")).strip()
    unknown = sorted(set(given) - columns)
    if unknown:
        raise ValueError(f"{name}: no such column: {', '.join(unknown)}")
    missing = [column for column in _REQUIRED if column not in given]
    if missing:
        raise ValueError(f"{name}: missing {', '.join(missing)}")

    def number(column: str) -> float | None:
        try:
            return float(str(given[column])) if column in given else None
        except ValueError:
            raise ValueError(f"{name}: {column} is no number: {given[column]!r}") from None

    link = given.get("link")
    return Accelerator(
        name=name,
        fp16_tflops=number("fp16_tflops") or 0.0,
        memory_gb=number("memory_gb") or 0.0,
        bandwidth_gb_s=number("bandwidth_gb_s") or 0.0,
        fp8_tflops=number("fp8_tflops"),
        link=None if link is None else str(link),
        link_gb_s=number("link_gb_s"),
        pcie_gb_s=64.0 if "pcie_gb_s" not in given else number("pcie_gb_s") or 0.0,
        max_fast_linked=int(number("max_fast_linked") or 1),
        power_w=number("power_w"),
        prefill_efficiency=number("prefill_efficiency"),
        nominal=str(given.get("nominal", "")).casefold() in ("yes", "true", "1"),
        aliases=_aliases(given.get("aliases")),
        source=str(given.get("source", "user")),
    )


def _aliases(value: object) -> tuple[str, ...]:
    names = value.split("|") if isinstance(value, str) else value
    if names is None:
        return ()
    if not isinstance(names, list | tuple):
        raise ValueError(f"aliases: a list, or text separated by '|', not {value!r}")
    return tuple(str(name).strip() for name in names)


def _parse(text: str, file: str) -> list[Accelerator]:
    rows = []
    for number, row in enumerate(csv.DictReader(text.splitlines()), start=2):
        if None in row:
            raise ValueError(f"{file} line {number}: more values than columns")
        try:
            rows.append(accelerator_from(row))
        except ValueError as error:
            raise ValueError(f"{file} line {number}: {error}") from None
    names = [_key(row.name) for row in rows]
    twice = sorted({row.name for row in rows if names.count(_key(row.name)) > 1})
    if twice:
        raise ValueError(f"{file}: listed twice: {', '.join(twice)}")
    return rows


def _without(accelerator: Accelerator, taken: set[str]) -> Accelerator:
    aliases = tuple(name for name in accelerator.aliases if _key(name) not in taken)
    values = {field.name: getattr(accelerator, field.name) for field in fields(Accelerator)}
    return Accelerator(**{**values, "aliases": aliases})


def _key(name: str) -> str:
    """What two spellings of a name have in common, without the vendor in front."""
    plain = re.sub(r"[^a-z0-9.]", "", name.casefold())
    return _VENDOR.sub("", plain) or plain
