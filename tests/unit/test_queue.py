"""The order of those that wait."""

from __future__ import annotations

from collections import Counter
from itertools import count

from hypothesis import given
from hypothesis import strategies as st

from cluster.scheduler.queue import ENDS_MAX, FairQueue

AGING_S = 5.0


def first(queue: FairQueue, now_s: float) -> str:
    return next(queue.in_order(now_s))


def test_one_tenants_requests_leave_as_they_came() -> None:
    queue = FairQueue()
    for i in range(10):
        queue.add(f"r{i}", float(i), 0, "", 100 - i)
    assert list(queue.in_order(9.0)) == [f"r{i}" for i in range(10)]
    queue.remove("r0")
    queue.remove("r5")
    queue.remove("gone")
    assert list(queue.in_order(9.0)) == ["r1", "r2", "r3", "r4", "r6", "r7", "r8", "r9"]
    assert len(queue) == 8 and "r1" in queue and "r0" not in queue


def test_those_given_may_be_taken_meanwhile() -> None:
    queue = FairQueue()
    for i in range(6):
        queue.add(f"r{i}", 0.0, i % 2, f"t{i % 3}", 10)
    for request_id in queue.in_order(1.0):
        queue.take(request_id, 1.0)
    assert len(queue) == 0 and list(queue.in_order(1.0)) == []


def test_the_more_important_come_first_until_others_have_waited() -> None:
    queue = FairQueue(AGING_S)
    queue.add("batch", 0.0, 2, "b", 10)
    queue.add("chat", 9.0, 0, "a", 10)
    assert first(queue, 9.9) == "chat"
    # Ten seconds are worth two priorities: now the order is that of fairness.
    assert first(queue, 10.0) == "batch"


def test_those_resumed_come_before_all_others() -> None:
    queue = FairQueue(AGING_S)
    queue.add("old", 0.0, 0, "a", 10)
    queue.add("resumed", 100.0, -1, "b", 10)
    assert list(queue.in_order(100.0)) == ["resumed", "old"]


def test_a_tenant_with_many_requests_does_not_hold_up_another() -> None:
    queue = FairQueue()
    for i in range(100):
        queue.add(f"many{i}", 0.0, 0, "many", 10)
    queue.take(first(queue, 1.0), 1.0)
    queue.add("one", 2.0, 0, "one", 10)
    order = list(queue.in_order(2.0))
    assert order.index("one") <= 1


def test_it_tells_how_long_one_more_would_wait() -> None:
    queue = FairQueue()
    assert queue.wait_s(0, 0.0) == 0
    for i in range(60):
        queue.add(f"r{i}", 0.0, i % 2, "", 10)
    for i in range(50):
        queue.take(first(queue, i + 1.0), i + 1.0)
    assert len(queue) == 10
    assert 10.9 < queue.wait_s(1, 50.5) <= 11.0
    assert queue.wait_s(0, 50.5) < queue.wait_s(1, 50.5)
    # As long as nobody is taken, that is forgotten by and by.
    assert queue.wait_s(1, 60.0) < queue.wait_s(1, 51.0)
    assert queue.wait_s(1, 600.0) < 0.01


def test_tenants_that_have_gone_are_forgotten() -> None:
    queue = FairQueue()
    queue.add("stays", 0.0, 9, "stays", 1_000_000)
    for i in range(1000):
        queue.add(f"r{i}", 0.0, 0, f"t{i}", 10)
        queue.take(f"r{i}", 0.0)
    assert len(queue._ends) <= ENDS_MAX + 4


costs = st.lists(st.integers(1, 50), min_size=1, max_size=30)


@given(costs, costs, costs)
def test_tenants_that_wait_get_equal_shares(a: list[int], b: list[int], c: list[int]) -> None:
    """Two that both still wait have been served alike, but for their largest request each."""
    queue = FairQueue()
    tokens = {}
    for tenant, sizes in (("a", a), ("b", b), ("c", c)):
        for i, size in enumerate(sizes):
            queue.add(f"{tenant}{i}", 0.0, 0, tenant, size)
            tokens[f"{tenant}{i}"] = size
    largest = {"a": max(a), "b": max(b), "c": max(c)}
    left = Counter(name[0] for name in tokens)
    served = Counter[str]()
    while queue:
        taken = first(queue, 0.0)
        queue.take(taken, 0.0)
        served[taken[0]] += tokens[taken]
        left[taken[0]] -= 1
        for one, other in (("a", "b"), ("a", "c"), ("b", "c")):
            if left[one] and left[other]:
                assert abs(served[one] - served[other]) <= largest[one] + largest[other]


@given(
    st.integers(0, 5),
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(1, 20)), max_size=20),
    st.sampled_from(["same", "new"]),
)
def test_nobody_waits_forever(
    priority: int, before: list[tuple[int, int, int]], newcomers: str
) -> None:
    """One request a second leaves; for each a more important one comes, of a tenant that never
    waited before, or always of the same."""
    queue = FairQueue(AGING_S)
    names = count()
    for other, tenant, size in before:
        queue.add(f"r{next(names)}", 0.0, other, f"t{tenant}", size)
    queue.add("earlier", 0.0, priority, "marked", 20)
    queue.add("marked", 0.0, priority, "marked", 20)
    bound = len(before) + priority * AGING_S
    # Once it has aged, those go first that start before it, and the common time has to reach it.
    bound += 20 * (len(before) + 2) + 10
    for second in range(int(bound)):
        number = next(names)
        tenant = "one" if newcomers == "same" else f"new{number}"
        queue.add(f"r{number}", float(second), 0, tenant, 20)
        taken = first(queue, float(second))
        queue.take(taken, float(second))
        if taken == "marked":
            return
    raise AssertionError(f"it still waits after {bound} s")
