"""When an engine counts as stuck."""

from __future__ import annotations

from workers.health import FIRST_STEP_S, LOOK_EVERY_S, Watchdog


def looks(watchdog: Watchdog, seconds: float, **seen: int) -> list[str]:
    """What it says, looking at the same for some time."""
    start_s = watchdog._looked_at_s
    count = int(seconds / LOOK_EVERY_S)
    values = {"requests": 1, "turns": 7, "steps": 7, **seen}
    return [watchdog.look(start_s + (i + 1) * LOOK_EVERY_S, **values) for i in range(count)]


def test_stuck_after_its_time_and_not_before() -> None:
    said = looks(Watchdog(10), 11)
    assert not any(said[:20])
    assert said[-1] == "the engine is stuck: no step for 10 s while 1 requests wait"


def test_every_turn_starts_the_time_anew() -> None:
    watchdog = Watchdog(10)
    for turns in range(5):
        assert not any(looks(watchdog, 9, turns=turns))


def test_without_requests_it_may_do_nothing_for_ever() -> None:
    watchdog = Watchdog(10)
    assert not any(looks(watchdog, 1000, requests=0))
    # And what it did before the request came does not count against it.
    assert not any(looks(watchdog, 9))


def test_the_first_step_may_compile() -> None:
    said = looks(Watchdog(10), FIRST_STEP_S + 1, steps=0)
    assert not any(said[: int(FIRST_STEP_S / LOOK_EVERY_S)])
    assert said[-1]


def test_a_frozen_process_has_lost_time_and_is_not_stuck() -> None:
    watchdog = Watchdog(10)
    assert not any(looks(watchdog, 5))
    assert not watchdog.look(watchdog._looked_at_s + 3600, requests=1, turns=7, steps=7)
    assert any(looks(watchdog, 5))
