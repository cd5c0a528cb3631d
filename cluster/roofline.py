"""How long a phase takes on an accelerator, from the hardware's figures and the model's shape.

A roofline: prefill is bound by FLOP/s, decode by memory bandwidth, and both pay for tensor
parallelism on the link between accelerators. The estimate ranks hardware; a profile measured on a
live worker is what predicts latency.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from cluster.accelerators import Accelerator

Phase = Literal["prefill", "decode"]

PREFILL_EFFICIENCY: Final = 0.5
"""Share of the published FLOP/s that matrices reach where the catalogue has no measurement.

Splitwise's measurements (splitwise-sim perf_model.csv, Llama-2-70B on two accelerators, prompts of
1,024 to 4,096 tokens) come to 0.50 on H100 and 0.70 on A100. Unmeasured hardware gets the H100's.
"""

PREFILL_EFFICIENCY_BALANCED: Final = 0.7
"""The A100's share, for unmeasured hardware with no more FLOP/s per byte/s than an A100 has: the
less a memory must feed, the nearer to its peak an accelerator runs."""

BALANCED_FLOPS_PER_BYTE: Final = 312e12 / 2039e9
"""The A100-80G's FLOP/s per byte/s of memory bandwidth."""

BANDWIDTH_EFFICIENCY: Final = 0.75
"""Share of the published memory bandwidth that decode reaches.

Measured: 0.64 on A100 (DistServe, OPT-13B: both its constant and its KV term), 0.76 on A100
(TensorRT-LLM, LLaMA-7B, batch 32, 128 in, 2,048 out), 0.8 on H100 (AIConfigurator's vLLM rows,
Qwen3-32B on two, concurrency 8 to 32).
"""

LINK_EFFICIENCY: Final = 0.7
"""Share of the link's one-way bandwidth that a large all-reduce reaches (assumed, as with NCCL)."""

ALL_REDUCE_LATENCY_S: Final = 15e-6
"""Least time of one all-reduce, seconds. With STEP_OVERHEAD_S it gives the floor of about 4 ms that
Qwen3-32B's decode steps keep on two, four and eight H100s (AIConfigurator's vLLM rows)."""

STEP_OVERHEAD_S: Final = 2e-3
"""Time of an engine step outside the model, seconds: scheduling, launch, sampling (same rows)."""

MEMORY_UTILIZATION: Final = 0.9
"""Share of the memory for weights and KV together; the rest is for activations and graphs.

vLLM's `gpu_memory_utilization` counts GiB where datasheets' GB are taken here as 1e9 bytes; the
7 % between them stand for the activations that vLLM subtracts.
"""

ACTIVATION_BYTES: Final = 2
"""Bytes of one activation value, as all-reduce sends it."""

_UNGATED_MLP: Final = frozenset(
    {"opt", "gpt2", "gpt_neox", "gptj", "bloom", "falcon", "phi", "gpt_bigcode", "mpt"}
)
_TEXT_CONFIGS: Final = ("text_config", "llm_config", "language_config")
_DTYPE_BYTES: Final = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0}


