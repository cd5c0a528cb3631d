"""`baton bench handoff` runs: real servers and the bundled model, without the peer's packages."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


@pytest.mark.timeout(600)
def test_times_after_prefill_come_from_both_servers() -> None:
    command = [sys.executable, "-m", "cluster.cli.main", "bench", "handoff"]
    options = ["--quick", "--no-peer", "--json", "--prompt-tokens", "64", "--repeats", "1"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=590)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    result = report["results"]["64"]
    for name in ("plain", "baton"):
        after_prefill = result[name]["first_token_after_prefill_ms"]
        assert 0 < after_prefill < result[name]["ttft_ms"]
        assert after_prefill < result[name]["second_token_after_prefill_ms"]
    assert result["baton"]["same_text_as_plain"] == result["requests"] == 1
    assert report["requests_by_path"]["handed_over"] > 0
    assert [goal["name"] for goal in report["goals"]] == ["ttft_of_plain_64"]
