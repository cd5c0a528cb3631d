"""`baton bench scheduler`: a load that holds steady, and a report that says what was met."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from click.testing import CliRunner

from cluster.bench import scheduler as bench
from cluster.bench.scheduler import GOALS_US, QUICK, LoadedCluster, run_scheduler
from cluster.cli.main import cli
from cluster.scheduler.policies import BUILT_IN, BadPolicy


@pytest.mark.parametrize("policy", BUILT_IN)
def test_the_load_holds_steady(policy: str) -> None:
    cluster = LoadedCluster(10, replace(QUICK, policy=policy))
    lives = cluster.scheduler.lives
    before = len(lives)
    times = cluster.measure(100)
    assert len(lives) == before == 10 * QUICK.requests_per_worker
    assert len(times.arrival) == 100 and len(times.request) > 90 and len(times.token) > 100
    assert all(time > 0 for time in times.arrival + times.request + times.token)
    views = cluster.scheduler.view.workers.values()
    assert sum(view.decodes for view in views) == before
    assert any(view.pending_prompt_tokens for view in views)


def test_the_report_is_json_with_the_goals(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    report = json.loads(json.dumps(run_scheduler(QUICK, told.append)))
    assert told == ["10 workers", "100 workers"]
    assert list(report["results"]) == ["10", "100"]
    for result in report["results"].values():
        assert 0 < result["arrival_us"] <= result["request_us"] <= result["request_p99_us"]
    (goal,) = report["goals"]
    assert goal["goal"] == GOALS_US[100] and goal["value"] == report["results"]["100"]["request_us"]
    monkeypatch.setattr(bench, "GOALS_US", {100: 0.001})
    (missed,) = run_scheduler(QUICK, told.append)["goals"]
    assert not missed["met"]


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(BadPolicy):
        run_scheduler(replace(QUICK, policy="best"), lambda _: None)
    said = CliRunner().invoke(cli, ["bench", "scheduler", "--quick", "--policy", "best"])
    assert said.exit_code == 2 and "there are splitwise" in said.output


def test_the_command_prints_a_table_or_json() -> None:
    run = CliRunner()
    said = run.invoke(cli, ["bench", "scheduler", "--quick", "--policy", "round_robin"])
    assert said.exit_code == 0 and "policy round_robin" in said.stdout
    assert "us a placement at 100 workers" in said.stdout
    said = run.invoke(cli, ["bench", "scheduler", "--quick", "--json"])
    assert json.loads(said.stdout)["settings"]["policy"] == "splitwise"
