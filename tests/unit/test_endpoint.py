"""A worker's own end of its hand-offs: what it sends, when, and how the connector finds it."""

from __future__ import annotations

import pytest

from tests.unit.ends import (
    GEOMETRY,
    TOKENS,
    MakeOutbox,
    Receiver,
    push_layer,
)
from workers.kv.endpoint import KvEndpoint, publish, published, withdraw
from workers.kv.peer import RATE_ASSUMED_BYTES_S


def test_an_endpoint_opens_a_transfer_once_until_it_ends(
    receiver: Receiver, make_outbox: MakeOutbox
) -> None:
    outbox = make_outbox()
    endpoint = KvEndpoint(receiver.inbox, outbox.sender)
    digests: list[bytes] = []

    def digest() -> bytes:
        digests.append(b"digest")
        return digests[-1]

    assert endpoint.sending(receiver.send_kv(), TOKENS, digest) is None
    endpoint.begin("t")
    transfers = {
        id(endpoint.sending(receiver.send_kv(), TOKENS, digest)) for _ in range(GEOMETRY.layers)
    }
    assert (len(transfers), len(digests)) == (1, 1)
    transfer = endpoint.sending(receiver.send_kv(), TOKENS, digest)
    assert transfer is not None
    for layer in range(GEOMETRY.layers):
        push_layer(transfer, layer)
    endpoint.finish("t")
    endpoint.finish("t")
    endpoint.abort("t", "it has ended")
    assert outbox.result().delivered

    endpoint.begin("u")
    endpoint.sending(receiver.send_kv("u"), TOKENS, digest)
    endpoint.abort("u", "aborted")
    assert outbox.result().reason == "the sender gave up: aborted"
    outbox.assert_at_rest()
    # A step that was on its way when it ended does not open it again.
    assert endpoint.sending(receiver.send_kv("u"), TOKENS, digest) is None


def test_a_transfer_expected_to_be_short_goes_in_one_go(
    receiver: Receiver, make_outbox: MakeOutbox
) -> None:
    outbox = make_outbox()
    send = receiver.send_kv()
    tokens = int(RATE_ASSUMED_BYTES_S / GEOMETRY.bytes_per_token)
    """One second of KV, as long as nothing was measured."""
    auto = KvEndpoint(receiver.inbox, outbox.sender, one_go_s=0.1)
    assert not auto.overlaps(send, tokens // 20)
    assert auto.overlaps(send, tokens // 5)
    # Where ranks send, nothing goes to it from here.
    assert outbox.sender.sending.peers == 0
    for _ in range(10):
        outbox.sender.peer(send).measured(1 << 30, 1000.0)
    assert auto.overlaps(send, tokens // 20)
    for overlap in ("always", "never"):
        given = KvEndpoint(receiver.inbox, outbox.sender, overlap=overlap, one_go_s=0.1)
        assert {given.overlaps(send, 1), given.overlaps(send, tokens)} == {overlap == "always"}


def test_what_is_to_be_pushed_after_a_step_is_pushed_once_when_that_step_has_ended(
    receiver: Receiver, make_outbox: MakeOutbox
) -> None:
    endpoint = KvEndpoint(receiver.inbox, make_outbox().sender)
    pushed: list[str] = []
    endpoint.after_step(2, lambda: pushed.append("a"))
    endpoint.after_step(2, lambda: pushed.append("b"))
    # The next step may run before the one before has ended.
    endpoint.after_step(3, lambda: pushed.append("c"))
    for step, so_far in ((1, []), (2, ["a", "b"]), (2, ["a", "b"]), (3, ["a", "b", "c"])):
        endpoint.step_ended(step)
        assert pushed == so_far


def test_an_endpoint_is_found_by_name_while_it_is_published(
    receiver: Receiver, make_outbox: MakeOutbox
) -> None:
    endpoint = KvEndpoint(receiver.inbox, make_outbox().sender)
    publish("some", endpoint)
    assert published("some") is endpoint
    withdraw("some")
    withdraw("some")
    with pytest.raises(LookupError, match="no KV endpoint 'some'"):
        published("some")
