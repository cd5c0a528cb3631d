"""Messages that come twice or too late, and routers that die between the two legs: nothing is held
afterwards."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from cluster.wire import kv_pb2, worker_pb2
from tests.frames import encode_frame
from tests.integration import test_no_leak
from tests.integration.gated_worker import ADDED, ENGINE, PUSHED, RECORD
from tests.integration.held import REACH_S, Held, OtherRouter, OtherSender, Watch, wait_until
from tests.integration.test_no_leak import (
    IN_ONE_GO,
    LAYER_BY_LAYER,
    asking,
    done_so_far,
    dropping,
    opening,
)

watch, idle, starts_idle = test_no_leak.watch, test_no_leak.idle, test_no_leak.starts_idle


@dataclass(frozen=True)
class Record:
    """What was said about a request: leg ids, and messages that may come again."""

    transfer_id: str
    pushed: list[bytes]
    prefill: worker_pb2.AddRequest
    decode: worker_pb2.AddRequest
    decode_worker: str


@contextlib.contextmanager
def recording(watch: Watch) -> Iterator[None]:
    with watch.closed("prefill", RECORD), watch.closed("decode", RECORD):
        yield


def record(watch: Watch, decode_worker: str) -> Record:
    transfer_id, *pushed = watch.left("prefill-0", PUSHED).decode().split("\n")
    return Record(
        transfer_id,
        [bytes.fromhex(message) for message in pushed],
        worker_pb2.AddRequest.FromString(watch.left("prefill-0", ADDED)),
        worker_pb2.AddRequest.FromString(watch.left(decode_worker, ADDED)),
        decode_worker,
    )


def answered(watch: Watch, body: dict[str, Any]) -> tuple[str, str]:
    """The text, and the decode worker."""
    answer = httpx.post(f"{watch.cluster.url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    placement = answer.headers["x-baton-placement"]
    return answer.json()["choices"][0]["text"], re.findall(r"-> (decode-\d)", placement)[0]


@pytest.fixture(scope="module")
def over(watch: Watch, idle: Held) -> Record:
    """Of a request that was handed over, and has ended."""
    with recording(watch):
        found = record(watch, answered(watch, asking(IN_ONE_GO))[1])
    assert found.prefill.send.transfer_id == found.decode.receive.transfer_id == found.transfer_id
    watch.settles_to(idle)
    return found


def pushed_again(watch: Watch, worker_id: str, transfer_id: str, messages: list[bytes]) -> str:
    """Returns why it is refused."""
    with OtherSender(watch.channel(worker_id), transfer_id) as sender:
        for message in messages:
            sender.send(message)
        reply = sender.heard()
    assert reply.HasField("result") and not reply.result.delivered
    return reply.result.reason


def aborting(transfer_id: str) -> bytes:
    abort = kv_pb2.AbortTransfer(reason="too late")
    return encode_frame(kv_pb2.FrameHeader(transfer_id=transfer_id, abort=abort))


def test_a_transfer_comes_again(watch: Watch, idle: Held, over: Record) -> None:
    for messages in (over.pushed, over.pushed[1:], [aborting(over.transfer_id)]):
        reason = pushed_again(watch, over.decode_worker, over.transfer_id, messages)
        assert reason == "the transfer is over"
        watch.settles_to(idle)


def test_a_transfer_comes_after_it_was_dropped(watch: Watch, idle: Held, over: Record) -> None:
    """The router gave it up before it was opened."""
    worker_id = over.decode_worker
    with OtherRouter(watch.channel(worker_id)) as router:
        router.send(dropping("dropped"))
        done_so_far(router)
        opened = opening("dropped", watch.describe(worker_id).incarnation, 8)
        assert pushed_again(watch, worker_id, "dropped", [opened]) == "the transfer is over"
    watch.settles_to(idle)


def test_a_transfer_is_dropped_that_its_sender_goes_on_with(
    watch: Watch, idle: Held, over: Record
) -> None:
    """By the router's word alone: the sender's stream does not break."""
    channel = watch.channel(over.decode_worker)
    incarnation = watch.describe(over.decode_worker).incarnation
    with OtherRouter(channel) as router, OtherSender(channel, "goes on") as sender:
        sender.send(opening("goes on", incarnation, 8))
        assert sender.heard().HasField("credit")
        assert watch.worker(over.decode_worker)["inbox_bytes"]
        router.send(dropping("goes on"))
        done_so_far(router)
        assert not watch.worker(over.decode_worker)["inbox_bytes"]
    watch.settles_to(idle)


def test_a_leg_waits_for_a_sender_that_is_lost(watch: Watch, idle: Held, over: Record) -> None:
    """By the router's word alone: the sender's stream does not break."""
    add = worker_pb2.AddRequest()
    add.CopyFrom(over.decode)
    add.receive.transfer_id = "half sent"
    add.receive.worker_id, add.receive.incarnation = "prefill-9", "1"
    add.receive.deadline_s = 2 * REACH_S
    channel = watch.channel(over.decode_worker)
    incarnation = watch.describe(over.decode_worker).incarnation
    with OtherRouter(channel) as router, OtherSender(channel, "half sent") as sender:
        sender.send(opening("half sent", incarnation, 8))
        assert sender.heard().HasField("credit")
        router.send(worker_pb2.ToEngine(add=add))
        lost = worker_pb2.SenderLost(transfer_id="half sent")
        router.send(worker_pb2.ToEngine(sender_lost=lost))
        adopted = router.hears("adopted").adopted
        assert (adopted.handed_over, adopted.reason) == (False, "its sender is lost")
        assert not watch.worker(over.decode_worker)["inbox_bytes"]
        wait_until("it ends", lambda: not watch.worker(over.decode_worker)["requests"])
    watch.settles_to(idle)


@pytest.mark.parametrize("gate", ["any", "decoding"])
def test_a_transfer_comes_again_while_its_request_runs(watch: Watch, idle: Held, gate: str) -> None:
    """Whole and not yet adopted, or adopted: the answer is right, and nothing stays."""
    body = asking(IN_ONE_GO)
    answer: list[tuple[str, str]] = []
    thread = threading.Thread(target=lambda: answer.append(answered(watch, body)))
    with recording(watch), watch.closed("decode", ENGINE, gate):
        adopted = watch.state()["handoffs_completed"]
        thread.start()
        wait_until("it runs", lambda: watch.state()["handoffs_completed"] > adopted)
        if gate == "decoding":
            wait_until("it decodes", lambda: watch.reached("decode", ENGINE))
        [worker_id] = [w for w in watch.decode_workers if watch.worker(w)["requests"]]
        again = record(watch, worker_id)
        assert pushed_again(watch, worker_id, again.transfer_id, again.pushed)
    thread.join()
    watch.settles_to(idle)
    assert answer[0][0] == answered(watch, body)[0]
    watch.settles_to(idle)


def test_a_router_speaks_too_late(watch: Watch, idle: Held, over: Record) -> None:
    """Of legs and a transfer that have ended, to both workers, and twice."""
    for worker_id, leg in (("prefill-0", over.prefill), (over.decode_worker, over.decode)):
        messages: dict[str, Any] = {
            "drop": worker_pb2.DropTransfer(transfer_id=over.transfer_id),
            "abort": worker_pb2.AbortRequests(request_ids=[leg.leg_id]),
            "hold": worker_pb2.HoldPrefix(transfer_id=over.transfer_id, request=leg.request),
            "move": worker_pb2.MoveOut(leg_id=leg.leg_id, send=over.prefill.send),
        }
        with OtherRouter(watch.channel(worker_id)) as router:
            for _ in range(2):
                for kind, message in messages.items():
                    router.send(worker_pb2.ToEngine(**{kind: message}))
                assert not router.hears("moved").moved.moved
        watch.settles_to(idle)


def test_a_leg_comes_again(watch: Watch, idle: Held, over: Record) -> None:
    """Both legs are computed once more, for a router that does not want them; the transfer is
    refused."""
    with OtherRouter(watch.channel("prefill-0")) as router:
        router.send(worker_pb2.ToEngine(add=over.prefill))
        done_so_far(router)
        wait_until("it ends", lambda: not watch.worker("prefill-0")["requests"])
    watch.settles_to(idle)
    with OtherRouter(watch.channel(over.decode_worker)) as router:
        router.send(worker_pb2.ToEngine(add=over.decode))
        adopted = router.hears("adopted").adopted
        assert (adopted.handed_over, adopted.reason) == (False, "the transfer is over")
        wait_until("it ends", lambda: not watch.worker(over.decode_worker)["requests"])
    watch.settles_to(idle)


# --- routers that die between the two legs --------------------------------------------------------


def test_a_router_dies_before_it_claims_what_is_whole(
    watch: Watch, idle: Held, over: Record
) -> None:
    add = worker_pb2.AddRequest()
    add.CopyFrom(over.prefill)
    add.send.transfer_id = "orphan"
    with OtherRouter(watch.channel("prefill-0")) as router:
        router.send(worker_pb2.ToEngine(add=add))
        wait_until("it has come", lambda: watch.worker(over.decode_worker)["inbox_bytes"])
    watch.settles_to(idle)


def test_a_router_dies_that_has_had_a_beginning_held(watch: Watch, idle: Held) -> None:
    with recording(watch):
        known = record(watch, answered(watch, asking(LAYER_BY_LAYER))[1])
    watch.settles_to(idle)
    with OtherRouter(watch.channel(known.decode_worker)) as router:
        hold = worker_pb2.HoldPrefix(transfer_id="orphan held", request=known.decode.request)
        router.send(worker_pb2.ToEngine(hold=hold))
        wait_until("it is held", lambda: watch.worker(known.decode_worker)["kv_blocks"])
    watch.settles_to(idle)
