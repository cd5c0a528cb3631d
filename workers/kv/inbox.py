"""The inbox: KV that prefill workers pushed here, until a decode leg adopts it.

A transfer that is opened waits until there is room for all of it, first come, first served; then
its sender has credit. It is whole when every layer, KV head and token of the prompt has arrived
exactly once, undamaged, from the incarnation that opened it. Anything else fails it, and a failed
transfer is recomputed, never adopted in part. All of this is bookkeeping over bytes: no gRPC, no
vLLM, and the clock is handed in, so the fault tests drive it directly.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator
from functools import partial

from cluster.handoff_failure import HandoffFailure
from cluster.wire import kv_pb2
from workers.kv.frames import Frame
from workers.kv.incoming import (
    Incoming,
    KvGeometry,
    Settled,
    TransferState,
    Whole,
    foreign_sender,
    sender_of,
)
from workers.kv.shared import SharedMemory

WAITING_MAX = 1000
"""Transfers that may wait for room."""
OVER_MAX = 10_000
"""Failed transfers that are remembered, and as many that were dropped or adopted."""


class Inbox:
    """Transfers by id, within a budget of bytes. Safe to call from several threads.

    `max_idle_s` bounds how long a transfer stays without a frame, a claim or an adoption, and
    `max_unclaimed_s` how long one does that is whole and was never claimed: its sender or its
    router is gone. One that is admitted stays until it is taken or dropped. Callbacks come without
    the lock, on the thread that made the change. With `shared`, payloads are kept where other
    processes can map them.
    """

    def __init__(
        self,
        geometry: KvGeometry,
        incarnation: str,
        max_bytes: int,
        max_idle_s: float,
        clock: Callable[[], float],
        shared: bool = False,
        max_unclaimed_s: float = math.inf,
    ) -> None:
        self.geometry = geometry
        self.incarnation = incarnation
        self.max_bytes = max_bytes
        self._max_idle_s = max_idle_s
        self._max_unclaimed_s = min(max_unclaimed_s, max_idle_s)
        self._clock = clock
        self._shared = shared
        self._lock = threading.Lock()
        self._transfers: dict[str, Incoming] = {}
        self._waiting: dict[str, Incoming] = {}
        self._failed: dict[str, None] = {}
        self._over: dict[str, float] = {}
        """Dropped or adopted, and when: what still comes of them is refused."""
        self._bytes = 0
        self._calls: list[Callable[[], None]] = []

    @property
    def bytes_held(self) -> int:
        return self._bytes

    @property
    def transfers_held(self) -> int:
        """Without failed ones, of which no more is here than why."""
        return len(self._transfers) - len(self._failed)

    def receive(self, frame: Frame) -> tuple[TransferState, str]:
        """Take a frame in. Returns whether going on makes sense, and if not, why: WHOLE if this was
        the last frame of its part."""
        transfer_id = frame.header.transfer_id
        with self._changing():
            if transfer_id in self._over:
                return TransferState.FAILED, "the transfer is over"
            transfer = self._get(transfer_id)
            if transfer.state in (TransferState.ARRIVING, TransferState.WAITING):
                self._take(transfer, frame)
                self._give_credit()
            elif (
                transfer.state is TransferState.WHOLE and frame.header.WhichOneof("kind") != "abort"
            ):
                late = "a frame arrived after the transfer was whole"
                if transfer.admitted:
                    # Its decode leg was told that all is here, and goes on with that.
                    return TransferState.FAILED, late
                self._fail(transfer, late, HandoffFailure.WRONG)
            self._notice(transfer)
            state = transfer.state
            if state is TransferState.ARRIVING and frame.header.WhichOneof("kind") == "kv":
                kv = frame.header.kv
                if transfer.part_has_come(range(kv.first_head, kv.first_head + kv.heads)):
                    state = TransferState.WHOLE
            return state, transfer.reason

    def await_credit(self, transfer_id: str, on_credit: Callable[[str], None]) -> None:
        """`on_credit` is called once, maybe at once: when there is room for an opened transfer,
        with nothing, or else with why it failed."""
        self._await(transfer_id, on_credit, lambda transfer: transfer.on_credit)

    def await_end(self, transfer_id: str, on_end: Callable[[str], None]) -> None:
        """`on_end` is called once, maybe at once: when the transfer is whole, with nothing, or else
        with why it failed."""
        self._await(transfer_id, on_end, lambda transfer: transfer.on_end)

    def expect(
        self,
        transfer_id: str,
        sender: tuple[str, str],
        on_settled: Callable[[Settled], None],
    ) -> None:
        """A decode leg claims the transfer. `on_settled` is called once, maybe at once."""
        with self._changing():
            refused = "the transfer is over" if transfer_id in self._over else ""
            if not refused:
                transfer = self._get(transfer_id)
                if transfer.expected_sender is None:
                    self._claim(transfer, sender, on_settled)
                    return
                refused = "another decode leg has claimed the transfer"
            settled = Settled(transfer_id, False, refused, failure=HandoffFailure.DROPPED)
            self._calls.append(lambda: on_settled(settled))

    def hold(self, transfer_id: str, tokens: int) -> bool:
        """The prompt's first `tokens` are in the prefix cache, and need not come. False if that is
        of no use any more."""
        with self._changing():
            if transfer_id in self._over:
                return False
            transfer = self._get(transfer_id)
            early = transfer.open is None and transfer.state is TransferState.ARRIVING
            if transfer.held_tokens is not None or not (
                early or transfer.state is TransferState.WAITING
            ):
                return False
            if transfer.open is not None and tokens >= transfer.open.tokens:
                return False
            transfer.held_tokens = tokens
            self._give_credit()
            return True

    def held(self, transfer_id: str) -> int:
        """Tokens that need not come."""
        with self._lock:
            transfer = self._transfers.get(transfer_id)
            return (transfer.held_tokens or 0) if transfer else 0

    def peek(self, transfer_id: str) -> Whole | None:
        """None if not all is here."""
        with self._lock:
            transfer = self._transfers.get(transfer_id)
            return transfer.whole() if transfer else None

    def admit(self, transfer_id: str) -> Whole | None:
        """As `peek`. Its decode leg goes into the engine's queue, however long that is."""
        with self._lock:
            transfer = self._transfers.get(transfer_id)
            whole = transfer.whole() if transfer else None
            if transfer is not None and whole is not None:
                transfer.admitted = True
            return whole

    def needs_held(self, transfer_id: str) -> bool:
        """What is held for it may be of use yet."""
        with self._lock:
            transfer = self._transfers.get(transfer_id)
            return transfer is not None and transfer.state is not TransferState.FAILED

    def take(self, transfer_id: str) -> dict[int, list[Frame]] | None:
        """The frames of a whole transfer by layer; the inbox holds nothing of it afterwards."""
        transfer = self._take_whole(transfer_id)
        return transfer.frames if transfer else None

    def take_shared(self, transfer_id: str) -> SharedMemory | None:
        """As `take`, of an inbox that shares payloads. The caller closes it."""
        transfer = self._take_whole(transfer_id)
        return transfer.shared if transfer else None

    def drop(self, transfer_id: str, reason: str) -> None:
        """Free what a transfer holds; frames that still come are refused."""
        with self._changing():
            transfer = self._transfers.get(transfer_id)
            self._is_over(transfer_id)
            if transfer is None:
                return
            if transfer.state is not TransferState.FAILED:
                self._fail(transfer, reason, HandoffFailure.DROPPED)
            self._notice(transfer)
            self._forget(transfer)

    def fail(
        self, transfer_id: str, reason: str, failure: HandoffFailure = HandoffFailure.SENDER
    ) -> None:
        """The sender's stream broke, or the time to wait for room or for the KV has passed."""
        with self._changing():
            transfer = self._transfers.get(transfer_id)
            if transfer is None or transfer.state in (TransferState.WHOLE, TransferState.FAILED):
                return
            self._fail(transfer, reason, failure)
            self._notice(transfer)

    def stream_broke(
        self, transfer_id: str, opened: kv_pb2.OpenTransfer | None, reason: str
    ) -> None:
        """The stream that `opened` a part of it has ended, and what comes by other ways with it.
        What has come is here: other parts are none of its business."""
        with self._lock:
            transfer = self._transfers.get(transfer_id)
            if transfer and opened and transfer.part_has_come(transfer.heads_of(opened)):
                return
        self.fail(transfer_id, reason)

    def sweep(self) -> list[str]:
        """Fail and forget transfers that nobody touched in time. Returns their ids."""
        now = self._clock()
        with self._changing():
            idle = [
                t for t in self._transfers.values() if now - t.changed_at_s > self._may_idle_s(t)
            ]
            # Its prompt may still wait to be computed: the transfer comes then, without a hold.
            for transfer in [t for t in idle if t.is_only_held]:
                idle.remove(transfer)
                self._forget(transfer)
            for old in [i for i, at in self._over.items() if now - at > 4 * self._max_idle_s]:
                del self._over[old]
        for transfer in idle:
            reason = f"nobody touched it for {self._may_idle_s(transfer):g} s"
            self.drop(transfer.transfer_id, reason)
        return [transfer.transfer_id for transfer in idle]

    def _may_idle_s(self, transfer: Incoming) -> float:
        if transfer.admitted:
            return math.inf
        unclaimed = transfer.state is TransferState.WHOLE and transfer.expected_sender is None
        return self._max_unclaimed_s if unclaimed else self._max_idle_s

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Holds the lock, and then tells those whom the change concerns."""
        with self._lock:
            try:
                yield
            finally:
                calls, self._calls = self._calls, []
        for call in calls:
            call()

    def _get(self, transfer_id: str) -> Incoming:
        transfer = self._transfers.get(transfer_id)
        if transfer is None:
            transfer = Incoming(transfer_id, self.geometry, self._clock())
            self._transfers[transfer_id] = transfer
        return transfer

    def _await(
        self,
        transfer_id: str,
        tell: Callable[[str], None],
        listeners: Callable[[Incoming], list[Callable[[str], None]]],
    ) -> None:
        with self._changing():
            transfer = self._transfers.get(transfer_id)
            if transfer is None:
                self._calls.append(lambda: tell("the transfer is over"))
            else:
                listeners(transfer).append(tell)
                self._notice(transfer)

    def _take_whole(self, transfer_id: str) -> Incoming | None:
        with self._changing():
            transfer = self._transfers.get(transfer_id)
            if transfer is None or transfer.state is not TransferState.WHOLE:
                return None
            self._forget(transfer)
            self._is_over(transfer_id)
            return transfer

    def _claim(
        self,
        transfer: Incoming,
        sender: tuple[str, str],
        on_settled: Callable[[Settled], None],
    ) -> None:
        transfer.changed_at_s = self._clock()
        transfer.on_settled = on_settled
        transfer.expected_sender = sender
        if transfer.open is not None and (found := sender_of(transfer.open)) != sender:
            self._fail(transfer, foreign_sender(found, sender), HandoffFailure.WRONG)
        self._notice(transfer)

    def _take(self, transfer: Incoming, frame: Frame) -> None:
        """Or it fails."""
        now = self._clock()
        transfer.changed_at_s = now
        wrong = no_room = ""
        match frame.header.WhichOneof("kind"):
            case "abort":
                reason = f"the sender gave up: {frame.header.abort.reason}"
                self._fail(transfer, reason, HandoffFailure.SENDER)
            case "open":
                is_first = transfer.open is None
                wrong = self._take_open(transfer, frame.header.open, now)
                if is_first and not wrong:
                    no_room = self._await_room(transfer)
            case _:
                try:
                    wrong = self._take_kv(transfer, frame, now)
                except OSError as error:
                    no_room = f"there is no memory to share: {error}"
        if wrong:
            self._fail(transfer, wrong, HandoffFailure.WRONG)
        elif no_room:
            self._fail(transfer, no_room, HandoffFailure.NO_ROOM)

    def _take_kv(self, transfer: Incoming, frame: Frame, now: float) -> str:
        """Returns what is wrong, or an empty string."""
        if transfer.open is None:
            return "a frame arrived before the transfer was opened"
        if transfer.state is TransferState.WAITING:
            return "a frame arrived before there was room for the transfer"
        before_bytes = transfer.bytes
        wrong = transfer.take_kv(frame, now)
        self._bytes += transfer.bytes - before_bytes
        return wrong

    def _take_open(self, transfer: Incoming, opened: kv_pb2.OpenTransfer, now: float) -> str:
        """As `_take_kv`."""
        if opened.to_incarnation != self.incarnation:
            return (
                f"it is meant for incarnation {opened.to_incarnation}, this is {self.incarnation}"
            )
        is_first = transfer.open is None
        wrong = transfer.take_open(opened)
        if is_first and not wrong:
            transfer.opened_at_s = now
        return wrong

    def _await_room(self, transfer: Incoming) -> str:
        """Returns why that is in vain, or an empty string."""
        whole_bytes = transfer.uncoded_bytes()
        if whole_bytes > self.max_bytes:
            return f"the inbox is too small: {whole_bytes} bytes asked, it holds {self.max_bytes}"
        if len(self._waiting) >= WAITING_MAX:
            return f"the inbox is full, and {WAITING_MAX} transfers wait for room"
        if self._shared:
            try:
                transfer.shared = SharedMemory()
            except OSError as error:
                return f"there is no memory to share: {error}"
        transfer.state = TransferState.WAITING
        self._waiting[transfer.transfer_id] = transfer
        return ""

    def _give_credit(self) -> None:
        """To those that wait for room, in the order in which they came."""
        for transfer in list(self._waiting.values()):
            assert transfer.open is not None
            if transfer.open.expects_held and transfer.held_tokens is None:
                # In no one's way: the engine says it at its next step.
                continue
            if self._bytes + transfer.uncoded_bytes() > self.max_bytes:
                return
            del self._waiting[transfer.transfer_id]
            transfer.begin(self._clock())
            self._bytes += transfer.bytes
            self._notice(transfer)

    def _fail(self, transfer: Incoming, reason: str, failure: HandoffFailure) -> None:
        self._bytes -= transfer.bytes
        transfer.fail(reason, failure, self._clock())
        self._waiting.pop(transfer.transfer_id, None)
        self._failed[transfer.transfer_id] = None
        if len(self._failed) > OVER_MAX:
            self._forget(self._transfers[next(iter(self._failed))])
        self._give_credit()

    def _forget(self, transfer: Incoming) -> None:
        """One that is whole, has failed, or is only held."""
        del self._transfers[transfer.transfer_id]
        self._failed.pop(transfer.transfer_id, None)
        self._bytes -= transfer.bytes
        self._give_credit()

    def _is_over(self, transfer_id: str) -> None:
        # The newest last, so that the oldest is forgotten first.
        self._over.pop(transfer_id, None)
        self._over[transfer_id] = self._clock()
        if len(self._over) > OVER_MAX:
            del self._over[next(iter(self._over))]

    def _notice(self, transfer: Incoming) -> None:
        """Tell those who wait for credit or for the end, once, if it is there."""
        state, reason = transfer.state, transfer.reason
        on_credit, on_end, on_settled = transfer.on_credit, transfer.on_end, transfer.on_settled
        ended = state in (TransferState.WHOLE, TransferState.FAILED)
        if on_credit and state is not TransferState.WAITING:
            transfer.on_credit = []
            self._calls += [partial(tell, reason) for tell in on_credit]
        if on_end and ended:
            transfer.on_end = []
            self._calls += [partial(tell, reason) for tell in on_end]
        if on_settled is not None and ended:
            transfer.on_settled = None
            settled = transfer.settled()
            self._calls.append(lambda: on_settled(settled))