@dataclass(frozen=True)
class ModelShape:
    """What the roofline needs to know of a transformer."""

    parameters: float
    layers: int
    hidden: int
    kv_heads: int
    head_dim: int
    attention_heads: int = 0
    """Query heads; 0 stands for hidden / head_dim."""
    weight_bytes: float = 2.0
    """Bytes of one parameter: 2 for fp16/bf16, 1 for fp8/int8, 0.5 for 4 bits."""
    kv_bytes: float = 2.0
    """Bytes of one value in the KV cache."""
    active_parameters: float = 0.0
    """Parameters one token uses; fewer than all in a mixture of experts. 0 stands for all."""
    experts: int = 1
    """Experts a layer has, of which one token uses `experts_per_token`."""
    experts_per_token: int = 1
    latent_kv: int = 0
    """Values one token and layer keep under multi-head latent attention; 0 for ordinary heads."""
    fp8_compute: bool = False
    """Whether its matrices are multiplied in fp8 where the accelerator can."""

    def __post_init__(self) -> None:
        for field in ("parameters", "layers", "hidden", "kv_heads", "head_dim"):
            if not getattr(self, field) > 0:
                raise ValueError(f"{field} must be positive, not {getattr(self, field)!r}")
        if not (self.weight_bytes > 0 and self.kv_bytes > 0):
            raise ValueError("weight_bytes and kv_bytes must be positive")
        if not 0 <= self.active_parameters <= self.parameters:
            raise ValueError("active_parameters must lie between 0 and parameters")
        if not 1 <= self.experts_per_token <= self.experts:
            raise ValueError("experts_per_token must lie between 1 and experts")

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """The shape in a Hugging Face `config.json` of a Llama-like model.

        Counts attention, MLP or experts, and embeddings. Of a multimodal model only the language
        model is counted. ValueError names what is missing.
        """
        nested = next((config[key] for key in _TEXT_CONFIGS if config.get(key)), None)
        return _from_text_config({**config, **nested} if nested else config)

    @property
    def active(self) -> float:
        """Parameters one token uses."""
        return self.active_parameters or self.parameters

    @property
    def attention_width(self) -> int:
        """Values of all query heads together."""
        return (self.attention_heads * self.head_dim) if self.attention_heads else self.hidden

    @property
    def weights_bytes(self) -> float:
        """Bytes of all weights."""
        return self.parameters * self.weight_bytes

    @property
    def kv_bytes_per_token(self) -> float:
        """Bytes one token keeps in the KV cache, whole model."""
        values = self.latent_kv or 2 * self.kv_heads * self.head_dim
        return self.layers * values * self.kv_bytes

    def kv_bytes_per_token_each(self, tensor_parallel: int) -> float:
        """The share one of `tensor_parallel` accelerators keeps: KV heads are split, then copied;
        latent KV is copied."""
        if self.latent_kv:
            return self.kv_bytes_per_token
        heads = math.ceil(self.kv_heads / tensor_parallel)
        return self.kv_bytes_per_token * heads / self.kv_heads

    def parameters_read(self, tokens: int) -> float:
        """Parameters one step over `tokens` tokens reads: with experts, those somebody uses."""
        unused = (1 - self.experts_per_token / self.experts) ** tokens
        idle = self.experts - self.experts_per_token
        if idle == 0:
            return self.parameters
        routed = (self.parameters - self.active) * self.experts / idle
        return self.parameters - routed * unused


@dataclass(frozen=True)
class Workload:
    """The request the ranking has in mind.

    The defaults are the medians of Splitwise's conversation trace (Azure, 2023): 1,020 tokens in,
    129 out. `batch_max` is vLLM's usual `max_num_seqs`.
    """

    prompt_tokens: int = 1020
    output_tokens: int = 129
    batch_max: int = 256

    def __post_init__(self) -> None:
        if min(self.prompt_tokens, self.output_tokens, self.batch_max) < 1:
            raise ValueError("prompt_tokens, output_tokens and batch_max must be at least 1")


@dataclass(frozen=True)
class Ranking:
    """One accelerator's place in a phase."""

    accelerator: Accelerator
    seconds: float
    """Time of one prompt (prefill) or of one step of the whole batch (decode); inf: no fit."""
    score: float
    """Throughput as a share of the best of those ranked, 0 to 1; 0 where the model does not fit."""
    reason: str
    tokens_per_s: float
    """Prompt tokens (prefill) or generated tokens (decode) a second of one worker."""
    batch: int
    """Sequences in one step: 1 for prefill, what memory allows for decode; 0: no fit."""


def prefill_time_s(
    model: ModelShape, accelerator: Accelerator, prompt_tokens: int, tensor_parallel: int = 1
) -> float:
    """Seconds to prefill one prompt on `tensor_parallel` accelerators."""
    _check(prompt_tokens, tensor_parallel)
    matrices = 2 * model.active * prompt_tokens
    # Causal attention: the two products over half of tokens x tokens.
    attention = 2 * model.layers * model.attention_width * prompt_tokens**2
    compute_s = (matrices + attention) / _flops(model, accelerator, tensor_parallel)
    read_s = _weights_read_s(model, accelerator, prompt_tokens, tensor_parallel)
    link_s = _all_reduce_s(model, accelerator, prompt_tokens, tensor_parallel)
    return max(compute_s, read_s) + link_s + STEP_OVERHEAD_S


