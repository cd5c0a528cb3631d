"""A request's tokens of several steps, that came in one batch, as one output: vLLM's front end then
does once what it would do for each. One of the few files that know vLLM's internals."""

from __future__ import annotations

from vllm.v1.engine import EngineCoreOutput


class Together:
    """For one batch. What was put before is changed, and so must not have been read yet."""

    def __init__(self) -> None:
        self._latest: dict[str, EngineCoreOutput] = {}

    def joins(self, output: EngineCoreOutput) -> bool:
        """Whether it has gone into the request's output before it. If not, it is the one that later
        ones go into."""
        if not _is_plain(output):
            self._latest.pop(output.request_id, None)
            return False
        begins = output.events is not None or output.prefill_stats is not None
        before = None if begins else self._latest.get(output.request_id)
        if before is None:
            self._latest[output.request_id] = output
            return False
        before.new_token_ids.extend(output.new_token_ids)
        before.finish_reason = output.finish_reason
        before.stop_reason = output.stop_reason
        return True


def _is_plain(output: EngineCoreOutput) -> bool:
    """Tokens, maybe the request's beginning or end, and nothing else.
    tests/integration/test_vllm_seams.py knows all fields there are."""
    return (
        output.new_logprobs is None
        and output.new_prompt_logprobs_tensors is None
        and output.pooling_output is None
        and output.kv_transfer_params is None
        and output.ec_transfer_params is None
        and output.trace_headers is None
        and output.routed_experts is None
        and output.num_nans_in_logits == 0
        and output.mm_cache_miss_hashes is None
        and output.new_sampling_mask is None
        and output.spec_decode_metrics is None
        and output.prompt_token_id_logprobs is None
    )
