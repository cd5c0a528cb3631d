"""The inbox: a transfer is adopted whole or not at all, and what it held is freed either way."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cluster.wire import kv_pb2
from workers.kv import inbox as inbox_module
from workers.kv.codecs import group_codec
from workers.kv.frames import Frame
from workers.kv.inbox import Inbox
from workers.kv.incoming import KvGeometry, Settled, TransferState

GEOMETRY = KvGeometry(layers=2, first_head=2, heads=2, head_size=4, element_bytes=2)
HEADS = range(GEOMETRY.first_head, GEOMETRY.first_head + GEOMETRY.heads)
HERE = "here-1"
SENDER = ("prefill", "prefill-1")
OTHER_SENDER = ("prefill", "prefill-0")
MAX_IDLE_S = 10.0
TOKENS = 6
WHOLE_BYTES = TOKENS * GEOMETRY.bytes_per_token


@dataclass
class Clock:
    now_s: float = 1000.0

    def __call__(self) -> float:
        return self.now_s


def make_inbox(
    max_bytes: int = 10 * WHOLE_BYTES, clock: Callable[[], float] | None = None
) -> Inbox:
    return Inbox(GEOMETRY, HERE, max_bytes, MAX_IDLE_S, clock or Clock())


def open_frame(
    transfer_id: str = "t",
    tokens: int = TOKENS,
    sender: tuple[str, str] = SENDER,
    to_incarnation: str = HERE,
    expects_held: bool = False,
) -> Frame:
    opened = kv_pb2.OpenTransfer(
        tokens=tokens,
        prompt_digest=b"digest",
        from_worker_id=sender[0],
        from_incarnation=sender[1],
        to_incarnation=to_incarnation,
        expects_held=expects_held,
    )
    return Frame(kv_pb2.FrameHeader(transfer_id=transfer_id, open=opened), memoryview(b""))


def kv_frame(
    transfer_id: str = "t",
    layer: int = 0,
    first_token: int = 0,
    tokens: int = TOKENS,
    first_head: int = HEADS.start,
    heads: int = len(HEADS),
    extra_bytes: int = 0,
    **fields: int,
) -> Frame:
    kv = kv_pb2.KvFrame(
        layer=layer,
        first_token=first_token,
        tokens=tokens,
        first_head=first_head,
        heads=heads,
        **fields,
    )
    payload = bytes(GEOMETRY.frame_bytes(tokens, heads) + extra_bytes)
    return Frame(kv_pb2.FrameHeader(transfer_id=transfer_id, kv=kv), memoryview(payload))


def abort_frame(transfer_id: str = "t") -> Frame:
    abort = kv_pb2.AbortTransfer(reason="preempted")
    return Frame(kv_pb2.FrameHeader(transfer_id=transfer_id, abort=abort), memoryview(b""))


def kv_frames(
    transfer_id: str = "t",
    tokens: int = TOKENS,
    tokens_a_frame: int = TOKENS,
    heads_a_frame: int = len(HEADS),
) -> list[Frame]:
    """All of a transfer's KV, cut evenly."""
    return [
        kv_frame(
            transfer_id, layer, first, min(tokens_a_frame, tokens - first), head, heads_a_frame
        )
        for layer in range(GEOMETRY.layers)
        for first in range(0, tokens, tokens_a_frame)
        for head in HEADS[::heads_a_frame]
    ]


def cells(frames: Sequence[Frame]) -> list[tuple[int, int, int]]:
    """Every (layer, token, head) that some frames bring."""
    return [
        (kv.layer, token, head)
        for kv in (frame.header.kv for frame in frames)
        for token in range(kv.first_token, kv.first_token + kv.tokens)
        for head in range(kv.first_head, kv.first_head + kv.heads)
    ]


ALL_CELLS = sorted(itertools.product(range(GEOMETRY.layers), range(TOKENS), HEADS))


def receive_all(inbox: Inbox, *frames: Frame) -> tuple[TransferState, str]:
    result = TransferState.ARRIVING, ""
    for frame in frames:
        result = inbox.receive(frame)
    return result


