"""`make fuzz` tells a failing seed, and replays it."""

from __future__ import annotations

import pytest

from cluster.scheduler.scheduler import Scheduler
from tests.simulation import fuzz
from tests.simulation.fuzz import play, replay

SEEDS = list(range(20))


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scheduler, "_refund_prefill", lambda self, charge: None)


def test_a_failing_seed_is_told_with_the_way_to_replay_it(
    broken: None, capsys: pytest.CaptureFixture[str]
) -> None:
    _, failures = play(SEEDS)
    assert failures
    seed, told = failures.popitem()
    assert f"make fuzz SEED={seed}" in told
    assert replay(seed) == 1
    why = told.partition("\n")[0].removeprefix(f"seed {seed}: ")
    assert capsys.readouterr().out.endswith(f"\nseed {seed} fails: {why}\n")


def test_a_passing_seed_is_replayed(capsys: pytest.CaptureFixture[str]) -> None:
    counts, failures = play(SEEDS[:1])
    assert not failures and counts["arrive"]
    assert replay(SEEDS[0]) == 0
    assert "arrive" in capsys.readouterr().out


@pytest.mark.parametrize("code", [0, 1])
def test_exit_code(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "fuzz", lambda for_s, jobs: code)
    monkeypatch.setattr("sys.argv", ["fuzz", "--for-s", "1"])
    with pytest.raises(SystemExit) as ended:
        fuzz.main()
    assert ended.value.code == code
