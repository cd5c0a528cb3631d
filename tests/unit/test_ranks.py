"""Workers of several ranks: parts of a transfer, and payloads where ranks find them."""

from __future__ import annotations

import gc
import os
import pickle
from collections.abc import Callable

import pytest

from cluster.wire import kv_pb2, worker_pb2
from tests.processes import shared_memories
from tests.unit.inbox_frames import (
    GEOMETRY,
    HEADS,
    HERE,
    SENDER,
    TOKENS,
    WHOLE_BYTES,
    abort_frame,
    kv_frame,
    kv_frames,
    open_frame,
    receive_all,
)
from workers import environment
from workers.kv.frames import Frame
from workers.kv.inbox import Inbox
from workers.kv.incoming import Settled, TransferState
from workers.kv.ranks import Part, RankEndpoint, RankSettings, part_of
from workers.kv.sending import RanksSending
from workers.kv.shared import SharedMemory
from workers.kv.undelivered import RanksUndelivered

ARRIVING, WHOLE, FAILED = TransferState.ARRIVING, TransferState.WHOLE, TransferState.FAILED


def make_inbox(shared: bool = False, max_bytes: int = 1 << 20) -> Inbox:
    return Inbox(GEOMETRY, HERE, max_bytes, 30.0, lambda: 0.0, shared)


def open_part(head: int, heads: int = 1, **fields: object) -> Frame:
    """One head of the transfer "t"."""
    frame = open_frame()
    frame.header.open.MergeFrom(kv_pb2.OpenTransfer(first_head=head, heads=heads, **fields))  # type: ignore[arg-type]
    return frame


def frames_of(head: int) -> list[Frame]:
    return [f for f in kv_frames(heads_a_frame=1) if f.header.kv.first_head == head]


# --- parts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["one after the other", "together"])
def test_a_transfer_is_whole_when_all_its_parts_are(order: str) -> None:
    inbox, noticed = make_inbox(), list[Settled]()
    inbox.expect("t", SENDER, noticed.append)
    first, second = HEADS
    of_first, of_second = frames_of(first), frames_of(second)
    if order == "together":
        assert inbox.receive(open_part(first)) == inbox.receive(open_part(second)) == (ARRIVING, "")
    else:
        inbox.receive(open_part(first))
    assert inbox.bytes_held == WHOLE_BYTES
    *some, last = of_first
    assert receive_all(inbox, *some)[0] is ARRIVING
    # The stream of a part has then brought all it had to.
    assert inbox.receive(last) == (WHOLE, "")
    assert inbox.peek("t") is None and noticed == []
    if order != "together":
        inbox.receive(open_part(second))
    assert inbox.bytes_held == WHOLE_BYTES
    assert receive_all(inbox, *of_second)[0] is WHOLE
    assert [settled.whole for settled in noticed] == [True]
    assert inbox.take("t") is not None and inbox.bytes_held == 0


