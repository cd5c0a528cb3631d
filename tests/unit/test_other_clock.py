from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from router.other_clock import DRIFT, OtherClock

Delays = st.lists(st.floats(0.0, 0.5), min_size=1, max_size=30)


@given(ahead_s=st.floats(-1e6, 1e6), delays=Delays)
def test_times_come_in_order_and_are_no_later_than_what_told_them(
    ahead_s: float, delays: list[float]
) -> None:
    clock, before_s = OtherClock(), float("-inf")
    for number, delay_s in enumerate(delays):
        sent_s = 0.02 * number
        now_s = max(sent_s + delay_s, before_s)
        here_s = clock.here_s(sent_s + ahead_s, now_s)
        assert before_s <= here_s <= now_s + 1e-6
        before_s = here_s


def test_steps_that_came_together_ended_one_after_the_other() -> None:
    clock = OtherClock()
    assert round(clock.here_s(100.0, 5.001), 6) == 5.001
    # The next three are told late and at once.
    told = [clock.here_s(100.0 + 0.02 * step, 5.3) for step in (1, 2, 3)]
    gaps = [round(later - before, 4) for before, later in itertools.pairwise(told)]
    assert gaps == [0.02, 0.02]
    assert abs(told[0] - 5.021) <= DRIFT


def test_clocks_that_go_apart_are_followed() -> None:
    clock, apart = OtherClock(), DRIFT / 2
    for number in range(10_000):
        now_s = 1.0 * number
        assert abs(clock.here_s(now_s * (1 - apart), now_s) - now_s) < 0.001