def assert_failed(inbox: Inbox, transfer_id: str = "t") -> None:
    """The transfer failed, nothing of it can be adopted, and it holds no bytes."""
    state, _ = inbox.receive(kv_frame(transfer_id))
    assert state is TransferState.FAILED
    assert inbox.peek(transfer_id) is None
    assert inbox.take(transfer_id) is None
    assert inbox.bytes_held == 0


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

    assert noticed == [Settled("t", True, "", WHOLE_BYTES, TOKENS, wire_s=2.5)]
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
    assert noticed == [Settled("t", False, said)]
    assert inbox.bytes_held == 0
    # What was missing comes after all: too late.
    assert receive_all(inbox, *kv_frames()) == (TransferState.FAILED, said)
    assert_failed(inbox)
    assert len(noticed) == 1


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
    assert noticed == [Settled("t", False, reason)]
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


# --- time -------------------------------------------------------------------------------------


def test_idle_transfers_are_swept_whatever_their_state() -> None:
    clock = Clock()
    inbox, noticed = make_inbox(clock=clock), list[Settled]()
    receive_all(inbox, open_frame("arriving"))
    receive_all(inbox, open_frame("whole"), *kv_frames("whole"))
    receive_all(inbox, kv_frame("failed"))
    inbox.expect("claimed", SENDER, noticed.append)
    clock.now_s += MAX_IDLE_S
    assert inbox.sweep() == []
    assert inbox.transfers_held == 3
    clock.now_s += 0.1
    assert sorted(inbox.sweep()) == ["arriving", "claimed", "failed", "whole"]
    assert (inbox.bytes_held, inbox.transfers_held) == (0, 0)
    assert [s.reason for s in noticed] == ["nobody touched it for 10 s"]
    assert inbox.receive(kv_frame("arriving"))[0] is TransferState.FAILED


def test_what_is_whole_waits_less_for_its_router() -> None:
    clock = Clock()
    inbox = Inbox(GEOMETRY, HERE, 10 * WHOLE_BYTES, MAX_IDLE_S, clock, max_unclaimed_s=3.0)
    receive_all(inbox, open_frame("arriving"))
    for transfer_id in ("unclaimed", "claimed"):
        receive_all(inbox, open_frame(transfer_id), *kv_frames(transfer_id))
    inbox.expect("claimed", SENDER, lambda settled: None)
    clock.now_s += 3.0
    assert inbox.sweep() == []
    clock.now_s += 0.1
    assert inbox.sweep() == ["unclaimed"]
    assert inbox.bytes_held == 2 * WHOLE_BYTES


@pytest.mark.parametrize("touch", ["frame", "claim"])
def test_what_is_touched_is_not_idle(touch: str) -> None:
    clock = Clock()
    inbox, noticed = make_inbox(clock=clock), list[Settled]()
    inbox.receive(open_frame())
    clock.now_s += MAX_IDLE_S
    if touch == "frame":
        inbox.receive(kv_frame(layer=0))
    else:
        inbox.expect("t", SENDER, noticed.append)
    clock.now_s += MAX_IDLE_S
    assert inbox.sweep() == []
    clock.now_s += 0.1
    assert inbox.sweep() == ["t"]


def test_a_drop_is_remembered_for_a_while_and_not_for_ever() -> None:
    clock = Clock()
    inbox = make_inbox(clock=clock)
    inbox.drop("t", "not wanted")
    clock.now_s += 4 * MAX_IDLE_S
    inbox.sweep()
    assert inbox.receive(open_frame())[0] is TransferState.FAILED
    clock.now_s += 0.1
    inbox.sweep()
    assert inbox.receive(open_frame())[0] is TransferState.ARRIVING


# --- room -------------------------------------------------------------------------------------


class Credits:
    """Who was told what, in this order."""

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox
        self.told: list[tuple[str, str]] = []

    def ask(self, transfer_id: str, tokens: int = TOKENS) -> TransferState:
        state, _ = self._inbox.receive(open_frame(transfer_id, tokens))
        self._inbox.await_credit(transfer_id, lambda why: self.told.append((transfer_id, why)))
        return state