def decode_step_time_s(
    model: ModelShape,
    accelerator: Accelerator,
    batch: int,
    context_tokens: int,
    tensor_parallel: int = 1,
) -> float:
    """Seconds of one step: a token for each of `batch` sequences of `context_tokens` tokens."""
    _check(min(batch, context_tokens), tensor_parallel)
    compute_s = 2 * model.active * batch / _flops(model, accelerator, tensor_parallel)
    read_s = _weights_read_s(model, accelerator, batch, tensor_parallel)
    kv = batch * context_tokens * model.kv_bytes_per_token_each(tensor_parallel)
    kv_s = kv / (accelerator.bandwidth_gb_s * 1e9 * BANDWIDTH_EFFICIENCY)
    link_s = _all_reduce_s(model, accelerator, batch, tensor_parallel)
    return max(compute_s, read_s) + kv_s + link_s + STEP_OVERHEAD_S


def kv_capacity_tokens(
    model: ModelShape,
    accelerator: Accelerator,
    tensor_parallel: int = 1,
    memory_share: float = MEMORY_UTILIZATION,
) -> int:
    """Tokens whose KV fits beside the weights; 0 where the weights themselves do not."""
    _check(1, tensor_parallel)
    free = usable_bytes(accelerator, memory_share) - model.weights_bytes / tensor_parallel
    return max(0, math.floor(free / model.kv_bytes_per_token_each(tensor_parallel)))


def efficiency(accelerator: Accelerator) -> float:
    """Share of the published FLOP/s that matrices reach: measured, else as similar hardware."""
    if accelerator.prefill_efficiency is not None:
        return accelerator.prefill_efficiency
    flops_per_byte = accelerator.fp16_tflops * 1e12 / (accelerator.bandwidth_gb_s * 1e9)
    balanced = flops_per_byte <= BALANCED_FLOPS_PER_BYTE
    return PREFILL_EFFICIENCY_BALANCED if balanced else PREFILL_EFFICIENCY


def usable_bytes(accelerator: Accelerator, memory_share: float = MEMORY_UTILIZATION) -> float:
    """Bytes of one accelerator that weights and KV may take."""
    return accelerator.memory_gb * 1e9 * memory_share


def fits(
    model: ModelShape,
    accelerator: Accelerator,
    tokens: int = 1,
    tensor_parallel: int = 1,
    memory_share: float = MEMORY_UTILIZATION,
) -> bool:
    """Whether the weights and the KV of `tokens` tokens fit."""
    return kv_capacity_tokens(model, accelerator, tensor_parallel, memory_share) >= tokens


def rank(
    phase: Phase,
    accelerators: Sequence[Accelerator],
    model: ModelShape,
    workload: Workload | None = None,
    tensor_parallel: int = 1,
    memory_share: float = MEMORY_UTILIZATION,
) -> list[Ranking]:
    """The accelerators in order of throughput in this phase, best first, ties by name."""
    load = workload or Workload()
    measure = _prefill if phase == "prefill" else _decode
    measured = [
        (one, *measure(one, model, load, tensor_parallel, memory_share)) for one in accelerators
    ]
    rates = [_rate(phase, load, seconds, batch) for _, seconds, batch in measured]
    best = max(rates, default=0.0)
    rankings = [
        Ranking(
            accelerator=one,
            seconds=seconds,
            score=rate / best if best else 0.0,
            reason=_reason(phase, one, model, load, tensor_parallel, memory_share, rate, batch),
            tokens_per_s=rate,
            batch=batch,
        )
        for (one, seconds, batch), rate in zip(measured, rates, strict=True)
    ]
    return sorted(rankings, key=lambda one: (-one.tokens_per_s, one.accelerator.name))


def _prefill(
    accelerator: Accelerator,
    model: ModelShape,
    load: Workload,
    tensor_parallel: int,
    memory_share: float,
) -> tuple[float, int]:
    if not fits(model, accelerator, load.prompt_tokens, tensor_parallel, memory_share):
        return math.inf, 0
    return prefill_time_s(model, accelerator, load.prompt_tokens, tensor_parallel), 1


