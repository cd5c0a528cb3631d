"""`baton bench kv`: the shape of its report, and that both ends run."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from cluster.bench.kv import KvSettings, Measured, Sample, goals_of, run_kv, summary
from cluster.bench.report import BenchFailed
from cluster.cli.bench import bench

GB = 10**9


def measured(size_mb: int, grpc_s: float, socket_s: float) -> Measured:
    size = size_mb << 20
    ours = [(way, size, grpc_s) for way in ("grpc_none", "collective_none")]
    times = (("memcpy", 0, 0.01), ("socket", size, socket_s), *ours)
    samples = [
        Sample(way, size, wire, taken_s * factor)
        for way, wire, taken_s in times
        for factor in (1, 0.5, 3)
    ]
    return Measured(samples, {"nixl": "nixl is not installed"})


def test_the_report_has_medians_and_the_goal() -> None:
    settings = KvSettings(sizes_mb=(256,), codecs=("none",), repeats=3)
    report = json.loads(json.dumps(summary({"cores": 2}, settings, measured(256, 0.2, 0.1))))
    assert list(report) == ["bench", "machine", "settings", "results", "missing", "goals"]
    grpc = report["results"]["256"]["grpc_none"]
    assert grpc == {
        "gb_s": round((256 << 20) / 0.2 / GB, 3),
        "ms": 200.0,
        "wire_bytes": 256 << 20,
        "of_socket": 0.5,
    }
    assert report["goals"] == [
        {"name": "grpc_of_socket_256mb", "value": 0.5, "goal": 0.6, "met": False},
        {"name": "collective_of_socket_256mb", "value": 0.5, "goal": 0.8, "met": False},
    ]


@pytest.mark.parametrize(
    ("taken_s", "met"),
    [(0.124, (True, True)), (0.126, (True, False)), (0.166, (True, False)), (0.17, (False, False))],
)
def test_the_goal_is_a_share_of_the_plain_socket(taken_s: float, met: tuple[bool, bool]) -> None:
    settings = KvSettings(sizes_mb=(256,), codecs=("none",))
    goals = goals_of(summary({}, settings, measured(256, taken_s, 0.1))["results"])
    assert tuple(goal.met for goal in goals) == met


def test_each_size_has_its_goals() -> None:
    settings = KvSettings(sizes_mb=(1, 16), codecs=("none",))
    samples = measured(1, 0.5, 0.1).samples + measured(16, 0.11, 0.1).samples
    goals = goals_of(summary({}, settings, Measured(samples, {}))["results"])
    assert {goal.name: goal.met for goal in goals} == {
        "grpc_of_socket_1mb": False,
        "collective_of_socket_1mb": False,
        "grpc_of_socket_16mb": True,
        "collective_of_socket_16mb": True,
    }


def test_two_processes_hand_kv_over_in_every_way() -> None:
    result = CliRunner().invoke(bench, ["kv", "--quick", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    for size in ("1", "4"):
        ways = report["results"][size]
        codecs = ("none", "fp8", "int8")
        there = [name for name in ("grpc", "collective", "nixl") if name not in report["missing"]]
        ours = {f"{transport}_{c}" for transport in there for c in codecs}
        assert set(ways) == {"memcpy", "socket", *ours}
        assert all(way["gb_s"] > 0 for way in ways.values())
        raw = int(size) << 20
        assert ways["socket"]["wire_bytes"] == ways["grpc_none"]["wire_bytes"] == raw
        # 128 channels of two bytes become one byte each and two scales of four.
        assert ways["grpc_int8"]["wire_bytes"] == ways["grpc_fp8"]["wire_bytes"]
        assert ways["collective_int8"]["wire_bytes"] == ways["grpc_int8"]["wire_bytes"]
        assert ways["grpc_int8"]["wire_bytes"] == raw * (128 + 2 * 4) // (128 * 2)


def test_an_end_that_stops_ends_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.bench.kv.PEER_MODULE", "tests.no_such_module")
    with pytest.raises(BenchFailed, match="stopped"):
        run_kv(KvSettings(sizes_mb=(1,)), lambda what: None)