def test_who_finds_no_room_waits_and_the_first_comes_first() -> None:
    clock = Clock()
    inbox, noticed = make_inbox(2 * WHOLE_BYTES, clock), list[Settled]()
    asked = Credits(inbox)
    assert asked.ask("a") is asked.ask("b") is TransferState.ARRIVING
    assert asked.told == [("a", ""), ("b", "")]
    # There is room for the last of them, and it waits for its turn all the same.
    receive_all(inbox, *kv_frames("b"))
    inbox.take("b")
    assert asked.ask("large", 2 * TOKENS) is TransferState.WAITING
    assert asked.ask("small") is TransferState.WAITING
    inbox.expect("small", SENDER, noticed.append)
    assert (inbox.bytes_held, inbox.transfers_waiting) == (WHOLE_BYTES, 2)
    clock.now_s += 3.0
    receive_all(inbox, *kv_frames("a"))
    inbox.take("a")
    assert asked.told[2:] == [("large", "")]
    assert (inbox.bytes_held, inbox.transfers_waiting) == (2 * WHOLE_BYTES, 1)
    clock.now_s += 1.0
    inbox.fail("large", "its sender is gone")
    assert asked.told[3:] == [("small", "")]
    clock.now_s += 0.5
    receive_all(inbox, *kv_frames("small")[:-1])
    clock.now_s += 0.25
    receive_all(inbox, kv_frames("small")[-1])
    (settled,) = noticed
    assert (settled.whole, settled.credit_wait_s) == (True, 4.0)
    assert (settled.first_layer_s, settled.wire_s) == (0.5, 0.25)


@pytest.mark.parametrize("end", ["fail", "drop", "abort", "sweep", "claim of another"])
def test_who_waits_for_room_may_end_and_lets_the_next_by(end: str) -> None:
    clock = Clock()
    inbox = make_inbox(WHOLE_BYTES, clock)
    asked = Credits(inbox)
    assert asked.ask("holds", TOKENS - 1) is TransferState.ARRIVING
    assert asked.ask("waits") is TransferState.WAITING
    if end == "sweep":
        clock.now_s += MAX_IDLE_S
        inbox.receive(kv_frame("holds", tokens=1))
        clock.now_s += 0.1
    assert asked.ask("next", 1) is TransferState.WAITING
    match end:
        case "fail":
            inbox.fail("waits", "why")
        case "drop":
            inbox.drop("waits", "why")
        case "abort":
            inbox.receive(abort_frame("waits"))
        case "sweep":
            assert inbox.sweep() == ["waits"]
        case _:
            inbox.expect("waits", OTHER_SENDER, lambda settled: None)
    told = dict(asked.told)
    assert (len(asked.told), bool(told["waits"]), told["next"]) == (3, True, "")
    assert (inbox.bytes_held, inbox.transfers_waiting) == (WHOLE_BYTES, 0)


def test_frames_before_there_is_room_fail_the_transfer() -> None:
    inbox = make_inbox(WHOLE_BYTES)
    asked = Credits(inbox)
    asked.ask("holds"), asked.ask("waits")
    state, reason = inbox.receive(kv_frame("waits"))
    assert state is TransferState.FAILED
    assert reason == "a frame arrived before there was room for the transfer"
    assert asked.told == [("holds", ""), ("waits", reason)]
    assert inbox.bytes_held == WHOLE_BYTES


def test_credit_for_what_is_over_is_refused_at_once() -> None:
    inbox, told = make_inbox(), list[str]()
    inbox.drop("t", "not wanted")
    inbox.receive(open_frame())
    inbox.await_credit("t", told.append)
    assert told == ["the transfer is over"]


def test_codec_that_spares_bytes_makes_room() -> None:
    """Coded frames come to less than was set aside."""
    coded = kv_frame("a", codec=kv_pb2.CODEC_INT8)
    codec = group_codec(kv_pb2.CODEC_INT8)
    assert codec is not None
    shape = (TOKENS, len(HEADS), GEOMETRY.head_size)
    payload = memoryview(bytes(codec.payload_bytes(*shape)))
    spared = GEOMETRY.frame_bytes(TOKENS, len(HEADS)) - len(payload)
    assert spared >= 0
    inbox = make_inbox(2 * WHOLE_BYTES - spared)
    asked = Credits(inbox)
    asked.ask("a")
    assert asked.ask("b") is (TransferState.WAITING if spared else TransferState.ARRIVING)
    assert inbox.receive(Frame(coded.header, payload))[0] is TransferState.ARRIVING
    assert asked.told == [("a", ""), ("b", "")]


