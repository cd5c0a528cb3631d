"""What is learned of how long work takes."""

from __future__ import annotations

import pytest

from cluster.scheduler.rates import Learned, Rates


def test_nothing_seen_is_the_guess() -> None:
    assert Learned(0.5, 0.01).predict_s(100) == pytest.approx(1.5)
    assert Rates().of_one().prefill.predict_s(10_000) == pytest.approx(1.01)


def test_it_comes_to_what_is_seen() -> None:
    learned = Learned(0.01, 0.001)
    for _ in range(100):
        learned.learn(1000, 0.1)
    assert learned.predict_s(1000) == pytest.approx(0.1, rel=0.05)
    for _ in range(100):
        learned.learn(1000, 0.2)
    assert learned.predict_s(1000) == pytest.approx(0.2, rel=0.05)


def test_each_size_has_its_own_factor_and_others_the_common_one() -> None:
    learned = Learned(0.01, 0.001)
    for _ in range(100):
        learned.learn(1000, 0.101)
        learned.learn(10, 0.2)
    assert learned.predict_s(1000) == pytest.approx(0.101, rel=0.1)
    assert learned.predict_s(10) == pytest.approx(0.2, rel=0.1)
    common = learned.predict_s(100) / 0.11
    assert 0.1 < common < 10 and common == pytest.approx(learned.factor)


def test_a_new_worker_is_like_the_others_until_it_shows_otherwise() -> None:
    everyone = Rates()
    old, new = everyone.of_one(), everyone.of_one()
    for _ in range(50):
        old.prefill.learn(1000, 10.0)
    assert new.prefill.predict_s(1000) == pytest.approx(10.0, rel=0.15)
    for _ in range(50):
        new.prefill.learn(1000, 1.0)
    assert new.prefill.predict_s(1000) == pytest.approx(1.0, rel=0.15)
    assert old.prefill.predict_s(1000) == pytest.approx(10.0, rel=0.15)


def test_what_fades_comes_back_to_the_guess() -> None:
    learned = Learned(0.005, 1e-9)
    for _ in range(20):
        learned.learn(1 << 20, 10.0)
    assert learned.predict_s(1 << 20) > 5
    for _ in range(600):
        learned.fade()
    assert learned.predict_s(1 << 20) < 0.05


def test_a_step_is_timed_only_if_it_follows_another() -> None:
    rates = Rates()
    rates.saw_step(1.0, {"a"}, 0, 1.0)
    assert rates.step.predict_s(1) == Rates().step.predict_s(1)
    for i in range(200):
        rates.saw_step(1.0 + 0.1 * (i + 1), {"a"}, 0, 0.0)
    assert rates.step.predict_s(1) == pytest.approx(0.1, rel=0.1)
    rates.saw_step(1000.0, {"b"}, 0, 0.0)
    assert rates.step.predict_s(1) == pytest.approx(0.1, rel=0.1)


def test_prefills_are_timed_from_when_the_worker_could_begin() -> None:
    rates = Rates()
    # All came at 0, and each took a second.
    for second in range(1, 200):
        rates.saw_step(float(second), {f"r{second}"}, 1000, 0.0)
    assert rates.prefill.predict_s(1000) == pytest.approx(1.0, rel=0.05)
