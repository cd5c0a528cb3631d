"""All that comes to a worker: who waits for room, who claims what, what is over or was given up."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence

import pytest

from cluster.handoff_failure import HandoffFailure
from cluster.wire import kv_pb2
from tests.unit.inbox_frames import (
    GEOMETRY,
    HEADS,
    HERE,
    MAX_IDLE_S,
    OTHER_SENDER,
    SENDER,
    TOKENS,
    WHOLE_BYTES,
    Clock,
    abort_frame,
    kv_frame,
    kv_frames,
    make_inbox,
    open_frame,
    receive_all,
    waiting_for_room,
)
from workers.kv import inbox as inbox_module
from workers.kv.codecs import group_codec
from workers.kv.frames import Frame
from workers.kv.inbox import Inbox
from workers.kv.incoming import Settled, TransferState

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


def test_what_is_in_the_engines_queue_stays_until_it_is_taken() -> None:
    clock = Clock()
    inbox = Inbox(GEOMETRY, HERE, 10 * WHOLE_BYTES, MAX_IDLE_S, clock, max_unclaimed_s=3.0)
    for transfer_id in ("taken", "dropped"):
        receive_all(inbox, open_frame(transfer_id), *kv_frames(transfer_id))
        assert inbox.admit(transfer_id) == (TOKENS, b"digest", 0)
    clock.now_s += 5 * MAX_IDLE_S
    assert inbox.sweep() == []
    assert inbox.take("taken") is not None
    inbox.drop("dropped", "the request is aborted")
    assert (inbox.bytes_held, inbox.transfers_held) == (0, 0)


def test_what_comes_late_does_not_undo_what_is_in_the_engines_queue() -> None:
    inbox = make_inbox()
    receive_all(inbox, open_frame(), *kv_frames())
    admitted = inbox.admit("t")
    late = (TransferState.FAILED, "a frame arrived after the transfer was whole")
    assert inbox.receive(kv_frame(layer=0)) == late
    assert inbox.peek("t") == admitted
    assert inbox.take("t") is not None


def test_only_what_is_whole_is_admitted() -> None:
    clock = Clock()
    inbox = make_inbox(clock=clock)
    receive_all(inbox, open_frame(), kv_frame(layer=0))
    assert inbox.admit("t") is inbox.admit("unknown") is None
    clock.now_s += MAX_IDLE_S + 0.1
    assert inbox.sweep() == ["t"]


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
    assert (inbox.bytes_held, waiting_for_room(inbox)) == (WHOLE_BYTES, 2)
    clock.now_s += 3.0
    receive_all(inbox, *kv_frames("a"))
    inbox.take("a")
    assert asked.told[2:] == [("large", "")]
    assert (inbox.bytes_held, waiting_for_room(inbox)) == (2 * WHOLE_BYTES, 1)
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
    assert (inbox.bytes_held, waiting_for_room(inbox)) == (WHOLE_BYTES, 0)


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
    reason = "another decode leg has claimed the transfer"
    refused = Settled("t", False, reason, failure=HandoffFailure.DROPPED)
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
        assert not given and waiting_for_room(inbox) == 1
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


def test_a_prompt_that_waits_long_to_be_computed_comes_without_what_was_held() -> None:
    clock = Clock()
    inbox, told = make_inbox(clock=clock), list[str]()
    assert inbox.hold("t", HELD_TOKENS) and inbox.needs_held("t")
    clock.now_s += MAX_IDLE_S + 0.1
    assert inbox.sweep() == []
    assert inbox.transfers_held == 0 and not inbox.needs_held("t")
    inbox.receive(open_frame(expects_held=True))
    inbox.await_credit("t", told.append)
    # As the service says it for an engine that does not.
    assert inbox.hold("t", 0) and told == [""]
    receive_all(inbox, *kv_frames())
    assert inbox.peek("t") == (TOKENS, b"digest", 0)


def test_what_is_held_is_needed_until_its_transfer_ends() -> None:
    clock = Clock()
    inbox = make_inbox(clock=clock)
    for transfer_id in ("fails", "is whole"):
        inbox.hold(transfer_id, HELD_TOKENS)
        inbox.receive(open_frame(transfer_id, expects_held=True))
    clock.now_s += MAX_IDLE_S
    receive_all(inbox, *kv_frames("is whole"))
    inbox.receive(abort_frame("fails"))
    assert not inbox.needs_held("fails")
    assert inbox.admit("is whole") == (TOKENS, b"digest", HELD_TOKENS)
    clock.now_s += 5 * MAX_IDLE_S
    inbox.sweep()
    assert inbox.needs_held("is whole")
    inbox.take("is whole")
    assert not inbox.needs_held("is whole")


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