def test_only_so_many_may_wait_for_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox_module, "WAITING_MAX", 2)
    inbox = make_inbox(WHOLE_BYTES)
    asked = Credits(inbox)
    states = [asked.ask(name) for name in ("holds", "b", "c", "d")]
    waiting = TransferState.WAITING
    assert states == [TransferState.ARRIVING, waiting, waiting, TransferState.FAILED]
    assert "2 transfers wait for room" in asked.told[-1][1]


def test_only_so_many_failed_and_dropped_ones_are_remembered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inbox_module, "OVER_MAX", 3)
    inbox = make_inbox()
    for number in range(9):
        inbox.receive(kv_frame(f"unknown {number}"))
        inbox.drop(f"dropped {number}", "not wanted")
    assert inbox.transfers_held == 0
    assert inbox.receive(open_frame("unknown 8"))[0] is TransferState.FAILED
    assert inbox.receive(open_frame("dropped 8"))[0] is TransferState.FAILED
    assert inbox.receive(open_frame("unknown 0"))[0] is TransferState.ARRIVING
    assert inbox.receive(open_frame("dropped 0"))[0] is TransferState.ARRIVING


# --- the claim --------------------------------------------------------------------------------


def test_a_claim_is_answered_once_in_every_order_of_events() -> None:
    frames = {"open": open_frame(), "layer 0": kv_frame(layer=0), "layer 1": kv_frame(layer=1)}
    for order in itertools.permutations(["expect", *frames, "fail", "drop"]):
        inbox, noticed = make_inbox(), list[Settled]()
        for event in order:
            if event == "expect":
                inbox.expect("t", SENDER, noticed.append)
            elif event == "fail":
                inbox.fail("t", "failed")
            elif event == "drop":
                inbox.drop("t", "dropped")
            else:
                inbox.receive(frames[event])
        assert len(noticed) == 1, order
        at = order.index
        intact = at("open") < min(at("layer 0"), at("layer 1"))
        last = max(at("layer 0"), at("layer 1"))
        # A failure of what has not begun, or is whole, is none.
        undisturbed = not at("open") < at("fail") < last and last < at("drop")
        claimed_before = at("expect") < at("fail") < last
        expected = intact and undisturbed and not claimed_before and at("expect") < at("drop")
        assert noticed[0].whole == expected, order
        assert (inbox.bytes_held, inbox.transfers_held) == (0, 0), order


@pytest.mark.parametrize("event", ["fail", "drop", "abort"])
def test_a_claim_is_answered_at_once(event: str) -> None:
    inbox, noticed = make_inbox(), list[Settled]()
    inbox.receive(open_frame())
    inbox.expect("t", SENDER, noticed.append)
    assert noticed == []
    if event == "fail":
        inbox.fail("t", "why")
    elif event == "drop":
        inbox.drop("t", "why")
    else:
        inbox.receive(abort_frame())
    assert [settled.whole for settled in noticed] == [False]
    late = list[Settled]()
    inbox.expect("t", SENDER, late.append)
    assert [settled.whole for settled in late] == [False]


def test_a_second_claim_is_refused_and_the_first_stays() -> None:
    inbox = make_inbox()
    first, second, third = list[Settled](), list[Settled](), list[Settled]()
    inbox.expect("t", SENDER, first.append)
    inbox.expect("t", SENDER, second.append)
    refused = Settled("t", False, "another decode leg has claimed the transfer")
    assert (first, second) == ([], [refused])
    receive_all(inbox, open_frame(), *kv_frames())
    assert [settled.whole for settled in first] == [True]
    inbox.expect("t", SENDER, third.append)
    assert third == [refused]
    assert inbox.take("t") is not None


def test_a_claim_may_act_on_the_inbox_when_it_is_answered() -> None:
    inbox, taken = make_inbox(), list[object]()
    inbox.expect("t", SENDER, lambda settled: taken.append(inbox.take(settled.transfer_id)))
    receive_all(inbox, open_frame(), *kv_frames())
    assert len(taken) == 1 and taken[0] is not None
    inbox.expect("u", SENDER, lambda settled: inbox.drop(settled.transfer_id, settled.reason))
    inbox.receive(abort_frame("u"))
    assert (inbox.bytes_held, inbox.transfers_held) == (0, 0)


