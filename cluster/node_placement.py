"""Which node runs which role: the hardware decides.

Each worker goes where it makes the cluster's two phases fastest together. The measure is the
product of the prefill workers' and the decode workers' throughput: an accelerator then goes to the
phase in which it is ahead by the larger factor, whatever the workload's ratio of the two.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from cluster.accelerators import CPU, Accelerator, Catalogue
from cluster.roofline import ModelShape, Workload, rank

Role = Literal["prefill", "decode"]

EXACT_SPLITS_MAX: Final = 20_000
"""Ways to divide the prefill workers among accelerator types that are all compared; where there
are more, the search climbs from one of them."""

NODES_NAMED_MAX: Final = 8
"""Nodes an error message lists."""


class NotEnoughCapacity(RuntimeError):
    """The nodes have no room for the workers; the message says what to change."""


@dataclass(frozen=True)
class Node:
    """What one node has free."""

    id: str
    accelerator: str | None
    """Accelerator type as Ray names it; None on a node without one."""
    accelerators_free: float
    cpus_free: float
    memory_bytes_free: int
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def has_accelerator(self) -> bool:
        return self.accelerator is not None and self.accelerator.casefold() != CPU.casefold()


@dataclass(frozen=True)
class WorkerNeeds:
    """What one worker takes from its node."""

    tensor_parallel: int = 1
    accelerators: float | None = None
    """Accelerators reserved; None means `tensor_parallel`. None are taken where there are none."""
    cpus: float = 1.0
    memory_bytes: int = 0

    def __post_init__(self) -> None:
        if self.tensor_parallel < 1:
            raise ValueError("tensor_parallel must be at least 1")
        if min(self.accelerators or 0.0, self.cpus, self.memory_bytes) < 0:
            raise ValueError("a worker cannot need less than nothing")

    def on(self, node: Node) -> tuple[float, float, float]:
        """Accelerators, CPUs and bytes of memory taken from this node."""
        wanted = self.tensor_parallel if self.accelerators is None else self.accelerators
        return (wanted if node.has_accelerator else 0.0, self.cpus, self.memory_bytes)


@dataclass(frozen=True)
class PlacementRequest:
    """The workers wanted, and for which model and load."""

    prefill_workers: int
    decode_workers: int
    model: ModelShape
    workload: Workload = field(default_factory=Workload)
    prefill: WorkerNeeds = field(default_factory=WorkerNeeds)
    decode: WorkerNeeds = field(default_factory=WorkerNeeds)
    prefill_accelerator: str | None = None
    """Only this accelerator prefills; `CPU` stands for nodes without one."""
    decode_accelerator: str | None = None

    def __post_init__(self) -> None:
        if min(self.prefill_workers, self.decode_workers) < 0:
            raise ValueError("the number of workers cannot be negative")

    def workers(self, role: Role) -> int:
        return self.prefill_workers if role == "prefill" else self.decode_workers

    def needs(self, role: Role) -> WorkerNeeds:
        return self.prefill if role == "prefill" else self.decode

    def pin(self, role: Role) -> str | None:
        return self.prefill_accelerator if role == "prefill" else self.decode_accelerator


@dataclass(frozen=True)
class WorkerPlacement:
    """One worker's node, and why."""

    role: Role
    node_id: str
    accelerator: str | None
    """As the node names it."""
    reason: str


@dataclass(frozen=True)
class _Kind:
    """The nodes of one accelerator type, and one worker's throughput on it (0: not eligible)."""

    name: str
    known: Accelerator | None
    nodes: tuple[Node, ...]
    rate: Mapping[Role, float]
    refused: Mapping[Role, str]


_Frontier = list[int]
"""Index: prefill workers placed. Value: decode workers that still fit, or -1."""
_Split = tuple[int, ...]
"""Workers of one role for each kind, in the kinds' order."""


