"""Clients that go away, as in test_no_leak, where payloads take another way than gRPC."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration import test_no_leak
from tests.integration.conftest import gated_cluster
from tests.integration.held import Held, Watch
from tests.nursery import Nursery
from tests.processes import Cluster, metrics
from tests.unit.test_groups import needs_nixl

WAYS = [pytest.param("collective"), pytest.param("nixl", marks=needs_nixl)]
watch, idle, stream = test_no_leak.watch, test_no_leak.idle, test_no_leak.stream
starts_idle = test_no_leak.starts_idle
test_between_two_chunks_of_the_prefill = test_no_leak.test_between_two_chunks_of_the_prefill
test_within_a_step_of_the_prefill = test_no_leak.test_within_a_step_of_the_prefill
test_during_the_transfer = test_no_leak.test_during_the_transfer
test_after_the_prefill = test_no_leak.test_after_the_prefill
test_waiting_for_room_after_the_prefill = test_no_leak.test_waiting_for_room_after_the_prefill
test_between_transfer_and_decode = test_no_leak.test_between_transfer_and_decode


@pytest.fixture(scope="module", params=WAYS)
def gated(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    vllm_args: list[str],
    nursery: Nursery,
) -> Iterator[Cluster]:
    """As for test_no_leak, but for the transport."""
    folder = tmp_path_factory.mktemp(request.param)
    with gated_cluster(folder, vllm_args, nursery, transport=request.param) as running:
        yield running


def test_it_was_the_other_way(request: pytest.FixtureRequest, watch: Watch, idle: Held) -> None:
    """After all of this, too: a group outlives what goes wrong with its transfers."""
    way = request.node.callspec.params["gated"]
    told = metrics(watch.cluster.url)
    by_way = f'baton_handoffs_by_transport_total{{instead_of="",transport="{way}"}}'
    assert told[by_way] == told["baton_handoffs_completed_total"] > 0