# --- against a model --------------------------------------------------------------------------


@dataclass
class Expected:
    """What the inbox should think of one transfer."""

    touched_at_s: float
    state: TransferState = TransferState.ARRIVING
    tokens: int | None = None
    sender: tuple[str, str] | None = None
    claimed_by: tuple[str, str] | None = None
    has_room: bool = False
    cells: set[tuple[int, int, int]] = field(default_factory=set)

    @property
    def whole_bytes(self) -> int:
        held = self.has_room and self.state is not TransferState.FAILED
        return (self.tokens or 0) * GEOMETRY.bytes_per_token if held else 0

    def all_cells(self) -> set[tuple[int, int, int]]:
        return set(itertools.product(range(GEOMETRY.layers), range(self.tokens or 0), HEADS))


IDS = st.sampled_from(["a", "b", "c", "d"])
SENDERS = st.sampled_from([SENDER, SENDER, SENDER, OTHER_SENDER])


class InboxMachine(RuleBasedStateMachine):
    """Any operations in any order, next to a model that keeps a set of cells for each transfer."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.inbox = make_inbox(max_bytes=2 * WHOLE_BYTES, clock=self.clock)
        self.model: dict[str, Expected] = {}
        self.dropped: dict[str, float] = {}
        self.queue: list[str] = []
        self.claims: list[list[Settled]] = []
        self.unanswered: dict[str, list[Settled]] = {}

    def expected(self, transfer_id: str) -> Expected:
        return self.model.setdefault(transfer_id, Expected(self.clock.now_s))

    def settle(self, transfer_id: str) -> None:
        """The claim of a transfer that is settled must have been answered, and truly."""
        expected = self.model.get(transfer_id)
        state = expected.state if expected else TransferState.FAILED
        if state not in (TransferState.ARRIVING, TransferState.WAITING):
            noticed = self.unanswered.pop(transfer_id, None)
            if noticed is not None:
                assert [s.whole for s in noticed] == [state is TransferState.WHOLE]

    def give_room(self) -> None:
        """To those in the queue, in its order."""
        alive = [i for i in self.queue if i in self.model]
        self.queue = [i for i in alive if self.model[i].state is TransferState.WAITING]
        for transfer_id in list(self.queue):
            expected = self.model[transfer_id]
            needed = (expected.tokens or 0) * GEOMETRY.bytes_per_token
            held = sum(other.whole_bytes for other in self.model.values())
            if held + needed > self.inbox.max_bytes:
                return
            self.queue.remove(transfer_id)
            expected.has_room, expected.state = True, TransferState.ARRIVING
            expected.touched_at_s = self.clock.now_s

    def receive(self, frame: Frame, accepts: Callable[[Expected], bool]) -> None:
        transfer_id = frame.header.transfer_id
        state, reason = self.inbox.receive(frame)
        assert bool(reason) == (state is TransferState.FAILED)
        if transfer_id in self.dropped:
            assert state is TransferState.FAILED
            return
        expected = self.expected(transfer_id)
        if expected.state in (TransferState.ARRIVING, TransferState.WAITING):
            expected.touched_at_s = self.clock.now_s
            if not accepts(expected):
                expected.state = TransferState.FAILED
            elif expected.cells and expected.cells == expected.all_cells():
                expected.state = TransferState.WHOLE
        elif frame.header.WhichOneof("kind") != "abort":
            expected.state = TransferState.FAILED
        self.give_room()
        assert state is expected.state
        self.settle(transfer_id)

    @rule(
        transfer_id=IDS,
        tokens=st.sampled_from([TOKENS, 1, 2, 3 * TOKENS]),
        sender=SENDERS,
        to_incarnation=st.sampled_from([HERE, HERE, HERE, "here-0"]),
    )
    def open(
        self, transfer_id: str, tokens: int, sender: tuple[str, str], to_incarnation: str
    ) -> None:
        def accepts(expected: Expected) -> bool:
            if (
                expected.tokens is not None
                or to_incarnation != HERE
                or expected.claimed_by not in (None, sender)
                or tokens * GEOMETRY.bytes_per_token > self.inbox.max_bytes
            ):
                return False
            expected.tokens, expected.sender = tokens, sender
            expected.state = TransferState.WAITING
            self.queue.append(transfer_id)
            return True

        self.receive(open_frame(transfer_id, tokens, sender, to_incarnation), accepts)

    @rule(
        transfer_id=IDS,
        layer=st.integers(0, GEOMETRY.layers),
        first_token=st.integers(0, TOKENS),
        tokens=st.integers(0, TOKENS),
        first_head=st.integers(HEADS.start - 1, HEADS.stop),
        heads=st.integers(0, len(HEADS)),
        extra_bytes=st.sampled_from([0, 0, 0, 0, 0, 8]),
    )
    def kv(self, transfer_id: str, extra_bytes: int, **where: int) -> None:
        frame = kv_frame(transfer_id, extra_bytes=extra_bytes, **where)
        self.receive(frame, lambda expected: self.accepts_kv(expected, frame, extra_bytes))

    @staticmethod
    def accepts_kv(expected: Expected, frame: Frame, extra_bytes: int = 0) -> bool:
        if expected.state is TransferState.WAITING or extra_bytes:
            return False
        new = set(cells([frame]))
        if not new or not new <= expected.all_cells() - expected.cells:
            return False
        expected.cells |= new
        return True

    @rule(
        transfer_id=IDS,
        tokens_a_frame=st.integers(1, TOKENS),
        seed=st.integers(0, 99),
        left_out=st.sampled_from([0, 0, 1, 3]),
        sender=SENDERS,
    )
    def the_rest(
        self,
        transfer_id: str,
        tokens_a_frame: int,
        seed: int,
        left_out: int,
        sender: tuple[str, str],
    ) -> None:
        """What a transfer misses, or some of it, so that many become whole."""
        expected = self.model.get(transfer_id)
        if expected is None or expected.tokens is None:
            self.open(transfer_id, TOKENS, sender, HERE)
        expected = self.model.get(transfer_id)
        if expected is None or expected.state is not TransferState.ARRIVING or not expected.tokens:
            return
        frames = kv_frames(transfer_id, expected.tokens, tokens_a_frame, heads_a_frame=1)
        random.Random(seed).shuffle(frames)
        for frame in frames[left_out:]:
            if expected.cells.isdisjoint(cells([frame])):
                self.receive(frame, lambda e, frame=frame: self.accepts_kv(e, frame))

    @rule(transfer_id=IDS, which=st.integers(min_value=0))
    def again(self, transfer_id: str, which: int) -> None:
        """A cell that has come before."""
        expected = self.model.get(transfer_id)
        if expected is not None and expected.cells:
            layer, token, head = sorted(expected.cells)[which % len(expected.cells)]
            self.receive(kv_frame(transfer_id, layer, token, 1, head, 1), lambda expected: False)

    @rule(transfer_id=IDS)
    def abort(self, transfer_id: str) -> None:
        self.receive(abort_frame(transfer_id), lambda expected: False)

    @precondition(lambda self: len(self.unanswered) < 4)
    @rule(transfer_id=IDS, sender=SENDERS)
    def expect(self, transfer_id: str, sender: tuple[str, str]) -> None:
        if transfer_id in self.unanswered:
            return
        noticed: list[Settled] = []
        self.claims.append(noticed)
        self.unanswered[transfer_id] = noticed
        self.inbox.expect(transfer_id, sender, noticed.append)
        if transfer_id not in self.dropped:
            expected = self.expected(transfer_id)
            if expected.claimed_by is not None:
                assert [settled.whole for settled in noticed] == [False]
                del self.unanswered[transfer_id]
                return
            expected.touched_at_s = self.clock.now_s
            expected.claimed_by = sender
            if expected.sender not in (None, sender):
                expected.state = TransferState.FAILED
                self.give_room()
        self.settle(transfer_id)

    @rule(transfer_id=IDS)
    def take(self, transfer_id: str) -> None:
        taken = self.inbox.take(transfer_id)
        expected = self.model.get(transfer_id)
        if expected is None or expected.state is not TransferState.WHOLE:
            assert taken is None
            return
        assert taken is not None
        arrived = cells([frame for frames in taken.values() for frame in frames])
        assert len(arrived) == len(set(arrived))
        assert set(arrived) == expected.all_cells()
        del self.model[transfer_id]
        self.dropped[transfer_id] = self.clock.now_s
        self.give_room()

    @rule(transfer_id=IDS)
    def fail(self, transfer_id: str) -> None:
        self.inbox.fail(transfer_id, "the stream ended")
        expected = self.model.get(transfer_id)
        alive = (TransferState.ARRIVING, TransferState.WAITING)
        if expected is not None and expected.state in alive:
            expected.state = TransferState.FAILED
            self.give_room()
            self.settle(transfer_id)

    @rule(transfer_id=IDS)
    def drop(self, transfer_id: str) -> None:
        self.inbox.drop(transfer_id, "not wanted")
        self.dropped[transfer_id] = self.clock.now_s
        self.forget(transfer_id)

    def forget(self, transfer_id: str) -> None:
        if self.model.pop(transfer_id, None) is not None:
            self.give_room()
            self.settle(transfer_id)

    @rule(seconds=st.sampled_from([1.0, MAX_IDLE_S / 2, MAX_IDLE_S + 1, 5 * MAX_IDLE_S]))
    def wait_and_sweep(self, seconds: float) -> None:
        self.clock.now_s += seconds
        now_s = self.clock.now_s
        swept = self.inbox.sweep()
        idle = [i for i, e in self.model.items() if now_s - e.touched_at_s > MAX_IDLE_S]
        assert sorted(swept) == sorted(idle)
        self.dropped = {i: at for i, at in self.dropped.items() if now_s - at <= 4 * MAX_IDLE_S}
        for transfer_id in idle:
            self.dropped[transfer_id] = now_s
            self.forget(transfer_id)

    @invariant()
    def holds_what_is_open_and_no_more(self) -> None:
        assert self.inbox.bytes_held == sum(e.whole_bytes for e in self.model.values())
        assert 0 <= self.inbox.bytes_held <= self.inbox.max_bytes
        failed = sum(e.state is TransferState.FAILED for e in self.model.values())
        assert self.inbox.transfers_held == len(self.model) - failed
        assert self.inbox.transfers_waiting == len(self.queue)

    @invariant()
    def answers_each_claim_at_most_once(self) -> None:
        pending = [id(noticed) for noticed in self.unanswered.values()]
        for noticed in self.claims:
            assert len(noticed) == (0 if id(noticed) in pending else 1)

    def teardown(self) -> None:
        for transfer_id in list(self.model):
            self.drop(transfer_id)
        assert not self.unanswered
        assert (self.inbox.bytes_held, self.inbox.transfers_held) == (0, 0)


InboxMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
test_any_operations_agree_with_a_model = InboxMachine.TestCase


# --- threads ----------------------------------------------------------------------------------


def test_senders_claims_and_drops_may_come_from_many_threads() -> None:
    transfers = [f"t{i}" for i in range(60)]
    dropped = set(transfers[::3])

    def clock() -> float:
        # The inbox asks for the time while it changes things: let another thread in.
        time.sleep(0)
        return 1000.0

    inbox = make_inbox(max_bytes=len(transfers) * WHOLE_BYTES, clock=clock)
    noticed: dict[str, list[Settled]] = {transfer_id: [] for transfer_id in transfers}
    together = {transfer_id: threading.Barrier(2) for transfer_id in transfers}
    errors: list[BaseException] = []

    def run(work: Callable[[str], object], over: Sequence[str]) -> None:
        try:
            for transfer_id in over:
                work(transfer_id)
        except BaseException as error:
            errors.append(error)

    def send(transfer_id: str) -> None:
        together[transfer_id].wait(5)
        receive_all(inbox, open_frame(transfer_id), *kv_frames(transfer_id, tokens_a_frame=1))

    def claim(transfer_id: str) -> None:
        together[transfer_id].wait(5)
        inbox.expect(transfer_id, SENDER, noticed[transfer_id].append)

    threads = [
        threading.Thread(target=run, args=args)
        for args in (
            (send, transfers[:30]),
            (send, transfers[30:]),
            (claim, transfers[:30]),
            (claim, transfers[30:]),
            (lambda transfer_id: inbox.drop(transfer_id, "not wanted"), sorted(dropped)),
            (lambda transfer_id: inbox.sweep(), transfers),
        )
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
        assert not thread.is_alive()

    assert not errors
    assert [len(each) for each in noticed.values()] == [1] * len(transfers)
    whole = set(transfers) - dropped
    assert inbox.bytes_held == len(whole) * WHOLE_BYTES
    for transfer_id in transfers:
        assert (inbox.take(transfer_id) is not None) == (transfer_id in whole)
    assert (inbox.bytes_held, inbox.transfers_held) == (0, 0)


# --- what the prefix cache has ----------------------------------------------------------------

HELD_TOKENS = 4


@pytest.mark.parametrize("early", [True, False], ids=["before it opens", "after"])
def test_held_tokens_need_not_come_and_take_no_room(early: bool) -> None:
    inbox = make_inbox()
    given: list[str] = []
    if early:
        assert inbox.hold("t", HELD_TOKENS)
    inbox.receive(open_frame(expects_held=True))
    inbox.await_credit("t", given.append)
    if not early:
        assert not given and inbox.transfers_waiting == 1
        assert inbox.hold("t", HELD_TOKENS)
    assert given == [""]
    assert inbox.held("t") == HELD_TOKENS
    rest_bytes = (TOKENS - HELD_TOKENS) * GEOMETRY.bytes_per_token
    assert inbox.bytes_held == rest_bytes
    settled: list[Settled] = []
    inbox.expect("t", SENDER, settled.append)
    for layer in range(GEOMETRY.layers):
        assert not settled
        inbox.receive(kv_frame(layer=layer, first_token=HELD_TOKENS, tokens=TOKENS - HELD_TOKENS))
    assert [(s.whole, s.tokens, s.held_tokens) for s in settled] == [
        (True, TOKENS - HELD_TOKENS, HELD_TOKENS)
    ]
    assert settled[0].bytes == inbox.bytes_held == rest_bytes
    assert inbox.peek("t") == (TOKENS, b"digest", HELD_TOKENS)
    assert inbox.take("t") is not None
    assert inbox.bytes_held == 0


def test_a_frame_may_begin_in_what_is_held_but_not_end_there() -> None:
    inbox = make_inbox()
    inbox.hold("t", HELD_TOKENS)
    inbox.receive(open_frame(expects_held=True))
    first = HELD_TOKENS - 1
    for layer in range(GEOMETRY.layers):
        state, _ = inbox.receive(kv_frame(layer=layer, first_token=first, tokens=TOKENS - first))
    assert state is TransferState.WHOLE
    assert inbox.bytes_held == (TOKENS - first) * GEOMETRY.bytes_per_token
    inbox.take("t")
    assert inbox.bytes_held == 0

    inbox.hold("u", HELD_TOKENS)
    inbox.receive(open_frame("u", expects_held=True))
    state, reason = inbox.receive(kv_frame("u", tokens=HELD_TOKENS))
    assert (state, reason) == (TransferState.FAILED, "tokens 0 to 4 are held here")


def test_what_is_held_is_said_once_and_in_time() -> None:
    inbox = make_inbox()
    assert inbox.hold("t", 2)
    assert not inbox.hold("t", 4)
    inbox.receive(open_frame(expects_held=True))
    assert inbox.held("t") == 2
    # With credit for all of it, all of it comes.
    inbox.receive(open_frame("u"))
    assert not inbox.hold("u", 2)
    # No less than one token comes.
    inbox.receive(open_frame("v", expects_held=True))
    assert not inbox.hold("v", TOKENS)
    assert inbox.hold("v", 0)
    inbox.drop("w", "the router gave it up")
    assert not inbox.hold("w", 2)


def test_who_waits_for_what_is_held_is_in_nobodys_way() -> None:
    inbox = make_inbox(max_bytes=WHOLE_BYTES)
    inbox.receive(open_frame("slow", expects_held=True))
    inbox.receive(open_frame("quick"))
    given: list[str] = []
    inbox.await_credit("quick", given.append)
    assert given == [""]
