"""A request's life, one step at a time, with the exact actions of each."""

from __future__ import annotations

import pytest

from cluster.scheduler.life import (
    CancelLeg,
    Deliver,
    DropTransfer,
    FailRequest,
    Finish,
    Life,
    Path,
    Phase,
    StartDecode,
    StartLocal,
    StartPrefill,
)
from cluster.scheduler.policy import Ask, Placement
from cluster.scheduler.view import WorkerKey

P, D, OTHER = WorkerKey("p", "i1"), WorkerKey("d", "i1"), WorkerKey("x", "i1")
SPLIT = Placement(P, D, "shortest queues")
LOCAL = Placement(P, P, "one worker only")
MODEL_LEN = 1000


def prefilling() -> Life:
    life = Life(Ask("r", prompt_tokens=10, max_tokens=5))
    life.start(SPLIT, "a")
    return life


def handing_over() -> Life:
    life = prefilling()
    life.on_output([7], Finish.LENGTH, MODEL_LEN)
    return life


def decoding() -> Life:
    life = handing_over()
    life.on_output([8], None, MODEL_LEN)
    return life


def test_starts_with_a_prefill_leg_that_says_where_its_kv_goes() -> None:
    life = Life(Ask("r", 10, 5))
    assert (life.phase, life.leg) == (Phase.QUEUED, None)
    assert life.start(SPLIT, "a") == StartPrefill("r", "r.1p.a", P, D, "r.1p.a")
    assert life.phase is Phase.PREFILLING


def test_prefill_hands_over_with_its_token() -> None:
    life = prefilling()
    assert life.on_output([7], Finish.LENGTH, MODEL_LEN) == [
        Deliver("r", None),
        StartDecode("r", "r.1p.a.d", D, P, "r.1p.a", (7,)),
    ]
    assert life.phase is Phase.HANDING_OVER


def test_decoding_begins_with_the_decode_legs_first_token() -> None:
    life = handing_over()
    assert life.on_output([], None, MODEL_LEN) == [Deliver("r", None)]
    assert (life.phase, life.tokens) == (Phase.HANDING_OVER, [7])
    assert life.on_output([8], None, MODEL_LEN) == [Deliver("r", None)]
    assert life.phase is Phase.DECODING
    assert life.tokens == [7, 8]


@pytest.mark.parametrize("finish", Finish)
def test_ends_as_its_decode_leg_does(finish: Finish) -> None:
    life = decoding()
    assert life.on_output([9, 10], finish, MODEL_LEN) == [Deliver("r", finish)]
    assert life.done and life.leg is None
    assert life.tokens == [7, 8, 9, 10]


@pytest.mark.parametrize("finish", [Finish.STOP, Finish.ERROR, Finish.ABORT])
def test_an_end_at_the_first_token_drops_the_transfer(finish: Finish) -> None:
    life = prefilling()
    assert life.on_output([7], finish, MODEL_LEN) == [
        Deliver("r", finish),
        DropTransfer(D, "r.1p.a"),
    ]
    assert life.done


def test_an_end_at_the_model_length_is_one() -> None:
    life = prefilling()
    ended = [Deliver("r", Finish.LENGTH), DropTransfer(D, "r.1p.a")]
    assert life.on_output([7], Finish.LENGTH, model_len_tokens=11) == ended
    life = prefilling()
    assert life.on_output([7], Finish.LENGTH, model_len_tokens=12)[0] == Deliver("r", None)


def test_local_work_is_one_leg() -> None:
    life = Life(Ask("r", 10, 2))
    assert life.start(LOCAL, "a") == StartLocal("r", "r.1p.a", P)
    assert (life.phase, life.path) == (Phase.PREFILLING, Path.KEPT_LOCAL)
    assert life.on_output([7], None, MODEL_LEN) == [Deliver("r", None)]
    assert life.phase is Phase.DECODING
    assert life.on_output([8], Finish.LENGTH, MODEL_LEN) == [Deliver("r", Finish.LENGTH)]
    assert life.done


