"""What a client would see of a placement: predicted from what the workers have shown so far."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.scheduler.policy import Ask
from cluster.scheduler.view import WorkerView


@dataclass(frozen=True, slots=True)
class Prediction:
    ttft_s: float
    """To the first token: the queue, and the prompt."""
    tpot_s: float
    """From one token to the next."""


def predict(ask: Ask, prefill: WorkerView, decode: WorkerView) -> Prediction:
    return Prediction(ttft_s(ask, prefill), tpot_s(decode))


def ttft_s(ask: Ask, prefill: WorkerView) -> float:
    computed_s = prefill.rates.prefill.predict_s(ask.tokens_to_compute_on(prefill))
    return prefill.prefill_wait_s + computed_s


def tpot_s(decode: WorkerView) -> float:
    return decode.rates.step.predict_s(decode.decodes + 1)


def exposed_s(ask: Ask, decode: WorkerView) -> float:
    """What is left of the hand-off when the prompt is computed."""
    kv_bytes = ask.tokens_to_compute * decode.kv_bytes_per_token
    return decode.rates.exposed.predict_s(kv_bytes)
