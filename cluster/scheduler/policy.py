"""Where a request goes. A policy sees the request and the workers, and names both of its workers
at once, as Splitwise has it (section IV-A): the hand-off's two ends are chosen together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import ClassVar, Protocol

from cluster.scheduler.handover import HandOverRule
from cluster.scheduler.prefixes import PromptBlocks
from cluster.scheduler.slo import NO_PROMISE, SloClass
from cluster.scheduler.together import keep_together
from cluster.scheduler.view import ClusterView, Pools, WorkerKey, WorkerView


@dataclass(frozen=True, slots=True)
class Ask:
    """What a policy may know of a request."""

    request_id: str
    prompt_tokens: int
    max_tokens: int
    """Output tokens still to come, at most."""
    resumed_tokens: int = 0
    """Output tokens the client has already, to be computed again with the prompt."""
    can_hand_over: bool = True
    """False for work that has no decode phase, or whose output needs the prompt in one piece."""
    adapter: str = ""
    """The LoRA adapter it is for."""
    slo: SloClass = NO_PROMISE
    tenant: str = ""
    """Whose it is, for fairness."""
    blocks: PromptBlocks | None = field(default=None, compare=False)
    held_tokens: Mapping[WorkerKey, int] | None = field(default=None, compare=False)
    """How much of the prompt's beginning is in the prefix caches of those workers that have any."""

    @property
    def tokens_to_compute(self) -> int:
        return self.prompt_tokens + self.resumed_tokens

    def tokens_to_compute_on(self, worker: WorkerView) -> int:
        """Beside what its prefix cache holds; at least one."""
        if not self.held_tokens:
            return self.tokens_to_compute
        return max(1, self.tokens_to_compute - self.held_tokens.get(worker.key, 0))


@dataclass(frozen=True, slots=True)
class Placement:
    """`prefill` and `decode` are the same worker when nothing is handed over."""

    prefill: WorkerKey
    decode: WorkerKey
    reason: str
    lends_prefill: bool = False
    """The prefill worker is of the decode pool, and mixed until the prompt is done."""
    lends_decode: bool = False
    """The decode worker is of the prefill pool, and mixed until the request is done."""
    decode_cached_tokens: int = 0
    """What the decode worker's prefix cache is known to hold of the prompt's beginning."""

    @property
    def hands_over(self) -> bool:
        return self.prefill != self.decode


class PlacementPolicy(Protocol):
    def place(self, ask: Ask, view: ClusterView) -> Placement | None:
        """None: no worker can take it now."""
        ...


@dataclass(frozen=True, slots=True)
class Pick:
    worker: WorkerView
    reason: str = ""
    """If there is one beside the policy's own."""
    lends: bool = False
    """It does the other pool's work with this."""


class PairPolicy(ABC):
    """Picks the prefill worker, then a decode worker of its model. What all such policies have in
    common is here: the cases in which nothing is handed over.
    """

    rule: HandOverRule
    reason: ClassVar[str]
    """What is told of a placement that was nothing special."""

    @abstractmethod
    def pick_prefill(self, ask: Ask, pools: Pools) -> Pick | None: ...

    @abstractmethod
    def pick_decode(self, ask: Ask, pools: Pools, prefill: Pick | None) -> Pick | None:
        """`pools` are of the model of `prefill`, if that is given."""

    def place(self, ask: Ask, view: ClusterView) -> Placement | None:
        tokens = ask.tokens_to_compute
        pools = view.pools(tokens)
        if ask.adapter:
            pools = keep_together(ask.adapter, tokens, pools)
        decodes = ask.can_hand_over and ask.max_tokens > 1
        if decodes and tokens <= self.rule.local_prompt_tokens:
            local = self.pick_decode(ask, pools, None)
            if local is None:
                return None
            return _stay(local, "short prompt", lends_decode=local.lends)
        prefill = self.pick_prefill(ask, pools)
        if prefill is None:
            return None
        if not decodes:
            reason = "one token only" if ask.can_hand_over else "nothing to hand over"
            return _stay(prefill, reason, lends_prefill=prefill.lends)
        peers = pools if view.one_model else pools.of_model(prefill.worker.model)
        decode = self.pick_decode(ask, peers, prefill)
        assert decode is not None, "a prefill worker can decode, too"
        reason = prefill.reason or decode.reason or self.reason
        if decode.worker is not prefill.worker:
            stays = self.rule.stays(ask, prefill.worker, decode.worker)
            if stays:
                return _stay(decode, stays, lends_decode=decode.lends)
        elif peers.count == 1:
            reason = "one worker only" if pools.count == 1 else "no decode worker of its kind"
        return Placement(prefill.worker.key, decode.worker.key, reason, prefill.lends, decode.lends)


def _stay(pick: Pick, reason: str, **lends: bool) -> Placement:
    return Placement(pick.worker.key, pick.worker.key, reason, **lends)


Queue = Callable[[WorkerView], float]


PREFILL_QUEUE: Sequence[Queue] = (
    attrgetter("pending_prompt_tokens"),
    attrgetter("prefills"),
    attrgetter("kv_load"),
)
# Memory first, in steps of a tenth: within one, the fewer running tokens decide.
DECODE_QUEUE: Sequence[Queue] = (
    attrgetter("memory_tenths"),
    attrgetter("decode_tokens"),
    attrgetter("decodes"),
)


def shortest(workers: list[WorkerView], queues: Sequence[Queue]) -> WorkerView | None:
    """The worker with the shortest queue; each further queue breaks the ties of the former, and in
    the end the key, so that decisions can be repeated."""
    for queue in queues:
        if len(workers) < 2:
            break
        lengths = [*map(queue, workers)]
        least = min(lengths)
        if lengths.count(least) == 1:
            return workers[lengths.index(least)]
        workers = [w for w, length in zip(workers, lengths, strict=True) if length == least]
    return min(workers, key=attrgetter("key"), default=None)
