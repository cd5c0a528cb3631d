"""Why a worker is where it is, and why workers have no place, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final

from cluster.accelerators import CPU
from cluster.placement_kinds import Frontier, Kind, Split, figure
from cluster.placement_request import Node, PlacementRequest, Role, WorkerNeeds
from cluster.roofline import ModelShape

NODES_NAMED_MAX: Final = 8
"""Nodes an error message lists."""

_VERB: Final[Mapping[Role, str]] = {"prefill": "prefills", "decode": "decodes"}
_FIGURE: Final[Mapping[Role, str]] = {"prefill": "TFLOP/s of prefill", "decode": "GB/s"}


def reason_of(
    role: Role,
    kind: Kind,
    kinds: Sequence[Kind],
    splits: tuple[Split, Split],
    request: PlacementRequest,
) -> str:
    """One sentence: this kind's figure in this role, and what it was weighed against."""
    if kind.name == CPU:
        return _pinned(role, request, f"nodes without accelerators count as equal for {role}")
    if kind.known is None:
        return _pinned(
            role, request, f"{kind.name} is not in the catalogue and counts as the slowest here"
        )
    if request.model is None:
        own = f"{figure(role, kind.known):,.0f} {_FIGURE[role]}"
        return _pinned(
            role, request, f"{kind.name} counts by its {own} alone, for {request.model_note}"
        )
    if kind.unfit[role]:
        return _pinned(role, request, _unfit(kind.unfit[role], role, request.model, request))
    rated = f"{kind.name} {_VERB[role]} {kind.rate[role]:,.0f} tokens/s"
    others = [
        one
        for one in kinds
        if one is not kind and one.rate[role] and one.known and not one.unfit[role]
    ]
    if request.pin(role) is not None:
        return _pinned(role, request, rated)
    if not others:
        alone = len([one for one in kinds if one.name != CPU]) == 1
        only = "the only accelerator here" if alone else "the only one here that can be used"
        where = "on one node" if len(kind.nodes) == 1 else f"spread over {len(kind.nodes)} nodes"
        return f"{rated}; {only}, {where}"
    next_best = max(others, key=lambda one: one.rate[role])
    factor = kind.rate[role] / next_best.rate[role]
    rival = f"{next_best.name}, {next_best.rate[role]:,.0f}"
    if factor >= 1.005:
        return f"{rated}, {factor:.1f}x the next ({rival})"
    if factor > 0.995:
        return f"{rated}, as fast as any other ({rival})"
    other: Role = "decode" if role == "prefill" else "prefill"
    used = splits[0 if other == "prefill" else 1][kinds.index(next_best)]
    here, there = next_best.rate[role], next_best.rate[other]
    if used and kind.rate[other] and there / kind.rate[other] > here / kind.rate[role]:
        return (
            f"{rated} to {next_best.name}'s {here:,.0f}, but {next_best.name} is worth more in "
            f"{other}: {there / kind.rate[other]:.1f}x {kind.name} there, "
            f"{here / kind.rate[role]:.1f}x here"
        )
    if used:
        return f"{rated} to {next_best.name}'s {here:,.0f}, which is kept for {other}"
    return f"{rated}; the faster {next_best.name} ({here:,.0f}) has no more room"


def _unfit(why: str, role: Role, model: ModelShape, request: PlacementRequest) -> str:
    """A warning with what the estimate assumed: vLLM knows better, when it starts."""
    share = request.needs(role).memory_share
    assumed = (
        f"{share:.0%} of the memory, {model.weight_bytes:g} bytes a weight and "
        f"{model.kv_bytes:g} a KV value"
    )
    without = f", {request.model_note}" if request.model_note else ""
    return f"it may not fit: {why}, taking {assumed}{without}; a larger tensor_parallel would help"


def _pinned(role: Role, request: PlacementRequest, sentence: str) -> str:
    pin = request.pin(role)
    return sentence if pin is None else f"{sentence}; pinned by {role}_accelerator={pin!r}"


def shortage(
    nodes: Sequence[Node],
    kinds: Sequence[Kind],
    total: Frontier,
    request: PlacementRequest,
) -> str:
    """What was asked, what is there, and what to change. `total`: what fits, of either role."""
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


def _together(total: Frontier) -> str:
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