def place(
    nodes: Iterable[Node], request: PlacementRequest, catalogue: Catalogue | None = None
) -> list[WorkerPlacement]:
    """A node for every worker, prefill first. The order of `nodes` does not matter.

    Raises NotEnoughCapacity if the workers do not all fit.
    """
    known = catalogue or Catalogue.load()
    ordered = sorted(nodes, key=lambda node: node.id)
    if len({node.id for node in ordered}) < len(ordered):
        raise ValueError("two nodes have the same id")
    kinds = _kinds(ordered, request, known)
    frontiers = [_frontier(kind, request) for kind in kinds]
    splits = _best_split(kinds, frontiers, request)
    if splits is None:
        raise NotEnoughCapacity(_shortage(ordered, kinds, frontiers, request))
    placements: list[WorkerPlacement] = []
    for kind, prefill, decode in zip(kinds, *splits, strict=True):
        counts: dict[Role, int] = {"prefill": prefill, "decode": decode}
        for role, node in _spread(kind, counts, request):
            reason = _reason(role, kind, kinds, splits, request)
            placements.append(WorkerPlacement(role, node.id, node.accelerator, reason))
    return sorted(placements, key=lambda one: (one.role == "decode", one.node_id))


def fitting(
    nodes: Iterable[Node], request: PlacementRequest, catalogue: Catalogue | None = None
) -> PlacementRequest:
    """As many of the workers as fit together; of equally many, as many of one role as of the
    other."""
    ordered = sorted(nodes, key=lambda node: node.id)
    kinds = _kinds(ordered, request, catalogue or Catalogue.load())
    room = _join_all((_frontier(kind, request) for kind in kinds), request)
    prefill = max(
        range(len(room)), key=lambda count: (count + room[count], min(count, room[count]))
    )
    return replace(request, prefill_workers=prefill, decode_workers=room[prefill])


def _kinds(nodes: Sequence[Node], request: PlacementRequest, catalogue: Catalogue) -> list[_Kind]:
    """The accelerator types among the nodes, by name, with what each is worth in either role."""
    by_name: dict[str, list[Node]] = {}
    for node in nodes:
        by_name.setdefault(_kind_name(node.accelerator, catalogue), []).append(node)
    only_cpu = set(by_name) <= {CPU}
    rates: dict[Role, dict[str, float]] = {}
    refused: dict[Role, dict[str, str]] = {}
    roles: tuple[Role, Role] = ("prefill", "decode")
    for role in roles:
        rates[role], refused[role] = _rates(role, by_name, only_cpu, request, catalogue)
    return [
        _Kind(
            name=name,
            known=catalogue.get(name),
            nodes=tuple(members),
            rate={role: rates[role].get(name, 0.0) for role in roles},
            refused={role: refused[role].get(name, "") for role in roles},
        )
        for name, members in sorted(by_name.items())
    ]


def _kind_name(accelerator: str | None, catalogue: Catalogue) -> str:
    if accelerator is None:
        return CPU
    known = catalogue.get(accelerator)
    return known.name if known else accelerator


def _rates(
    role: Role,
    names: Iterable[str],
    only_cpu: bool,
    request: PlacementRequest,
    catalogue: Catalogue,
) -> tuple[dict[str, float], dict[str, str]]:
    """Tokens a second of one worker on each eligible type, and why the others are refused.

    A type the catalogue lacks counts as the slowest of the others: it is used last.
    """
    pin = request.pin(role)
    wanted = None if pin is None else _kind_name(pin, catalogue)
    rates: dict[str, float] = {}
    refused: dict[str, str] = {}
    unknown: list[str] = []
    for name in names:
        known = catalogue.get(name)
        if wanted is not None and name != wanted:
            refused[name] = f"{role}_accelerator is pinned to {pin}"
        elif wanted is None and name == CPU and not only_cpu:
            refused[name] = "has no accelerator, and other nodes have"
        elif name == CPU:
            rates[name] = 1.0
        elif known is None:
            unknown.append(name)
        else:
            (ranking,) = rank(
                role,
                [known],
                request.model,
                request.workload,
                request.needs(role).tensor_parallel,
            )
            if ranking.batch:
                rates[name] = ranking.tokens_per_s
            else:
                refused[name] = ranking.reason
    slowest = min(rates.values(), default=1.0)
    return {**rates, **dict.fromkeys(unknown, slowest)}, refused


