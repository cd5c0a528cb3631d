"""LoRA adapters that come and go while routers run: what one of them loads or unloads, all know,
through Redis. Touches vLLM's list of adapters; see tests/integration/test_vllm_seams.py.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from vllm.lora.request import LoRARequest

from cluster.membership import REDIS_ERRORS, AdapterRecord, Membership
from router.background import repeat

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 0.5


class Models(Protocol):
    """vLLM's OpenAIServingModels."""

    lora_requests: dict[str, LoRARequest]
    lora_id_counter: Any
    lora_resolver_lock: dict[str, asyncio.Lock]
    load_lora_adapter: Callable[..., Awaitable[Any]]
    unload_lora_adapter: Callable[..., Awaitable[Any]]
    resolve_lora: Callable[..., Awaitable[Any]]


class Core(Protocol):
    def know_lora(self, lora_request: LoRARequest) -> None: ...

    async def add_lora_async(self, lora_request: LoRARequest) -> bool: ...


class SharedAdapters:
    """Keeps vLLM's list and the cluster's the same. The later change of an adapter holds. With
    Redis out of reach, each router goes on with what it knows, and tells it when Redis is back."""

    def __init__(self, membership: Membership, models: Models, core: Core) -> None:
        self._membership = membership
        self._models = models
        self._core = core
        # What the router's arguments name is every router's.
        self._seen = dict(models.lora_requests)
        self._known: dict[str, AdapterRecord] = {}
        self._turn = asyncio.Lock()

    def attach(self) -> None:
        """From now on a change is told before it is answered, and an adapter that this router does
        not know is looked for."""
        models = self._models
        models.load_lora_adapter = self._then_share(models.load_lora_adapter)
        models.unload_lora_adapter = self._then_share(models.unload_lora_adapter)
        resolve = models.resolve_lora

        async def share_and_resolve(lora_name: str) -> Any:
            await self._share_if_possible()
            return await resolve(lora_name)

        models.resolve_lora = share_and_resolve

    async def run(self) -> None:
        await repeat(self._share_if_possible, LOOK_EVERY_S)

    async def share(self) -> None:
        """Tell what changed here, and take over what changed elsewhere.

        Raises:
            one of REDIS_ERRORS: nothing is lost, the next time tells it.
        """
        async with self._turn:
            for name in self._changed_here():
                lora = self._models.lora_requests.get(name)
                self._known[name] = await self._membership.change_adapter(self._record(name, lora))
                self._note(name, lora)
            shared = await self._membership.adapters()
            for name, known in self._known.items():
                if name not in shared or shared[name].number < known.number:
                    # Redis has lost it.
                    await self._membership.restore_adapter(known)
            for name, record in shared.items():
                if name not in self._known or self._known[name].number < record.number:
                    await self._take_over(record)

    def _changed_here(self) -> list[str]:
        listed = self._models.lora_requests
        names = [name for name, lora in listed.items() if self._seen.get(name) is not lora]
        return names + [name for name in self._seen if name not in listed]

    def _record(self, name: str, lora: LoRARequest | None) -> AdapterRecord:
        number = self._known[name].number + 1 if name in self._known else 1
        if lora is None:
            return AdapterRecord(name, number=number)
        return AdapterRecord(
            name=name,
            path=lora.lora_path,
            number=number,
            base_model_name=lora.base_model_name,
            load_inplace=lora.load_inplace,
            is_3d_lora_weight=lora.is_3d_lora_weight,
        )

    async def _take_over(self, record: AdapterRecord) -> None:
        name, models = record.name, self._models
        async with models.lora_resolver_lock[name]:
            before = models.lora_requests.get(name)
            if before is not self._seen.get(name):
                # It changes here as well: that is told first.
                return
            lora = None
            if record.path:
                number = before.lora_int_id if before else models.lora_id_counter.inc(1)
                lora = LoRARequest(
                    lora_name=name,
                    lora_int_id=number,
                    lora_path=record.path,
                    base_model_name=record.base_model_name,
                    load_inplace=record.load_inplace,
                    is_3d_lora_weight=record.is_3d_lora_weight,
                )
                await self._make_known(lora, again=before is not None)
                models.lora_requests[name] = lora
            else:
                models.lora_requests.pop(name, None)
            self._note(name, lora)
            self._known[name] = record
        logger.info("adapter %s was %s elsewhere", name, "loaded" if lora else "unloaded")

    async def _make_known(self, lora: LoRARequest, again: bool) -> None:
        self._core.know_lora(lora)
        if again and lora.load_inplace:
            # This router's requests may have brought it to workers that the other does not know of.
            try:
                await self._core.add_lora_async(lora)
            except Exception as error:
                logger.warning("adapter %s cannot be loaded anew: %s", lora.lora_name, error)

    def _note(self, name: str, lora: LoRARequest | None) -> None:
        if lora is None:
            self._seen.pop(name, None)
        else:
            self._seen[name] = lora

    def _then_share(self, change: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def change_and_share(*args: Any, **kwargs: Any) -> Any:
            answer = await change(*args, **kwargs)
            await self._share_if_possible()
            return answer

        return change_and_share

    async def _share_if_possible(self) -> None:
        try:
            await self.share()
        except REDIS_ERRORS as error:
            # The member watcher says that Redis is gone; here it is told later.
            logger.debug("adapters are not shared: %s", error)