def _decode(
    accelerator: Accelerator,
    model: ModelShape,
    load: Workload,
    tensor_parallel: int,
    memory_share: float,
) -> tuple[float, int]:
    # Admission keeps room for a sequence's last token; the average one is half way there.
    longest = load.prompt_tokens + load.output_tokens
    room = kv_capacity_tokens(model, accelerator, tensor_parallel, memory_share) // longest
    batch = min(room, load.batch_max)
    if batch == 0:
        return math.inf, 0
    context = load.prompt_tokens + load.output_tokens // 2
    return decode_step_time_s(model, accelerator, batch, context, tensor_parallel), batch


def _rate(phase: Phase, load: Workload, seconds: float, batch: int) -> float:
    tokens = load.prompt_tokens if phase == "prefill" else batch
    return tokens / seconds


def _reason(
    phase: Phase,
    accelerator: Accelerator,
    model: ModelShape,
    load: Workload,
    tensor_parallel: int,
    memory_share: float,
    rate: float,
    batch: int,
) -> str:
    each = f" on {tensor_parallel} of them" if tensor_parallel > 1 else ""
    if not batch:
        weights_gb = model.weights_bytes / tensor_parallel / 1e9
        usable_gb = usable_bytes(accelerator, memory_share) / 1e9
        return (
            f"{accelerator.name} has {usable_gb:.0f} GB to use, too little for "
            f"{weights_gb:.0f} GB of weights and one request's KV at tensor_parallel "
            f"{tensor_parallel}"
        )
    if phase == "prefill":
        return (
            f"{accelerator.name}{each} prefills {rate:,.0f} tokens/s "
            f"({accelerator.fp16_tflops:,.0f} TFLOP/s each, prompts of {load.prompt_tokens:,})"
        )
    return (
        f"{accelerator.name}{each} decodes {rate:,.0f} tokens/s ({batch} sequences at once in "
        f"{accelerator.memory_gb:,.0f} GB, {accelerator.bandwidth_gb_s:,.0f} GB/s each)"
    )


def _flops(model: ModelShape, accelerator: Accelerator, tensor_parallel: int) -> float:
    fp8 = accelerator.fp8_tflops if model.fp8_compute else None
    return (fp8 or accelerator.fp16_tflops) * 1e12 * efficiency(accelerator) * tensor_parallel


def _weights_read_s(
    model: ModelShape, accelerator: Accelerator, tokens: int, tensor_parallel: int
) -> float:
    read = model.parameters_read(tokens) * model.weight_bytes / tensor_parallel
    return read / (accelerator.bandwidth_gb_s * 1e9 * BANDWIDTH_EFFICIENCY)


def _all_reduce_s(
    model: ModelShape, accelerator: Accelerator, tokens: int, tensor_parallel: int
) -> float:
    """Two all-reduces a layer, each a ring over the link's one-way half."""
    if tensor_parallel == 1:
        return 0.0
    one_way = accelerator.interconnect_gb_s(tensor_parallel) * 1e9 / 2 * LINK_EFFICIENCY
    moved = tokens * model.hidden * ACTIVATION_BYTES * 2 * (tensor_parallel - 1) / tensor_parallel
    return 2 * model.layers * (moved / one_way + ALL_REDUCE_LATENCY_S)


def _check(tokens: int, tensor_parallel: int) -> None:
    if tokens < 1 or tensor_parallel < 1:
        raise ValueError("tokens, batch and tensor_parallel must be at least 1")


