"""`baton bench kv`: how fast KV goes from one process to another on this machine.

Two processes on loopback: one pushes KV as a prefill worker does, the other takes it in as a decode
worker does, both with the code of real workers and without a model. The same two send the same
bytes through a plain TCP socket, and the first copies them within its own memory. All ways take
turns.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from cluster.bench.report import BenchFailed, Goal, median, ratio

PEER_MODULE = "workers.kv.bench_peer"
OF_SOCKET_MIN = {"grpc": 0.6, "collective": 0.8}
"""By transport. There is no goal for others."""
STOP_DEADLINE_S = 5.0

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class KvSettings:
    sizes_mb: tuple[int, ...] = (1, 16, 256)
    """Of KV in a hand-off, as it is in the cache; a MB is 2**20 bytes."""
    codecs: tuple[str, ...] = ("none", "fp8", "int8")
    repeats: int = 9


QUICK = KvSettings(sizes_mb=(1, 4), repeats=2)
"""Shows that it works, not how fast it is."""


@dataclass(frozen=True, slots=True)
class Sample:
    way: str
    """memcpy, socket, or a transport, _ and a codec."""
    size_bytes: int
    wire_bytes: int
    taken_s: float
    """Until the sender knows that all of it has arrived."""


@dataclass(frozen=True, slots=True)
class Measured:
    samples: list[Sample]
    missing: dict[str, str]
    """Transports that are not there, and why."""


def run_kv(settings: KvSettings, report: Report) -> Measured:
    """Start both ends and measure.

    Raises:
        BenchFailed
    """
    sizes_bytes = [size << 20 for size in settings.sizes_mb]
    samples: list[Sample] = []
    with _peer("receive", {"size_bytes_max": max(sizes_bytes)}) as receiver:
        told = _line_of(receiver)
        for transport, why in told["missing"].items():
            report(f"without {transport}: {why}")
        sending = {"sizes_bytes": sizes_bytes, "codecs": settings.codecs}
        with _peer("send", {**told["ports"], **sending, "repeats": settings.repeats}) as sender:
            for size_mb in settings.sizes_mb:
                ways = len(told["transports"]) * len(settings.codecs) + 2
                report(f"{settings.repeats} times {size_mb} MB, {ways} ways in turn")
                for _ in range(settings.repeats * ways):
                    samples.append(Sample(**_line_of(sender)))
    return Measured(samples, told["missing"])


def summary(machine: dict[str, Any], settings: KvSettings, measured: Measured) -> dict[str, Any]:
    """The report as one JSON object. GB/s are medians, of the KV's own bytes per second: a codec
    moves fewer of them and takes time to make them."""
    results = {str(size): _size_result(size << 20, measured.samples) for size in settings.sizes_mb}
    return {
        "bench": "kv",
        "machine": machine,
        "settings": asdict(settings),
        "results": results,
        "missing": measured.missing,
        "goals": [goal.to_json() for goal in goals_of(results)],
    }


def goals_of(results: dict[str, dict[str, Any]]) -> list[Goal]:
    return [
        Goal(
            f"{transport}_of_socket_{size_mb}mb",
            result.get(f"{transport}_none", {}).get("of_socket"),
            least,
            at_most=False,
        )
        for size_mb, result in results.items()
        for transport, least in OF_SOCKET_MIN.items()
    ]


def _size_result(size_bytes: int, samples: list[Sample]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    of_size = [sample for sample in samples if sample.size_bytes == size_bytes]
    for way in dict.fromkeys(sample.way for sample in of_size):
        of_way = [sample for sample in of_size if sample.way == way]
        result[way] = {
            "gb_s": median([size_bytes / sample.taken_s for sample in of_way], 1e-9),
            "ms": median([sample.taken_s for sample in of_way], 1e3),
            "wire_bytes": of_way[0].wire_bytes,
        }
    socket_gb_s = result.get("socket", {}).get("gb_s")
    for of_way in result.values():
        of_way["of_socket"] = ratio(of_way["gb_s"], socket_gb_s)
    return result


@contextlib.contextmanager
def _peer(end: str, settings: dict[str, Any]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", PEER_MODULE, end, json.dumps(settings)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    except BaseException:
        process.kill()
        raise
    finally:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.close()
        try:
            process.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def _line_of(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise BenchFailed("an end of the hand-off stopped: see its messages above")
    row: dict[str, Any] = json.loads(line)
    return row
