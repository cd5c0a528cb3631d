"""Resuming a request: the engine goes on after output tokens that it did not generate itself.

The decode leg goes on after the first token, and failover after all that the client has seen.
To vLLM's scheduler such a request looks like one that was preempted. Its V1 model runner, though,
starts every new request without outputs; the one thing changed here is the state it makes for it.
(The V2 model runner takes prompt and outputs together and needs no help.)

The request then differs in nothing from one that ran here from the start: penalties, min_tokens,
bad words, a seed's generator and structured output all see the same history.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.worker import gpu_model_runner
from vllm.v1.worker.gpu_input_batch import CachedRequestState

RESUME = "baton_resume"
"""Key of SamplingParams.extra_args: the output token ids the request goes on after."""

RESUME_VOCAB = "baton_resume_vocab"
"""Key of SamplingParams.extra_args: entries of the vocabulary, for seeded requests."""


def resume_after(params: SamplingParams, tokens: Sequence[int], vocab_size: int) -> None:
    """Let the request go on after these tokens, and after no others: among its extra_args is what
    the client gave as `vllm_xargs`."""
    extra = dict(params.extra_args or {})
    extra.pop(RESUME, None)
    extra.pop(RESUME_VOCAB, None)
    if tokens:
        extra |= {RESUME: list(tokens), RESUME_VOCAB: vocab_size}
    params.extra_args = extra or None


class ResumableRequestState(CachedRequestState):  # type: ignore[misc]
    generator: torch.Generator | None

    def __post_init__(self) -> None:
        super().__post_init__()
        extra = (self.sampling_params.extra_args or {}) if self.sampling_params else {}
        resumed: Sequence[int] = extra.get(RESUME, ())
        if resumed and not self.output_token_ids:
            self.output_token_ids.extend(resumed)
        if self.generator is None:
            return
        if self.generator.device.type == "cpu":
            self.generator = CpuGenerator(
                self.sampling_params.seed, lambda: len(self.output_token_ids)
            )
        elif resumed:
            self._skip_draws(len(resumed), int(extra[RESUME_VOCAB]))

    def _skip_draws(self, tokens: int, vocab_size: int) -> None:
        """Bring a GPU's generator to where it stands after `tokens` sampled tokens: vLLM draws one
        exponential variate for each entry of the vocabulary and token."""
        assert self.generator is not None
        draw = torch.empty(vocab_size, dtype=torch.float32, device=self.generator.device)
        for _ in range(tokens):
            draw.exponential_(generator=self.generator)


class CpuGenerator(torch.Generator):
    """A seeded request's generator on CPU, standing where its output tokens have brought it.

    After a chunk of a prompt that is not its last, vLLM takes the sampled token's draw back by
    `set_offset(get_offset() - 4)`. CPU generators have no offset, so that a seeded prompt in two
    chunks kills vLLM's engine (0.32). Here it means what it should: back to the draws that count.
    """

    def __new__(cls, seed: int, tokens_drawn: Callable[[], int]) -> CpuGenerator:
        return super().__new__(cls, device="cpu")  # type: ignore[call-arg]

    def __init__(self, seed: int, tokens_drawn: Callable[[], int]) -> None:
        self._seed = seed
        self._tokens_drawn = tokens_drawn
        self._rewind()

    def get_offset(self) -> int:
        return 4 * self._tokens_drawn()

    def set_offset(self, offset: int) -> torch.Generator:
        self._rewind()
        return self

    def _rewind(self) -> None:
        """vLLM's CPU sampler draws one seed for each token (`TopKTopPSampler.forward_cpu`)."""
        self.manual_seed(self._seed)
        for _ in range(self._tokens_drawn()):
            torch.randint(0, 2**31, (1,), generator=self, dtype=torch.long)


def install() -> None:
    """Let this process's V1 model runner resume requests. Calling it again changes nothing."""
    gpu_model_runner.CachedRequestState = ResumableRequestState
