"""Any operations on the inbox in any order, next to a model of it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

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
    cells,
    kv_frame,
    kv_frames,
    make_inbox,
    open_frame,
    waiting_for_room,
)
from workers.kv.frames import Frame
from workers.kv.incoming import Settled, TransferState


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
        assert waiting_for_room(self.inbox) == len(self.queue)

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
