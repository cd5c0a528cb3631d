"""One transfer: it is whole or failed, and what it held is freed either way."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.handoff_failure import HandoffFailure
from cluster.wire import kv_pb2
from tests.unit.inbox_frames import (
    ALL_CELLS,
    GEOMETRY,
    HEADS,
    HERE,
    OTHER_SENDER,
    SENDER,
    TOKENS,
    WHOLE_BYTES,
    Clock,
    abort_frame,
    assert_failed,
    cells,
    kv_frame,
    kv_frames,
    make_inbox,
    open_frame,
    receive_all,
)
from workers.kv.frames import Frame
from workers.kv.incoming import Settled, TransferState

# --- what goes well ---------------------------------------------------------------------------


def test_two_frames_a_layer_become_a_whole_transfer_taken_once() -> None:
    clock = Clock()
    inbox, noticed = make_inbox(clock=clock), list[Settled]()
    inbox.expect("t", SENDER, noticed.append)
    assert inbox.receive(open_frame()) == (TransferState.ARRIVING, "")
    *frames, last = kv_frames(tokens_a_frame=4)
    for frame in frames:
        assert inbox.receive(frame) == (TransferState.ARRIVING, "")
        assert inbox.peek("t") is None
        assert inbox.take("t") is None
    assert noticed == []
    clock.now_s += 2.5
    assert inbox.receive(last) == (TransferState.WHOLE, "")

    came = Settled("t", True, "", WHOLE_BYTES, TOKENS, wire_s=2.5, codec=kv_pb2.CODEC_NONE)
    assert noticed == [came]
    assert inbox.peek("t") == (TOKENS, b"digest", 0)
    assert inbox.bytes_held == WHOLE_BYTES
    taken = inbox.take("t")
    assert taken is not None
    assert {layer: len(of_layer) for layer, of_layer in taken.items()} == {0: 2, 1: 2}
    assert inbox.take("t") is None
    assert inbox.peek("t") is None
    assert (inbox.bytes_held, inbox.transfers_held) == (0, 0)
    # Frames that come twice do not open it again.
    assert inbox.receive(open_frame()) == (TransferState.FAILED, "the transfer is over")
    assert (inbox.bytes_held, inbox.transfers_held) == (0, 0)


@given(data=st.data())
def test_frames_may_come_in_any_order_and_any_cut(data: st.DataObject) -> None:
    cut = kv_frames(
        tokens_a_frame=data.draw(st.integers(1, TOKENS)),
        heads_a_frame=data.draw(st.sampled_from([1, 2])),
    )
    frames = data.draw(st.permutations(cut))
    inbox = make_inbox()
    inbox.receive(open_frame())
    states = [inbox.receive(frame)[0] for frame in frames]
    assert states == [TransferState.ARRIVING] * (len(frames) - 1) + [TransferState.WHOLE]
    taken = inbox.take("t")
    assert taken is not None
    assert sorted(cells([f for of_layer in taken.values() for f in of_layer])) == ALL_CELLS
    assert all(f.header.kv.layer == layer for layer, of in taken.items() for f in of)
    assert inbox.bytes_held == 0


def test_bytes_of_a_transfer_are_reserved_when_it_opens() -> None:
    inbox = make_inbox()
    inbox.receive(open_frame())
    assert inbox.bytes_held == WHOLE_BYTES
    inbox.receive(kv_frame(layer=0))
    assert inbox.bytes_held == WHOLE_BYTES


def test_transfers_do_not_touch_each_other() -> None:
    inbox = make_inbox()
    receive_all(inbox, open_frame("a"), open_frame("b"))
    assert receive_all(inbox, *kv_frames("a"))[0] is TransferState.WHOLE
    assert inbox.receive(kv_frame("b", layer=99))[0] is TransferState.FAILED
    assert inbox.bytes_held == WHOLE_BYTES
    assert inbox.take("a") is not None
    assert inbox.bytes_held == 0


# --- faults -----------------------------------------------------------------------------------

WRONG_FRAMES = {
    "a frame twice": (kv_frame(first_token=0, tokens=2), "arrived twice"),
    "tokens overlap": (kv_frame(first_token=1, tokens=3), "arrived twice"),
    "heads overlap": (kv_frame(tokens=2, first_head=HEADS[1], heads=1), "arrived twice"),
    "layer out of range": (kv_frame(layer=GEOMETRY.layers), "layer 2 of a model of 2"),
    "tokens out of range": (kv_frame(first_token=4, tokens=3), "tokens 4 to 7 of a prompt of 6"),
    "tokens far out of range": (kv_frame(first_token=2**64 - 2, tokens=4), "of a prompt of 6"),
    "no tokens": (kv_frame(first_token=3, tokens=0), "tokens 3 to 3"),
    "head too low": (kv_frame(layer=1, first_head=1), "KV heads 1 to 3"),
    "head too high": (kv_frame(layer=1, first_head=3), "KV heads 3 to 5"),
    "no heads": (kv_frame(layer=1, heads=0), "KV heads 2 to 2"),
    "payload too short": (kv_frame(layer=1, extra_bytes=-1), "a payload of 191 bytes where 192"),
    "payload too long": (kv_frame(layer=1, extra_bytes=1), "a payload of 193 bytes where 192"),
    "unknown codec": (kv_frame(layer=1, codec=7), "codec 7"),
    "unknown key order": (kv_frame(layer=1, key_order=7), "key order 7"),
    "blocks of no tokens": (
        kv_frame(layer=1, key_order=kv_pb2.KEY_ORDER_BLOCKS),
        "6 tokens in blocks of 0",
    ),
    "part of a block": (
        kv_frame(layer=1, key_order=kv_pb2.KEY_ORDER_BLOCKS, block_tokens=4),
        "6 tokens in blocks of 4",
    ),
    "opened twice": (open_frame(), "opened twice"),
    "abort": (abort_frame(), "the sender gave up: preempted"),
}


@pytest.mark.parametrize("fault", WRONG_FRAMES)
def test_a_wrong_frame_fails_the_transfer_whole(fault: str) -> None:
    inbox, noticed = make_inbox(), list[Settled]()
    inbox.expect("t", SENDER, noticed.append)
    frame, reason = WRONG_FRAMES[fault]
    receive_all(inbox, open_frame(), kv_frame(first_token=0, tokens=2))
    state, said = inbox.receive(frame)
    assert state is TransferState.FAILED
    assert reason in said
    failure = HandoffFailure.SENDER if fault == "abort" else HandoffFailure.WRONG
    assert noticed == [Settled("t", False, said, codec=kv_pb2.CODEC_NONE, failure=failure)]
    assert inbox.bytes_held == 0
    # What was missing comes after all: too late.
    assert receive_all(inbox, *kv_frames()) == (TransferState.FAILED, said)
    assert_failed(inbox)
    assert len(noticed) == 1


@pytest.mark.parametrize(
    ("reached", "parts_s", "failure"),
    [
        ("nothing", (0, 0, 0), HandoffFailure.LATE),
        ("too large", (0, 0, 0), HandoffFailure.NO_ROOM),
        ("waits for room", (4, 0, 0), HandoffFailure.LATE),
        ("has room", (1, 4, 0), HandoffFailure.LATE),
        ("some came", (1, 2, 4), HandoffFailure.LATE),
        ("all came", (1, 2, 3), HandoffFailure.WRONG),
    ],
)
def test_one_that_fails_tells_why_and_how_far_it_came(
    reached: str, parts_s: tuple[float, ...], failure: HandoffFailure
) -> None:
    """Whole or not, its parts add up to the time from its opening."""
    clock, noticed = Clock(), list[Settled]()
    inbox = make_inbox(max_bytes=WHOLE_BYTES, clock=clock)
    receive_all(inbox, open_frame("before"))
    opened = open_frame(tokens=TOKENS + (reached == "too large"))
    opened.header.open.transport, opened.header.open.instead_of = "grpc", "nixl"
    if reached != "nothing":
        inbox.receive(opened)
    if reached in ("has room", "some came", "all came"):
        clock.now_s += 1
        inbox.drop("before", "it makes room")
    first, *others = kv_frames()
    if reached in ("some came", "all came"):
        clock.now_s += 2
        inbox.receive(first)
    if reached == "all came":
        clock.now_s += 3
        receive_all(inbox, *others)
    clock.now_s += 4
    if reached == "all came":
        inbox.receive(first)
    else:
        inbox.fail("t", "not whole in time", HandoffFailure.LATE)
    clock.now_s += 5
    inbox.expect("t", SENDER, noticed.append)
    if reached == "nothing":
        inbox.fail("t", "not whole in time", HandoffFailure.LATE)
    (how,) = noticed
    assert (how.whole, how.failure) == (False, failure)
    assert (how.credit_wait_s, how.first_layer_s, how.wire_s) == parts_s
    ways = ("", "") if reached == "nothing" else ("grpc", "nixl")
    assert (how.transport, how.instead_of) == ways
    assert how.codec == (kv_pb2.CODEC_NONE if reached in ("some came", "all came") else None)


def test_a_missing_layer_is_not_whole() -> None:
    inbox = make_inbox()
    inbox.receive(open_frame())
    assert receive_all(inbox, *kv_frames()[:-1])[0] is TransferState.ARRIVING
    assert inbox.take("t") is None
    inbox.fail("t", "the stream ended")
    assert_failed(inbox)


def test_a_frame_before_the_transfer_is_opened_fails_it() -> None:
    inbox, noticed = make_inbox(), list[Settled]()
    inbox.expect("t", SENDER, noticed.append)
    state, reason = inbox.receive(kv_frame())
    assert state is TransferState.FAILED
    assert "before the transfer was opened" in reason
    assert noticed == [Settled("t", False, reason, failure=HandoffFailure.WRONG)]
    assert receive_all(inbox, open_frame(), *kv_frames())[0] is TransferState.FAILED
    assert_failed(inbox)


def test_a_transfer_of_no_tokens_is_refused() -> None:
    inbox = make_inbox()
    assert inbox.receive(open_frame(tokens=0)) == (TransferState.FAILED, "a transfer of no tokens")
    assert_failed(inbox)


def test_a_transfer_for_an_older_incarnation_is_refused() -> None:
    inbox = make_inbox()
    state, reason = inbox.receive(open_frame(to_incarnation="here-0"))
    assert state is TransferState.FAILED
    assert "here-0" in reason and HERE in reason
    assert_failed(inbox)


@pytest.mark.parametrize("order", ["claim first", "open first", "whole first"])
def test_a_transfer_from_another_incarnation_is_not_adopted(order: str) -> None:
    inbox, noticed = make_inbox(), list[Settled]()
    if order == "claim first":
        inbox.expect("t", SENDER, noticed.append)
    inbox.receive(open_frame(sender=OTHER_SENDER))
    if order == "whole first":
        assert receive_all(inbox, *kv_frames())[0] is TransferState.WHOLE
    if order != "claim first":
        inbox.expect("t", SENDER, noticed.append)
    (settled,) = noticed
    assert not settled.whole
    assert "prefill/prefill-0, not from prefill/prefill-1" in settled.reason
    assert_failed(inbox)


def test_a_transfer_that_never_fits_is_refused_and_others_stay() -> None:
    inbox = make_inbox(max_bytes=WHOLE_BYTES)
    assert inbox.receive(open_frame("a"))[0] is TransferState.ARRIVING
    state, reason = inbox.receive(open_frame("b", tokens=TOKENS + 1))
    assert state is TransferState.FAILED
    asked_bytes = WHOLE_BYTES + GEOMETRY.bytes_per_token
    assert reason == f"the inbox is too small: {asked_bytes} bytes asked, it holds {WHOLE_BYTES}"
    assert inbox.bytes_held == WHOLE_BYTES
    assert receive_all(inbox, *kv_frames("a"))[0] is TransferState.WHOLE


def test_a_transfer_that_fits_exactly_is_taken() -> None:
    inbox = make_inbox(max_bytes=WHOLE_BYTES)
    assert receive_all(inbox, open_frame(), *kv_frames())[0] is TransferState.WHOLE


@pytest.mark.parametrize("late", [kv_frame(), open_frame()], ids=["kv", "open"])
def test_a_frame_after_the_transfer_was_whole_fails_it(late: Frame) -> None:
    inbox = make_inbox()
    receive_all(inbox, open_frame(), *kv_frames())
    state, reason = inbox.receive(late)
    assert state is TransferState.FAILED
    assert "after the transfer was whole" in reason
    assert_failed(inbox)


def test_a_sender_that_gives_up_after_all_was_sent_spoils_nothing() -> None:
    inbox = make_inbox()
    receive_all(inbox, open_frame(), *kv_frames())
    assert inbox.receive(abort_frame()) == (TransferState.WHOLE, "")
    assert inbox.take("t") is not None


@pytest.mark.parametrize("arrived", range(4))
def test_frames_after_a_drop_are_refused(arrived: int) -> None:
    inbox = make_inbox()
    frames = [open_frame(), *kv_frames()]
    receive_all(inbox, *frames[:arrived])
    inbox.drop("t", "the router gave it up")
    assert (inbox.bytes_held, inbox.transfers_held) == (0, 0)
    for frame in frames[arrived:]:
        assert inbox.receive(frame) == (TransferState.FAILED, "the transfer is over")
    assert inbox.take("t") is None
    assert (inbox.bytes_held, inbox.transfers_held) == (0, 0)


def test_failing_what_is_whole_or_unknown_changes_nothing() -> None:
    inbox = make_inbox()
    inbox.fail("unknown", "no such thing")
    assert inbox.transfers_held == 0
    receive_all(inbox, open_frame(), *kv_frames())
    inbox.fail("t", "the stream broke after the last frame")
    assert inbox.take("t") is not None
