"""Whether a placement is expected to keep what its request is promised."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cluster.scheduler.policies.scored import OUTPUT_TOKENS, PredictedLatency
from cluster.scheduler.policy import Ask, Placement
from cluster.scheduler.prediction import tpot_s, ttft_s
from cluster.scheduler.view import ClusterView, WorkerView

_SOONEST = PredictedLatency()


@dataclass(frozen=True, slots=True)
class Miss:
    """No placement is expected to keep the targets."""

    reason: str
    retry_after_s: float
    """When it may be otherwise."""


def meeting(ask: Ask, placement: Placement, view: ClusterView) -> Placement | Miss:
    """The placement if it keeps the request's targets, or else one that does.

    What is missed on an idle worker would be missed at any time: then the request is taken.
    """
    if _miss(ask, placement, view) is None:
        return placement
    soonest = _SOONEST.place(ask, view)
    assert soonest is not None, "there is a placement"
    miss = _miss(ask, soonest, view)
    return miss or replace(soonest, reason="meets its targets")


def _miss(ask: Ask, placement: Placement, view: ClusterView) -> Miss | None:
    slo = ask.slo
    prefill, decode = view.workers[placement.prefill], view.workers[placement.decode]
    first_s = ttft_s(ask, prefill)
    if slo.ttft_s is not None and first_s > slo.ttft_s and prefill.pending_prompt_tokens:
        reason = f"the first token is expected in {first_s:.2f} s, and promised in {slo.ttft_s:g} s"
        return Miss(reason, first_s - slo.ttft_s)
    next_s = tpot_s(decode)
    if slo.tpot_s is not None and next_s > slo.tpot_s and decode.decodes:
        reason = f"a token is expected every {next_s:.3f} s, and promised every {slo.tpot_s:g} s"
        return Miss(reason, _an_answer_ends_s(decode, next_s))
    return None


def _an_answer_ends_s(decode: WorkerView, step_s: float) -> float:
    """If the answers that are made there are half done on average."""
    return step_s * OUTPUT_TOKENS / 2 / decode.decodes