def _room(node: Node, request: PlacementRequest, placed: Mapping[Role, int]) -> bool:
    """Whether the node holds this many workers of each role."""
    free = (node.accelerators_free, node.cpus_free, node.memory_bytes_free)
    taken = [request.needs(role).on(node) for role in placed]
    return all(
        sum(count * each[i] for count, each in zip(placed.values(), taken, strict=True))
        <= free[i] + 1e-9
        for i in range(3)
    )


def _node_frontier(
    node: Node, kind: _Kind, request: PlacementRequest, held: Mapping[Role, int]
) -> _Frontier:
    """How many more decode workers fit for each number of further prefill workers."""
    most_prefill = request.prefill_workers if kind.rate["prefill"] else 0
    most_decode = request.decode_workers if kind.rate["decode"] else 0
    frontier: _Frontier = []
    decode = most_decode
    for prefill in range(most_prefill + 1):
        while decode >= 0 and not _room(
            node,
            request,
            {"prefill": held["prefill"] + prefill, "decode": held["decode"] + decode},
        ):
            decode -= 1
        if decode < 0:
            break
        frontier.append(decode)
    return frontier


def _join(one: _Frontier, other: _Frontier, request: PlacementRequest) -> _Frontier:
    """The frontier of two sets of nodes together."""
    length = min(len(one) + len(other) - 1, request.prefill_workers + 1)
    joined = [-1] * length
    for i, decode in enumerate(one[:length]):
        for j, more in enumerate(other[: length - i]):
            joined[i + j] = max(joined[i + j], min(decode + more, request.decode_workers))
    return joined


def _join_all(frontiers: Iterable[_Frontier], request: PlacementRequest) -> _Frontier:
    total: _Frontier = [0]
    for frontier in frontiers:
        total = _join(total, frontier, request)
    return total


def _frontier(kind: _Kind, request: PlacementRequest) -> _Frontier:
    none: dict[Role, int] = {"prefill": 0, "decode": 0}
    each = (_node_frontier(node, kind, request, none) for node in kind.nodes)
    return _join_all((frontier for frontier in each if frontier), request)


def _best_split(
    kinds: Sequence[_Kind], frontiers: Sequence[_Frontier], request: PlacementRequest
) -> tuple[_Split, _Split] | None:
    """How many workers of each role each kind gets; None if they do not all fit."""
    start = _feasible(frontiers, request)
    if start is None:
        return None

    def decodes(prefills: _Split) -> _Split | None:
        return _fill_decode(kinds, frontiers, prefills, request.decode_workers)

    def worth(prefills: _Split) -> float:
        split = decodes(prefills)
        return -math.inf if split is None else _worth(kinds, prefills, split)

    ways = math.comb(request.prefill_workers + len(kinds) - 1, len(kinds) - 1)
    if ways <= EXACT_SPLITS_MAX:
        limits = [len(frontier) - 1 for frontier in frontiers]
        every = _compositions(request.prefill_workers, limits)
        best = max(every, key=lambda split: (worth(split), split))
    else:
        best = _climb(start, worth)
    split = decodes(best)
    assert split is not None, "the search starts from a split that fits and only improves it"
    return best, split


def _feasible(frontiers: Sequence[_Frontier], request: PlacementRequest) -> _Split | None:
    """The prefill split that leaves room for the most decode workers, if that is enough."""
    joined = [[0]]
    for frontier in frontiers:
        joined.append(_join(joined[-1], frontier, request))
    left, room = request.prefill_workers, request.decode_workers
    if len(joined[-1]) <= left or joined[-1][left] < room:
        return None
    split: list[int] = []
    for before, frontier in zip(reversed(joined[:-1]), reversed(frontiers), strict=True):
        here, decode = max(
            (
                (prefill, decode)
                for prefill, decode in enumerate(frontier[: left + 1])
                if left - prefill < len(before)
            ),
            key=lambda one: before[left - one[0]] + one[1],
        )
        split.append(here)
        left, room = left - here, room - decode
    return tuple(reversed(split))


