"""What a hand-off adds to the metrics, whole or not."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry

from cluster.handoff_failure import HandoffFailure
from cluster.wire import worker_pb2
from router.metrics import RouterMetrics
from router.tally import Tally


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def tally(registry: CollectorRegistry) -> Tally:
    return Tally(RouterMetrics(registry))


def test_the_wait_for_kv_counts_also_where_it_was_in_vain(
    tally: Tally, registry: CollectorRegistry
) -> None:
    whole = worker_pb2.Adopted(
        handed_over=True, exposed_s=0.5, credit_wait_s=0.25, wire_s=1, transport="grpc"
    )
    no_room = worker_pb2.Adopted(
        reason="no room", failure="no_room", exposed_s=4, credit_wait_s=5, transport="grpc"
    )
    never_opened = worker_pb2.Adopted(reason="not whole in time", failure="late", exposed_s=10)
    for adopted in (whole, no_room, never_opened):
        tally.handoff_ended(adopted, "r", "p", "d")

    def observed(what: str) -> tuple[float | None, float | None]:
        samples = (f"baton_handoff_{what}seconds_count", f"baton_handoff_{what}seconds_sum")
        count, total_s = map(registry.get_sample_value, samples)
        return count, total_s

    assert observed("exposed_") == (3, 14.5)
    assert observed("credit_wait_") == (2, 5.25)
    # To the last layer, which was not there.
    assert observed("") == (1, 1.25)
    assert observed("wire_") == (1, 1)
    failed = [
        registry.get_sample_value("baton_handoffs_failed_total", {"reason": reason})
        for reason in HandoffFailure
    ]
    assert failed == [1, 1, 0, 0, 0]
    assert [row.exposed_s for row in tally.recent] == [10, 4, 0.5]
