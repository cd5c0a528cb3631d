"""Which node runs which role: the hardware decides.

Each worker goes where it makes the cluster's two phases fastest together. The measure is the
product of the prefill workers' and the decode workers' throughput: an accelerator then goes to the
phase in which it is ahead by the larger factor, whatever the workload's ratio of the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final

from cluster.accelerators import Catalogue
from cluster.placement_kinds import Frontier, Kind, Split, kinds_of
from cluster.placement_reasons import reason_of, shortage
from cluster.placement_request import (
    Node,
    NotEnoughCapacity,
    PlacementRequest,
    Role,
    WorkerPlacement,
)

EXACT_SPLITS_MAX: Final = 20_000
"""Ways to divide the prefill workers among accelerator types that are all compared; where there
are more, the search climbs from one of them."""


def place(
    nodes: Iterable[Node], request: PlacementRequest, catalogue: Catalogue | None = None
) -> list[WorkerPlacement]:
    """A node for every worker, prefill first. The order of `nodes` does not matter.

    Raises NotEnoughCapacity if the workers do not all fit.
    """
    if request.prefill_workers + request.decode_workers == 0:
        return []
    known = catalogue or Catalogue.load()
    ordered = sorted(nodes, key=lambda node: node.id)
    if len({node.id for node in ordered}) < len(ordered):
        raise ValueError("two nodes have the same id")
    kinds = kinds_of(ordered, request, known)
    frontiers = [_frontier(kind, request) for kind in kinds]
    splits = _best_split(kinds, frontiers, request)
    if splits is None:
        raise NotEnoughCapacity(shortage(ordered, kinds, _join_all(frontiers, request), request))
    placements: list[WorkerPlacement] = []
    for kind, prefill, decode in zip(kinds, *splits, strict=True):
        counts: dict[Role, int] = {"prefill": prefill, "decode": decode}
        for role, node in _spread(kind, counts, request):
            reason = reason_of(role, kind, kinds, splits, request)
            placements.append(WorkerPlacement(role, node.id, node.accelerator, reason))
    return sorted(placements, key=lambda one: (one.role == "decode", one.node_id))


def fitting(
    nodes: Iterable[Node],
    request: PlacementRequest,
    running: tuple[int, int] = (0, 0),
    catalogue: Catalogue | None = None,
) -> PlacementRequest:
    """As many of the workers as fit together; of equally many, those that leave the smaller pool
    largest, with the prefill and decode workers that run already."""
    ordered = sorted(nodes, key=lambda node: node.id)
    kinds = kinds_of(ordered, request, catalogue or Catalogue.load())
    room = _join_all((_frontier(kind, request) for kind in kinds), request)

    def worth(prefill: int) -> tuple[int, int]:
        decode = room[prefill]
        return prefill + decode, min(running[0] + prefill, running[1] + decode)

    prefill = max(range(len(room)), key=worth)
    return replace(request, prefill_workers=prefill, decode_workers=room[prefill])


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
    node: Node, kind: Kind, request: PlacementRequest, held: Mapping[Role, int]
) -> Frontier:
    """How many more decode workers fit for each number of further prefill workers."""
    most_prefill = request.prefill_workers if kind.rate["prefill"] else 0
    most_decode = request.decode_workers if kind.rate["decode"] else 0
    frontier: Frontier = []
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


def _join(one: Frontier, other: Frontier, request: PlacementRequest) -> Frontier:
    """The frontier of two sets of nodes together."""
    length = min(len(one) + len(other) - 1, request.prefill_workers + 1)
    joined = [-1] * length
    for i, decode in enumerate(one[:length]):
        for j, more in enumerate(other[: length - i]):
            joined[i + j] = max(joined[i + j], min(decode + more, request.decode_workers))
    return joined


def _join_all(frontiers: Iterable[Frontier], request: PlacementRequest) -> Frontier:
    total: Frontier = [0]
    for frontier in frontiers:
        total = _join(total, frontier, request)
    return total


def _frontier(kind: Kind, request: PlacementRequest) -> Frontier:
    none: dict[Role, int] = {"prefill": 0, "decode": 0}
    each = (_node_frontier(node, kind, request, none) for node in kind.nodes)
    return _join_all((frontier for frontier in each if frontier), request)


def _best_split(
    kinds: Sequence[Kind], frontiers: Sequence[Frontier], request: PlacementRequest
) -> tuple[Split, Split] | None:
    """How many workers of each role each kind gets; None if they do not all fit."""
    start = _feasible(frontiers, request)
    if start is None:
        return None

    def decodes(prefills: Split) -> Split | None:
        return _fill_decode(kinds, frontiers, prefills, request.decode_workers)

    def worth(prefills: Split) -> float:
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


def _feasible(frontiers: Sequence[Frontier], request: PlacementRequest) -> Split | None:
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
    kinds: Sequence[Kind], frontiers: Sequence[Frontier], prefills: Split, decodes: int
) -> Split | None:
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


def _worth(kinds: Sequence[Kind], prefills: Split, decodes: Split) -> float:
    """Balanced throughput: the log of the two phases' throughputs multiplied.

    Rounded, so that equal splits stay equal whatever the floating point made of them.
    """
    prefill = sum(count * kind.rate["prefill"] for count, kind in zip(prefills, kinds, strict=True))
    decode = sum(count * kind.rate["decode"] for count, kind in zip(decodes, kinds, strict=True))
    return round(sum(math.log(total) for total in (prefill, decode) if total > 0), 9)


def _compositions(total: int, limits: Sequence[int]) -> Iterator[Split]:
    """Every way to divide `total` into parts, each within its limit."""
    if not limits:
        if total == 0:
            yield ()
        return
    for first in range(min(total, limits[0]) + 1):
        for rest in _compositions(total - first, limits[1:]):
            yield (first, *rest)


def _climb(split: Split, worth: Callable[[Split], float]) -> Split:
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
    kind: Kind, counts: Mapping[Role, int], request: PlacementRequest
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


def _holds(frontier: Frontier, counts: Mapping[Role, int]) -> bool:
    return len(frontier) > counts["prefill"] and frontier[counts["prefill"]] >= counts["decode"]
