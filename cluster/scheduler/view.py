"""What the scheduler knows of the workers."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from cluster.scheduler.adapters import Adapters
from cluster.scheduler.rates import Rates

KV_LOAD_MAX = 0.9
"""Above this share of its KV cache, a decode worker's queue is long."""


class Pool(enum.StrEnum):
    """A label the scheduler gives: every worker can do both kinds of work."""

    PREFILL = "prefill"
    DECODE = "decode"


class WorkerKey(NamedTuple):
    """One start of one worker. What an older start said or was told no longer counts."""

    worker_id: str
    incarnation: str

    def __str__(self) -> str:
        return f"{self.worker_id}/{self.incarnation}"


class PlacedLoad(NamedTuple):
    """What routers placed on a worker and have not seen done."""

    pending_prompt_tokens: int = 0
    pending_local_tokens: int = 0
    """Those of the pending prompt tokens that are decode tokens too, for they stay there."""
    prefills: int = 0
    decodes: int = 0
    decode_tokens: int = 0
    """Context tokens of the requests decoding there."""
    lent: int = 0
    """Requests for which it does the other pool's work."""

    def plus(self, other: PlacedLoad) -> PlacedLoad:
        return PlacedLoad(*(a + b for a, b in zip(self, other, strict=True)))

    def minus(self, other: PlacedLoad) -> PlacedLoad:
        return PlacedLoad(*(a - b for a, b in zip(self, other, strict=True)))


NOTHING = PlacedLoad()


@dataclass(slots=True)
class WorkerView:
    key: WorkerKey
    pool: Pool
    model: str
    """Fingerprint of the model: KV goes only between workers of one."""
    max_model_len_tokens: int
    kv_tokens: int
    """Tokens that its KV cache holds."""
    draining: bool = False
    kv_bytes_per_token: int = 0
    block_tokens: int = 0
    """Tokens in a block of its prefix cache; 0: it tells nothing of what it holds."""
    inbox_bytes_max: int = 0
    """Of KV that may wait there for its decode leg; 0: not known."""
    adapters: Adapters = field(default_factory=Adapters)
    rates: Rates = field(default_factory=Rates, compare=False)

    # The fields of PlacedLoad: what this router placed there, and as far as it knows, others.
    pending_prompt_tokens: int = 0
    pending_local_tokens: int = 0
    prefills: int = 0
    decodes: int = 0
    decode_tokens: int = 0
    lent: int = 0
    others: PlacedLoad = NOTHING
    """The other routers' part of these."""

    # What the worker said last; other routers' work is in it.
    reported_running: int = 0
    reported_waiting: int = 0
    reported_kv_usage: float = 0.0
    reported_inbox_bytes: int = 0

    @property
    def own(self) -> PlacedLoad:
        """This router's part."""
        return PlacedLoad(*(getattr(self, name) for name in PlacedLoad._fields)).minus(self.others)

    def count_others(self, others: PlacedLoad) -> None:
        for name, change in zip(PlacedLoad._fields, others.minus(self.others), strict=True):
            setattr(self, name, getattr(self, name) + change)
        self.others = others

    @property
    def mixed(self) -> bool:
        """It keeps its label, and is back in its pool when it has no more of the other's work."""
        return self.lent > 0

    @property
    def prefill_wait_s(self) -> float:
        """Until it has computed the prompts that are there."""
        pending = self.pending_prompt_tokens
        return self.rates.prefill.predict_s(pending) if pending else 0.0

    @property
    def kv_load(self) -> float:
        """Share of the KV cache in use or promised, whichever figure is ahead."""
        promised = self.decode_tokens + self.pending_prompt_tokens - self.pending_local_tokens
        share = promised / self.kv_tokens if self.kv_tokens else float(promised)
        return share if share > self.reported_kv_usage else self.reported_kv_usage

    @property
    def memory_tenths(self) -> int:
        """`kv_load` in tenths, spelled out: every placement asks it of every worker."""
        promised = self.decode_tokens + self.pending_prompt_tokens - self.pending_local_tokens
        tenths = 10 * promised // (self.kv_tokens or 1)
        reported = int(10 * self.reported_kv_usage)
        if self.reported_inbox_bytes and self.inbox_bytes_max:
            # Prompts wait there to get into the KV cache.
            reported = max(reported, 10 * self.reported_inbox_bytes // self.inbox_bytes_max)
        return tenths if tenths > reported else reported

    def has_room(self, tokens: int) -> bool:
        """For a context of `tokens`, and for what those that run there still make."""
        return self.kv_load + tokens / max(1, self.kv_tokens) <= KV_LOAD_MAX


@dataclass(frozen=True, slots=True)
class Pools:
    """Workers that may be given new work, each in one of the three."""

    prefill: list[WorkerView]
    decode: list[WorkerView]
    mixed: list[WorkerView]

    @property
    def count(self) -> int:
        return len(self.prefill) + len(self.decode) + len(self.mixed)

    def everyone(self) -> list[WorkerView]:
        return [*self.prefill, *self.decode, *self.mixed]

    def labelled(self, pool: Pool) -> list[WorkerView]:
        """A pool with those of it that are mixed; all workers if it has none."""
        own = self.prefill if pool is Pool.PREFILL else self.decode
        if self.mixed:
            own = [*own, *(worker for worker in self.mixed if worker.pool is pool)]
        return own or self.everyone()

    def of_model(self, model: str) -> Pools:
        return Pools(
            [worker for worker in self.prefill if worker.model == model],
            [worker for worker in self.decode if worker.model == model],
            [worker for worker in self.mixed if worker.model == model],
        )


@dataclass(slots=True)
class ClusterView:
    workers: dict[WorkerKey, WorkerView] = field(default_factory=dict)
    requests_max: int = 0
    """That a worker prefills, and that it decodes, at a time; 0: no bound."""
    one_model: bool = False
    """All workers are known to be of one, so that placements need not compare them."""

    def note_models(self) -> None:
        """To be called when workers have come or gone."""
        self.one_model = len({worker.model for worker in self.workers.values()}) == 1

    def is_full(self, worker: WorkerView) -> bool:
        most = self.requests_max
        return most > 0 and (worker.prefills >= most or worker.decodes >= most)

    def is_crowded(self, tokens: int) -> bool:
        """A pool has workers that can take the context, and all of them are full. Then a request
        waits, although the other pool could do all of it."""
        if not self.requests_max:
            return False
        able = [
            w for w in self.workers.values() if not w.draining and tokens < w.max_model_len_tokens
        ]
        for pool in Pool:
            own = [worker for worker in able if worker.pool is pool]
            if own and all(map(self.is_full, own)):
                return True
        return False

    def pools(self, tokens: int) -> Pools:
        """Of the workers that have room for a context of more than `tokens`."""
        prefill: list[WorkerView] = []
        decode: list[WorkerView] = []
        mixed: list[WorkerView] = []
        prefill_pool = Pool.PREFILL  # looking it up takes as long as all the rest of the loop
        workers: Iterable[WorkerView] = self.workers.values()
        if self.requests_max:
            workers = [worker for worker in workers if not self.is_full(worker)]
        for worker in workers:
            if worker.draining or tokens >= worker.max_model_len_tokens:
                continue
            if worker.lent:
                mixed.append(worker)
            elif worker.pool is prefill_pool:
                prefill.append(worker)
            else:
                decode.append(worker)
        return Pools(prefill, decode, mixed)
