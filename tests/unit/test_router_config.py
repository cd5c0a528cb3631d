"""What becomes of vLLM's flags in a router."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from vllm.multimodal.cache import processor_cache_from_config
from vllm.multimodal.inputs import MultiModalFieldElem, MultiModalKwargsItem, MultiModalSharedField
from vllm.usage.usage_lib import UsageContext

from cluster.config import BatonConfig
from cluster.router_process import router_settings, router_url
from cluster.supervisor import Supervisor
from cluster.vllm_args import BadVllmArguments
from router.server import engine_args_of, router_args
from router.settings import RouterSettings


def settings_of(*vllm_args: str) -> RouterSettings:
    config = BatonConfig(vllm_args=list(vllm_args))
    return RouterSettings.from_json(router_settings(config, "redis://x", "r", 8000))


@pytest.mark.parametrize("cache_type", ["lru", "shm"])
def test_medias_data_is_sent_with_each_request(cache_type: str) -> None:
    """No worker is taken to have what another one was sent."""
    engine_args = engine_args_of(router_args(settings_of()))
    config = engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
    media = SimpleNamespace(mm_processor_cache_gb=1, mm_processor_cache_type=cache_type)
    model = SimpleNamespace(supports_multimodal_inputs=True, get_multimodal_config=lambda: media)
    parts = SimpleNamespace(model_config=model, parallel_config=config.parallel_config)
    cache = processor_cache_from_config(cast(Any, parts))
    assert cache is not None
    field = MultiModalSharedField(batch_size=1)
    item = MultiModalKwargsItem({"pixels": MultiModalFieldElem(torch.ones(4), field)})
    for given in ((item, []), None):
        data, _ = cache.get_and_update_item(given, "hash")
        assert data is item


def test_a_router_with_a_certificate_is_reached_by_https() -> None:
    args = ["--ssl-keyfile", "k.pem", "--ssl-certfile=c.pem"]
    assert settings_of(*args).url == "https://127.0.0.1:8000"
    assert settings_of().url == "http://127.0.0.1:8000"
    config = BatonConfig(vllm_args=args, host="::1", routers=2)
    supervisor = Supervisor(config, lambda _: None)
    assert supervisor.urls == ["https://[::1]:8000", "https://[::1]:8001"]
    assert supervisor.url == router_url(config, 8000) == "https://[::1]:8000"


def test_a_unix_socket_is_refused() -> None:
    with pytest.raises(BadVllmArguments, match="--uds"):
        router_args(settings_of("--uds", "/tmp/x.sock"))


def test_a_model_behind_flags_is_refused() -> None:
    """It would be served by the name and with the data type of the bundled one."""
    with pytest.raises(BadVllmArguments, match=r"Qwen/Qwen3-0\.6B: .* a model comes first"):
        router_args(settings_of("--max-model-len", "4096", "Qwen/Qwen3-0.6B"))