def test_adoption_tells_the_path() -> None:
    life = handing_over()
    paths = [life.path]
    for handed_over in (False, True):
        life.on_adopted(handed_over)
        paths.append(life.path)
    assert paths == [Path.HANDED_OVER, Path.RECOMPUTED, Path.HANDED_OVER]


def test_abort_while_queued_says_nothing_to_anyone() -> None:
    life = Life(Ask("r", 10, 5))
    assert life.abort() == []
    assert life.done


def test_abort_while_prefilling_cancels_and_drops() -> None:
    life = prefilling()
    assert life.abort() == [CancelLeg("r.1p.a", P), DropTransfer(D, "r.1p.a")]
    assert life.done


def test_abort_from_the_hand_over_on_cancels_only() -> None:
    # The decode worker frees a claimed transfer with its leg.
    for life in (handing_over(), decoding()):
        assert life.abort() == [CancelLeg("r.1p.a.d", D)]
        assert life.done


def test_abort_of_local_work_cancels_only() -> None:
    life = Life(Ask("r", 10, 5))
    life.start(LOCAL, "a")
    assert life.abort() == [CancelLeg("r.1p.a", P)]


def test_failing_releases_all_and_says_why() -> None:
    assert prefilling().fail("it is over") == [
        CancelLeg("r.1p.a", P),
        DropTransfer(D, "r.1p.a"),
        FailRequest("r", "it is over"),
    ]


def test_unplacing_keeps_what_the_client_has() -> None:
    life = decoding()
    assert life.unplace() == [CancelLeg("r.1p.a.d", D)]
    assert (life.phase, life.leg, life.placement) == (Phase.QUEUED, None, None)
    assert life.remaining() == Ask("r", 10, max_tokens=3, resumed_tokens=2)
    assert life.start(Placement(OTHER, OTHER, ""), "b") == StartLocal(
        "r", "r.2p.b", OTHER, resume_tokens=(7, 8)
    )
    # It computes prompt and tokens before it goes on.
    assert (life.phase, life.path) == (Phase.PREFILLING, Path.RECOMPUTED)


def test_unplacing_while_prefilling_drops_the_transfer() -> None:
    life = prefilling()
    assert life.unplace() == [CancelLeg("r.1p.a", P), DropTransfer(D, "r.1p.a")]
    assert life.start(SPLIT, "b") == StartPrefill("r", "r.2p.b", P, D, "r.2p.b")


def test_a_resumed_request_is_handed_over_again() -> None:
    life = decoding()
    life.unplace()
    assert life.start(SPLIT, "b") == StartPrefill("r", "r.2p.b", P, D, "r.2p.b", (7, 8))
    assert life.on_output([9], Finish.LENGTH, MODEL_LEN) == [
        Deliver("r", None),
        StartDecode("r", "r.2p.b.d", D, P, "r.2p.b", (7, 8, 9)),
    ]


def test_a_resumed_request_ends_at_its_own_length() -> None:
    life = decoding()
    life.on_output([9, 10], None, MODEL_LEN)
    life.unplace()
    life.start(SPLIT, "b")
    assert life.on_output([11], Finish.LENGTH, MODEL_LEN) == [
        Deliver("r", Finish.LENGTH),
        DropTransfer(D, "r.2p.b"),
    ]


def test_what_it_depends_on() -> None:
    queued = Life(Ask("r", 10, 5))
    local = Life(Ask("r", 10, 5))
    local.start(LOCAL, "a")
    done = decoding()
    done.abort()
    for life, needed in [
        (queued, set()),
        (prefilling(), {P, D}),
        (handing_over(), {D}),
        (decoding(), {D}),
        (local, {P}),
        (done, set()),
    ]:
        assert {key for key in (P, D, OTHER) if life.depends_on(key)} == needed