def _from_text_config(config: Mapping[str, Any]) -> ModelShape:
    hidden = _first(config, "hidden_size", "n_embd", "d_model")
    layers = _first(config, "num_hidden_layers", "n_layer", "n_layers", "num_layers")
    heads = _first(config, "num_attention_heads", "n_head", "n_heads")
    kv_heads = int(config.get("num_key_value_heads") or (1 if config.get("multi_query") else heads))
    head_dim = int(config.get("head_dim") or hidden // heads)
    ungated = str(config.get("model_type", "")).casefold() in _UNGATED_MLP
    inner = int(
        config.get("intermediate_size")
        or config.get("ffn_dim")
        or config.get("n_inner")
        or 4 * hidden
    )
    matrices = 2 if ungated else 3
    latent = int(config.get("kv_lora_rank") or 0)
    if latent:
        attention, kept = _latent_attention(config, hidden, heads)
    else:
        attention, kept = hidden * head_dim * (2 * heads + 2 * kv_heads), 0
    experts, per_token = _experts(config)
    expert = matrices * hidden * int(config.get("moe_intermediate_size") or inner)
    dense_layers = layers if experts == 1 else int(config.get("first_k_dense_replace") or 0)
    shared = expert * int(config.get("n_shared_experts") or 0)
    vocabulary = hidden * int(config.get("vocab_size") or 0)
    common = (
        vocabulary * (1 if config.get("tie_word_embeddings", False) else 2)
        + layers * attention
        + dense_layers * matrices * hidden * inner
        + (layers - dense_layers) * shared
    )
    routed = (layers - dense_layers) * expert if experts > 1 else 0
    weight_bytes, value_bytes, fp8 = _bytes(config)
    return ModelShape(
        parameters=float(common + routed * experts),
        layers=layers,
        hidden=hidden,
        kv_heads=kv_heads,
        head_dim=head_dim,
        attention_heads=heads,
        weight_bytes=weight_bytes,
        kv_bytes=value_bytes,
        active_parameters=float(common + routed * per_token),
        experts=experts,
        experts_per_token=per_token,
        latent_kv=kept,
        fp8_compute=fp8,
    )


def _latent_attention(config: Mapping[str, Any], hidden: int, heads: int) -> tuple[int, int]:
    """Parameters a layer and values kept a token, for multi-head latent attention (DeepSeek)."""
    rank_kv = _first(config, "kv_lora_rank")
    rope = _first(config, "qk_rope_head_dim")
    nope = _first(config, "qk_nope_head_dim")
    value = _first(config, "v_head_dim")
    rank_q = int(config.get("q_lora_rank") or 0)
    query = heads * (nope + rope)
    queries = rank_q * (hidden + query) if rank_q else hidden * query
    keys_values = hidden * (rank_kv + rope) + rank_kv * heads * (nope + value)
    return queries + keys_values + heads * value * hidden, rank_kv + rope


def _experts(config: Mapping[str, Any]) -> tuple[int, int]:
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((int(config[name]) for name in names if config.get(name)), 1)
    if experts == 1:
        return 1, 1
    return experts, _first(config, "num_experts_per_tok", "experts_per_token")


def _bytes(config: Mapping[str, Any]) -> tuple[float, float, bool]:
    """Bytes of a parameter, bytes of a KV value, and whether matrices are multiplied in fp8."""
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    plain = _DTYPE_BYTES.get(dtype.removeprefix("torch."))
    if plain is None:
        raise ValueError(f"dtype {dtype!r}: expected one of {', '.join(_DTYPE_BYTES)}")
    scheme = config.get("quantization_config") or {}
    method = str(scheme.get("quant_method", "")).casefold()
    if not scheme:
        return plain, plain, False
    if method in ("fp8", "fbgemm_fp8"):
        return 1.0, plain, True
    if method == "mxfp4":
        return 0.5, plain, False
    if method == "bitsandbytes":
        return (0.5 if scheme.get("load_in_4bit") else 1.0), plain, False
    for group in (scheme.get("config_groups") or {}).values():
        weights, inputs = group.get("weights") or {}, group.get("input_activations") or {}
        if weights.get("num_bits"):
            fp8 = weights.get("type") == inputs.get("type") == "float" and inputs["num_bits"] == 8
            return weights["num_bits"] / 8, plain, fp8
    return float(scheme.get("bits") or plain * 8) / 8, plain, False


def _first(config: Mapping[str, Any], *names: str) -> int:
    for name in names:
        if config.get(name):
            return int(config[name])
    raise ValueError(f"the model's config has no {' or '.join(names)}")
