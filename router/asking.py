"""What the scheduler is asked, of a request of vLLM's front end, and whether it may be asked."""

from __future__ import annotations

import msgspec
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.serial_utils import MsgpackEncoder

from cluster.scheduler.policy import Ask
from cluster.scheduler.prefixes import PromptBlocks
from cluster.scheduler.slo import NO_PROMISE
from router.every_worker import adapter_key
from router.placing import Placing


def ask_of(
    request: EngineCoreRequest, placing: Placing | None = None, blocks: PromptBlocks | None = None
) -> Ask:
    """`blocks` of its prompt, where the prefix caches are known."""
    params = request.sampling_params
    slo = NO_PROMISE
    if placing is not None:
        # One of several prompts or choices is not refused when others have been taken.
        slo = placing.slo.without_targets() if placing.taken else placing.slo
        placing.taken = True
    return Ask(
        request_id=request.request_id,
        prompt_tokens=len(request.prompt_token_ids or ()) or _embeds_length(request),
        max_tokens=1 if params is None else params.max_tokens,
        can_hand_over=(
            params is not None
            and params.prompt_logprobs is None
            # Then vLLM loads nothing, either.
            and not params.skip_reading_prefix_cache
            and request.prompt_embeds is None
            and not request.mm_features
        ),
        adapter=adapter_key(request.lora_request) if request.lora_request else "",
        slo=slo,
        tenant=placing.tenant if placing else "",
        blocks=blocks,
    )


def why_not_sendable(request: EngineCoreRequest, encoder: MsgpackEncoder) -> str | None:
    """What of it no worker can be sent: vLLM's front end takes numbers that its messages do not."""
    try:
        encoder.encode(request)
        return None
    except Exception as error:
        params = request.sampling_params or request.pooling_params
        parts = msgspec.structs.asdict(params) if params is not None else {}
        for name, value in {**parts, "priority": request.priority}.items():
            try:
                encoder.encode(value)
            except Exception as its_error:
                return f"{name}: {its_error}"
        return str(error)


def _embeds_length(request: EngineCoreRequest) -> int:
    return 0 if request.prompt_embeds is None else int(request.prompt_embeds.shape[0])
