"""`baton bench router` works: vLLM's API server and Baton's router over engines without a model."""

from __future__ import annotations

import json

from click.testing import CliRunner

from cluster.cli.main import cli


def test_both_servers_stream_what_the_stubs_make() -> None:
    result = CliRunner().invoke(cli, ["bench", "router", "--quick", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    for side in report["results"].values():
        assert side["tokens_per_s"] > 0 and side["cpu_us_per_token"] > 0
        # Not the client's time against another clock, nor tokens told only when all are there.
        assert 0 < side["latency_p50_ms"] <= side["latency_p99_ms"]
        assert side["tokens_per_event"] >= 1
    # Every request took both legs.
    assert set(report["requests_by_path"]) == {"handed_over"}
    (goal,) = report["goals"]
    assert goal["name"] == "tokens_per_s_ratio" and goal["value"] > 0