def _fill_decode(
    kinds: Sequence[_Kind], frontiers: Sequence[_Frontier], prefills: _Split, decodes: int
) -> _Split | None:
    """The decode workers on the fastest kinds that have room beside these prefill workers."""
    split = [0] * len(kinds)
    for index in sorted(range(len(kinds)), key=lambda i: (-kinds[i].rate["decode"], i)):
        if prefills[index] >= len(frontiers[index]):
            return None
        split[index] = min(decodes, frontiers[index][prefills[index]])
        if split[index] < 0:
            return None
        decodes -= split[index]
    return tuple(split) if decodes == 0 else None


def _worth(kinds: Sequence[_Kind], prefills: _Split, decodes: _Split) -> float:
    """Balanced throughput: the log of the two phases' throughputs multiplied.

    Rounded, so that equal splits stay equal whatever the floating point made of them.
    """
    prefill = sum(count * kind.rate["prefill"] for count, kind in zip(prefills, kinds, strict=True))
    decode = sum(count * kind.rate["decode"] for count, kind in zip(decodes, kinds, strict=True))
    return round(sum(math.log(total) for total in (prefill, decode) if total > 0), 9)


def _compositions(total: int, limits: Sequence[int]) -> Iterator[_Split]:
    """Every way to divide `total` into parts, each within its limit."""
    if not limits:
        if total == 0:
            yield ()
        return
    for first in range(min(total, limits[0]) + 1):
        for rest in _compositions(total - first, limits[1:]):
            yield (first, *rest)


def _climb(split: _Split, worth: Callable[[_Split], float]) -> _Split:
    """Move one prefill worker at a time to another kind, the best move first, while it helps."""
    while True:
        moves = [split]
        for giver, count in enumerate(split):
            for taker in range(len(split)):
                if count and taker != giver:
                    moved = list(split)
                    moved[giver] -= 1
                    moved[taker] += 1
                    moves.append(tuple(moved))
        best = max(moves, key=lambda move: (worth(move), move == split, move))
        if best == split:
            return split
        split = best


def _spread(
    kind: _Kind, counts: Mapping[Role, int], request: PlacementRequest
) -> Iterator[tuple[Role, Node]]:
    """A node of this kind for each worker, a role's workers on as many nodes as can be.

    A node is taken only if the workers still to come fit on what is left.
    """
    held: dict[str, dict[Role, int]] = {node.id: {"prefill": 0, "decode": 0} for node in kind.nodes}
    free = {node.id: _node_frontier(node, kind, request, held[node.id]) for node in kind.nodes}
    left = dict(counts)
    roles: tuple[Role, Role] = ("prefill", "decode")
    for role in roles:
        for _ in range(counts[role]):
            left[role] -= 1

            def preference(node: Node, role: Role = role) -> tuple[float, ...]:
                here = held[node.id]
                return (here[role], sum(here.values()), -node.accelerators_free, -node.cpus_free)

            for node in sorted(kind.nodes, key=lambda node: (preference(node), node.id)):
                with_it = {**held[node.id], role: held[node.id][role] + 1}
                after = _node_frontier(node, kind, request, with_it)
                rest = {**free, node.id: after}
                if after and _holds(_join_all(filter(None, rest.values()), request), left):
                    held[node.id], free[node.id] = with_it, after
                    yield role, node
                    break
            else:
                raise AssertionError("the split was checked to fit")


def _holds(frontier: _Frontier, counts: Mapping[Role, int]) -> bool:
    return len(frontier) > counts["prefill"] and frontier[counts["prefill"]] >= counts["decode"]


_VERB: Final[Mapping[Role, str]] = {"prefill": "prefills", "decode": "decodes"}


