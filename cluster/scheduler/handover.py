"""Whether a request is handed over at all, or stays on its decode worker, which then computes the
prompt, too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from cluster.scheduler.view import WorkerView

if TYPE_CHECKING:
    from cluster.scheduler.policy import Ask

INBOX_LOAD_MAX = 0.9
"""Above this share of its inbox, a decode worker would have to refuse the KV and compute again."""


def inbox_tokens_max(inbox_bytes: int, kv_bytes_per_token: int) -> int:
    """The longest prompt that is handed over to a worker with this inbox."""
    return int(inbox_bytes * INBOX_LOAD_MAX) // kv_bytes_per_token


HandOver = Literal["always", "cheaper"]


@dataclass(frozen=True, slots=True)
class HandOverRule:
    """`local_prompt_tokens`: a prompt up to this length stays. `when`: always, or only if that
    should cost less than to compute the prompt where it decodes.
    """

    local_prompt_tokens: int = 0
    when: HandOver = "always"

    def stays(self, ask: Ask, prefill: WorkerView, decode: WorkerView) -> str:
        """Why the request stays on its decode worker. Empty: it is handed over."""
        tokens = ask.tokens_to_compute
        if ask.held_tokens:
            rest = ask.tokens_to_compute_on(decode)
            if rest < tokens and rest <= max(self.local_prompt_tokens, decode.block_tokens):
                return "prefix held"
        if decode.inbox_bytes_max:
            kv_bytes = tokens * decode.kv_bytes_per_token
            room_bytes = decode.inbox_bytes_max * INBOX_LOAD_MAX
            if kv_bytes > room_bytes:
                return "larger than the inbox"
            if decode.reported_inbox_bytes + kv_bytes > room_bytes:
                return "inbox full"
        if self.when == "cheaper":
            return self._cheaper(ask, prefill, decode)
        return ""

    def _cheaper(self, ask: Ask, prefill: WorkerView, decode: WorkerView) -> str:
        """Compares what the requests concerned wait in all: with a local prefill, so do those that
        decode there."""
        compute_s = decode.rates.prefill.predict_s(ask.tokens_to_compute_on(decode))
        stay_s = decode.prefill_wait_s + compute_s * (1 + decode.decodes)
        kv_bytes = ask.tokens_to_compute * decode.kv_bytes_per_token
        exposed_s = decode.rates.exposed.predict_s(kv_bytes)
        compute_there_s = prefill.rates.prefill.predict_s(ask.tokens_to_compute_on(prefill))
        if stay_s > prefill.prefill_wait_s + compute_there_s + exposed_s:
            return ""
        return "slow hand-off" if exposed_s > compute_s else "cheaper local"


ALWAYS = HandOverRule()