FAULTS: dict[str, tuple[Callable[[int, int], list[Frame]], str]] = {
    "a part twice": (lambda a, b: [open_part(a), open_part(a)], "opened twice"),
    "all heads, then a part": (lambda a, b: [open_frame(), open_part(b)], "opened twice"),
    "a part, then all heads": (lambda a, b: [open_part(a), open_frame()], "opened twice"),
    "another prompt": (
        lambda a, b: [open_part(a), open_part(b, prompt_digest=b"other")],
        "different prompts",
    ),
    "another length": (
        lambda a, b: [open_part(a), open_part(b, tokens=TOKENS + 1)],
        "different prompts",
    ),
    "another sender": (
        lambda a, b: [open_part(a), open_part(b, from_incarnation="older")],
        "different prompts or senders",
    ),
    "heads of no part": (lambda a, b: [open_part(a), *frames_of(b)], "of no part opened"),
    "heads of two parts": (
        lambda a, b: [open_part(a), open_part(b), kv_frame()],
        "of no part opened",
    ),
    "one part gives up": (
        lambda a, b: [open_part(a), open_part(b), *frames_of(a), abort_frame()],
        "gave up",
    ),
    "a part's frame twice": (
        lambda a, b: [open_part(a), open_part(b), *frames_of(a), frames_of(a)[0]],
        "arrived twice",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_part_fails_the_transfer_whole(fault: str) -> None:
    inbox = make_inbox()
    frames, said = FAULTS[fault]
    state, reason = receive_all(inbox, *frames(*HEADS))
    assert (state, said in reason) == (FAILED, True), reason
    assert inbox.bytes_held == 0 and inbox.take("t") is None
    for head in HEADS:
        assert receive_all(inbox, open_part(head), *frames_of(head))[0] is FAILED


def test_each_part_is_told_when_there_is_room() -> None:
    inbox, told = make_inbox(max_bytes=WHOLE_BYTES), list[str]()
    inbox.receive(open_frame("holds"))
    for head in HEADS:
        assert inbox.receive(open_part(head))[0] is TransferState.WAITING
        inbox.await_credit("t", lambda why, head=head: told.append(f"{head}: {why}"))  # type: ignore[misc]
    assert told == []
    inbox.drop("holds", "why")
    assert told == [f"{head}: " for head in HEADS]
    assert inbox.bytes_held == WHOLE_BYTES


# --- shared payloads ------------------------------------------------------------------------------


def memories() -> int:
    gc.collect()
    return shared_memories(os.getpid())


def filled(frame: Frame, byte: int) -> Frame:
    return Frame(frame.header, memoryview(bytes([byte]) * len(frame.payload)))


def test_ranks_find_what_came() -> None:
    inbox, before = make_inbox(shared=True), memories()
    frames = [filled(f, number) for number, f in enumerate(kv_frames(tokens_a_frame=3))]
    receive_all(inbox, open_frame(), *frames)
    memory = inbox.take_shared("t")
    assert memory is not None
    assert inbox.take_shared("t") is None and inbox.bytes_held == 0
    told = pickle.loads(pickle.dumps(memory.told()))
    read = told.read()
    assert [kv for kv, _ in read] == [frame.header.kv for frame in frames]
    assert [bytes(payload) for _, payload in read] == [bytes(f.payload) for f in frames]
    memory.close()
    # Who has mapped it keeps it; to others it is gone.
    assert bytes(read[-1][1]) == bytes(frames[-1].payload)
    with pytest.raises(OSError):
        told.read()
    del read
    assert memories() == before


@pytest.mark.parametrize("end", ["fail", "drop", "sweep", "abort", "damaged"])
def test_no_memory_stays_of_what_failed(end: str) -> None:
    now = [0.0]
    inbox = Inbox(GEOMETRY, HERE, 1 << 20, 30.0, lambda: now[0], shared=True)
    before = memories()
    receive_all(inbox, open_frame(), kv_frame())
    assert memories() == before + 1
    match end:
        case "fail":
            inbox.fail("t", "why")
        case "drop":
            inbox.drop("t", "why")
        case "sweep":
            now[0] = 31.0
            assert inbox.sweep() == ["t"]
        case "abort":
            inbox.receive(abort_frame())
        case _:
            inbox.receive(kv_frame())
    assert memories() == before
    assert inbox.take_shared("t") is None


def test_without_memory_to_share_the_transfer_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    inbox = make_inbox(shared=True)

    def full(self: SharedMemory, frame: Frame) -> None:
        raise OSError("no space")

    monkeypatch.setattr(SharedMemory, "append", full)
    assert receive_all(inbox, open_frame(), kv_frame()) == (
        FAILED,
        "there is no memory to share: no space",
    )
    assert inbox.bytes_held == 0


# --- ranks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kv_heads", "ranks", "parts"),
    [
        (2, 1, [Part(0, 2, True)]),
        (8, 2, [Part(0, 4, True), Part(4, 4, True)]),
        (2, 2, [Part(0, 1, True), Part(1, 1, True)]),
        # Ranks with the same head: one of them sends it.
        (2, 4, [Part(0, 1, True), Part(0, 1, False), Part(1, 1, True), Part(1, 1, False)]),
        (1, 2, [Part(0, 1, True), Part(0, 1, False)]),
    ],
)
def test_heads_are_shared_out_as_vllm_does(kv_heads: int, ranks: int, parts: list[Part]) -> None:
    assert [part_of(kv_heads, ranks, rank) for rank in range(ranks)] == parts


def test_heads_that_cannot_be_shared_out() -> None:
    with pytest.raises(ValueError, match="3 KV heads cannot be shared out to 2 ranks"):
        part_of(3, 2, 0)


def test_a_rank_with_the_heads_of_another_sends_nothing() -> None:
    settings = RankSettings(
        *(os.getpid(), "w", "i", b"", GEOMETRY, 2 * len(HEADS)),
        *(kv_pb2.CODEC_NONE, 1 << 20, 1, "127.0.0.1", "grpc", RanksSending(2 * len(HEADS)).path),
        RanksUndelivered(lambda sent: None).path,
    )
    settings = pickle.loads(pickle.dumps(settings))
    send = worker_pb2.SendKv(transfer_id="t", address="127.0.0.1:1")
    copy = RankEndpoint(settings, 1)
    assert copy.sending(send, 1, lambda: b"") is None
    copy.finish("t")
    copy.close()


@pytest.mark.parametrize(
    ("ranks", "cpu_ids", "expected"),
    [(2, [0, 1], "0|1"), (2, [4, 5, 6, 7, 8], "4,5|6,7"), (2, [3], "3|3"), (3, [1, 2], "1|2|1")],
)
def test_ranks_divide_the_cores(
    monkeypatch: pytest.MonkeyPatch, ranks: int, cpu_ids: list[int], expected: str
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "auto")
    environment.bind_ranks(ranks, cpu_ids)
    assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == expected