def _reason(
    role: Role,
    kind: _Kind,
    kinds: Sequence[_Kind],
    splits: tuple[_Split, _Split],
    request: PlacementRequest,
) -> str:
    """One sentence: this kind's figure in this role, and what it was weighed against."""
    if kind.name == CPU:
        return _pinned(role, request, f"nodes without accelerators count as equal for {role}")
    if kind.known is None:
        return _pinned(
            role, request, f"{kind.name} is not in the catalogue and counts as the slowest here"
        )
    figure = f"{kind.name} {_VERB[role]} {kind.rate[role]:,.0f} tokens/s"
    others = [one for one in kinds if one is not kind and one.rate[role] and one.known]
    if request.pin(role) is not None:
        return _pinned(role, request, figure)
    if not others:
        alone = len([one for one in kinds if one.name != CPU]) == 1
        only = "the only accelerator here" if alone else "the only one here that can be used"
        where = "on one node" if len(kind.nodes) == 1 else f"spread over {len(kind.nodes)} nodes"
        return f"{figure}; {only}, {where}"
    next_best = max(others, key=lambda one: one.rate[role])
    factor = kind.rate[role] / next_best.rate[role]
    rival = f"{next_best.name}, {next_best.rate[role]:,.0f}"
    if factor >= 1.005:
        return f"{figure}, {factor:.1f}x the next ({rival})"
    if factor > 0.995:
        return f"{figure}, as fast as any other ({rival})"
    other: Role = "decode" if role == "prefill" else "prefill"
    used = splits[0 if other == "prefill" else 1][kinds.index(next_best)]
    here, there = next_best.rate[role], next_best.rate[other]
    if used and kind.rate[other] and there / kind.rate[other] > here / kind.rate[role]:
        return (
            f"{figure} to {next_best.name}'s {here:,.0f}, but {next_best.name} is worth more in "
            f"{other}: {there / kind.rate[other]:.1f}x {kind.name} there, "
            f"{here / kind.rate[role]:.1f}x here"
        )
    if used:
        return f"{figure} to {next_best.name}'s {here:,.0f}, which is kept for {other}"
    return f"{figure}; the faster {next_best.name} ({here:,.0f}) has no more room"


def _pinned(role: Role, request: PlacementRequest, sentence: str) -> str:
    pin = request.pin(role)
    return sentence if pin is None else f"{sentence}; pinned by {role}_accelerator={pin!r}"


def _shortage(
    nodes: Sequence[Node],
    kinds: Sequence[_Kind],
    frontiers: Sequence[_Frontier],
    request: PlacementRequest,
) -> str:
    """What was asked, what is there, and what to change."""
    total = _join_all(frontiers, request)
    alone = {"prefill": len(total) - 1, "decode": total[0]}
    roles: tuple[Role, Role] = ("prefill", "decode")
    asked = " and ".join(
        f"{request.workers(role)} {role} workers ({_needs(request.needs(role))})" for role in roles
    )
    there = ", ".join(_free(node) for node in nodes[:NODES_NAMED_MAX]) or "none"
    more = len(nodes) - NODES_NAMED_MAX
    refusals = Counter(
        f"{kind.name} not for {role}: {kind.refused[role]}"
        for kind in kinds
        for role in roles
        if kind.refused[role] and request.workers(role)
    )
    changes = ["fewer workers", "fewer resources for each", "more nodes"]
    changes += [
        f"another {role}_accelerator than {request.pin(role)!r}"
        for role in roles
        if request.pin(role) is not None
    ]
    if any("tensor_parallel" in refusal for refusal in refusals):
        changes.insert(0, "a larger tensor_parallel")
    return "".join(
        [
            f"Asked for {asked}; there is room for at most {alone['prefill']} prefill or "
            f"{alone['decode']} decode workers, or {_together(total)} together. Nodes: {there}",
            f" and {more} more" if more > 0 else "",
            ". ",
            "".join(f"{refusal}. " for refusal in refusals),
            f"Change: {', '.join(changes[:-1])} or {changes[-1]}.",
        ]
    )


def _together(total: _Frontier) -> str:
    prefill = max(range(len(total)), key=lambda count: min(count, total[count]))
    return f"{prefill} + {total[prefill]}"


def _needs(needs: WorkerNeeds) -> str:
    accelerators = needs.tensor_parallel if needs.accelerators is None else needs.accelerators
    return (
        f"{accelerators:g} accelerators, {needs.cpus:g} CPUs, {needs.memory_bytes / 1e9:g} GB each"
    )


def _free(node: Node) -> str:
    kind = f"{node.accelerators_free:g} {node.accelerator}, " if node.has_accelerator else ""
    return f"{node.id} ({kind}{node.cpus_free:g} CPUs, {node.memory_bytes_free / 1e9:.1f} GB free)"
