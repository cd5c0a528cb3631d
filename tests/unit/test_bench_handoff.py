"""`baton bench handoff`: its report, its goals, and what it needs, without a server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from cluster.bench.client import Stream
from cluster.bench.handoff import goals_of, of_steps, summary
from cluster.bench.nixl import keep_workers_to_core
from cluster.bench.servers import Server
from cluster.bench.sides import CompareSettings, LengthSamples, SideSamples
from cluster.bench.steps import note_of
from cluster.cli.bench import bench

SETTINGS = CompareSettings(prompt_tokens=(256, 1024))
PREFILL_S = 0.2


def side(
    first_s: float, second_s: float, tokens_per_s: float = 40.0, text: str = "same"
) -> SideSamples:
    """One request of each length; times are after prefill."""
    samples = SideSamples(tokens_per_s=[tokens_per_s])
    for tokens in SETTINGS.prompt_tokens:
        ended_s = 10.0 + PREFILL_S
        at = [ended_s + first_s, ended_s + second_s, ended_s + second_s + 0.07]
        samples.lengths[tokens] = LengthSamples()
        samples.lengths[tokens].add(Stream(10.0, token_times_s=at, text=text), ended_s)
    return samples


def report(**sides: SideSamples) -> dict:
    sides["baton"].requests_by_path = {"handed_over": 2}
    versions = {"nixl": "1.5.1"} if "nixl" in sides else {}
    made = summary({"cores": 2}, {"name": "m"}, SETTINGS, versions, sides)
    return json.loads(json.dumps(made))


def test_the_report_has_times_after_prefill_and_their_ratios() -> None:
    made = report(
        plain=side(0.002, 0.072), nixl=side(0.1, 0.15, 30.0), baton=side(0.01, 0.03, text="other")
    )
    assert made["machine"] == {"cores": 2, "peer": {"nixl": "1.5.1"}}
    result = made["results"]["256"]
    assert result["requests"] == 1
    assert result["plain"] == {
        "ttft_ms": 202.0,
        "second_token_ms": 70.0,
        "inter_token_ms": 70.0,
        "first_token_after_prefill_ms": 2.0,
        "second_token_after_prefill_ms": 72.0,
    }
    assert result["nixl"]["of_plain"] == {"ttft": 1.485, "first_token": 50.0, "second_token": 2.083}
    assert result["baton"]["of_plain"] == {"ttft": 1.04, "first_token": 5.0, "second_token": 0.417}
    assert [result[name]["same_text_as_plain"] for name in ("nixl", "baton")] == [1, 0]
    assert result["baton_of_nixl"] == {"first_token": 0.1, "second_token": 0.2}
    assert made["throughput"]["nixl"]["tokens_per_s"] == 30.0
    assert made["requests_by_path"] == {"handed_over": 2}


def goals(**sides: SideSamples) -> dict[str, bool]:
    made = report(**sides)
    return {goal.name: goal.met for goal in goals_of(made["results"], made["throughput"])}


def test_a_short_prompt_may_take_longer_to_its_first_token_than_a_long_one() -> None:
    # 1.06 of the plain server's.
    made = goals(plain=side(0, 0.07), baton=side(0.012, 0.07))
    assert made == {"ttft_of_plain_256": True, "ttft_of_plain_1024": False}


@pytest.mark.parametrize(
    ("baton", "first", "second", "streams"),
    [
        (side(0.02, 0.09, 30.0), True, True, True),
        (side(0.021, 0.09, 30.0), False, True, True),
        (side(0.02, 0.091, 30.0), True, False, True),
        (side(0.02, 0.09, 29.0), True, True, False),
    ],
)
def test_the_peer_is_to_be_beaten_in_each_of_three_ways(
    baton: SideSamples, first: bool, second: bool, streams: bool
) -> None:
    made = goals(plain=side(0, 0.07), nixl=side(0.1, 0.15, 30.0), baton=baton)
    name = "token_after_prefill_of_nixl_256"
    assert (made[f"first_{name}"], made[f"second_{name}"]) == (first, second)
    assert made["nixl_tokens_per_s_of_baton"] is streams


def test_a_peer_that_never_ended_a_step_is_no_goal_met() -> None:
    peer = side(0.1, 0.15)
    for samples in peer.lengths.values():
        samples.after_prefill_s.clear()
    made = goals(plain=side(0, 0.07), nixl=peer, baton=side(0.01, 0.03))
    assert made["first_token_after_prefill_of_nixl_256"] is False


async def test_a_streams_prefill_ended_when_its_own_request_was_noted(tmp_path: Path) -> None:
    steps = tmp_path / "steps"
    steps.write_text(note_of("cmpl-11-0-ab", 1.5) + note_of("cmpl-1-0-cd", 2.5))
    ended = of_steps(steps)
    assert await ended(Stream(0.0, "cmpl-1")) == 2.5
    assert await ended(Stream(0.0, "cmpl-2")) is None


def test_a_stream_without_a_running_count_is_a_token_an_event() -> None:
    taken = Stream(started_s=1.0)
    for at_s in (1.5, 2.0):
        taken.take({"id": "cmpl-1", "choices": [{"text": "a"}]}, at_s)
    # The second event brought two.
    taken.take({"id": "cmpl-1", "choices": [], "usage": {"completion_tokens": 3}}, 2.5)
    assert taken.token_times_s == [1.5, 2.0, 2.5]


def test_without_the_peers_packages_it_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "nixl-1.5.1.dist-info").mkdir()
    (tmp_path / "nixl-1.5.1.dist-info" / "METADATA").write_text("Name: nixl\nVersion: 1.5.1\n")
    result = CliRunner().invoke(bench, ["handoff", "--quick", "--peer", str(tmp_path)])
    assert result.exit_code == 1
    assert "Error: vllm-router not found in" in result.output
    assert "make setup-peer" in result.output and "--no-peer" in result.output


@pytest.mark.parametrize(("name", "moved"), [("VLLM::Worker", True), ("VLLM::EngineCore", False)])
def test_a_server_worker_goes_back_to_its_core(tmp_path: Path, name: str, moved: bool) -> None:
    cores = os.sched_getaffinity(0)
    if len(cores) < 2:
        pytest.skip("one core")
    program = f"open('/proc/self/comm', 'w').write({name[:15]!r}); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdout.readline()
        keep_workers_to_core(Server("", process, tmp_path), min(cores))
        assert os.sched_getaffinity(process.pid) == ({min(cores)} if moved else cores)
        process.stdin.write(b"\n")
